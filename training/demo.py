"""Loads the pipeline that `make demo` trained, samples from it and says what to try next."""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import diffusers_scalelong  # noqa: F401  Diffusers finds the scaled UNet through this import.
from diffusers_scalelong.plots import save_image_grid


def main(folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(
        batch_size=16, num_inference_steps=50, generator=torch.Generator().manual_seed(1), output_type="np"
    ).images
    save_image_grid(images, folder / "loaded_again.png")

    unet = pipeline.unet
    print(f"""
Trained a {type(unet).__name__} with skip_scaling={unet.config.skip_scaling!r}.
κ of its {unet.num_skips} long skip connections, shallowest first:
    {", ".join(f"{kappa:.3f}" for kappa in unet.kappas)}

{folder}                    the pipeline, for DiffusionPipeline.from_pretrained
{folder / "samples.png"}        drawn at the end of the training
{folder / "loaded_again.png"}   drawn by the pipeline after loading it again, with 50 DDIM steps
{folder / "loss.png"}           the training loss; the numbers are in loss.csv
{folder / "logs"}               for tensorboard --logdir

Next: train on your own images, with any scaling, and compare the loss curves.
    .venv/bin/accelerate launch training/train_unconditional.py --train_data_dir FOLDER --resolution 64 \\
        --skip_scaling ls --use_ema --output_dir outputs/mine
""")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="The --output_dir of the training run.")
    main(parser.parse_args().folder)
