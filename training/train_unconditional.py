"""Trains an unconditional diffusion model (DDPM) with scaled long skip connections.

    accelerate launch training/train_unconditional.py --dataset_name digits --resolution 16 --skip_scaling cs

Flags and defaults are those of Diffusers' `train_unconditional.py`; `--skip_scaling`, `--kappa`,
`--kappa_warmup_steps` and `--ls_initial_gate` choose the scaling (arXiv 2310.13545).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, ModelMixin

from diffusers_scalelong.diffusion_data import DiffusionTransform, load_samples
from diffusers_scalelong.diffusion_loss import diffusion_loss
from diffusers_scalelong.image_data import ImageTransform
from diffusers_scalelong.presets import DEFAULT_UNET, check_model, model_from_config, parse_args_with_preset
from diffusers_scalelong.training_args import (
    add_data_arguments,
    add_ddpm_arguments,
    add_output_arguments,
    add_scaling_arguments,
    add_training_arguments,
    check_args,
    kappa_argument,
    new_parser,
)
from diffusers_scalelong.training_run import TrainingRun
from diffusers_scalelong.training_setup import start_accelerator


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--model_config_name_or_path", help="Preset or config of the model; default: Diffusers' DDPM.")
    add_scaling_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    parser.add_argument("--num_epochs", dest="num_train_epochs", type=int, default=100)
    add_ddpm_arguments(parser)
    add_output_arguments(parser)
    parser.add_argument("--logger", dest="report_to", default="tensorboard", help="The same as --report_to.")
    parser.add_argument("--eval_batch_size", type=int, default=16, help="Images in the sample grid.")
    parser.set_defaults(output_dir="ddpm-model-64")
    return parser


def main(args: argparse.Namespace, model_config: dict | None) -> None:
    check_args(args)
    accelerator = start_accelerator(args)

    # Model and noise scheduler
    model = model_from_config(
        model_config or DEFAULT_UNET,
        sample_size=args.resolution,
        skip_scaling=args.skip_scaling,
        kappa=kappa_argument(args),
        ls_initial_gate=args.ls_initial_gate,
    )
    check_model(model, args.resolution)
    noise_scheduler = DDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
    )

    # Data
    channels = model.config.in_channels
    transform = DiffusionTransform(
        ImageTransform(args.resolution, channels, args.center_crop, args.random_flip, args.image_interpolation_mode),
        args.image_column,
        noise_shape=(channels, args.resolution, args.resolution),
        num_train_timesteps=args.ddpm_num_steps,
    )
    samples = load_samples(args, accelerator, transform, {"image_column": args.image_column})

    def make_pipeline(unet: ModelMixin) -> DDPMPipeline:
        return DDPMPipeline(unet=unet, scheduler=noise_scheduler)

    def draw(pipeline: DDPMPipeline, generator: torch.Generator) -> np.ndarray:
        return pipeline(
            generator=generator,
            batch_size=args.eval_batch_size,
            num_inference_steps=args.ddpm_num_inference_steps,
            output_type="np",
        ).images

    # Train
    accelerator.init_trackers(Path(__file__).stem)
    run = TrainingRun(args, accelerator, model, samples)
    for batch in run:
        noisy_images = noise_scheduler.add_noise(batch["input"], batch["noise"], batch["timestep"])
        with accelerator.accumulate(run.model):
            prediction = run.model(noisy_images, batch["timestep"]).sample
            run.optimize(
                diffusion_loss(noise_scheduler, prediction, batch["input"], batch["noise"], batch["timestep"])
            )
        save_images, save_model = run.epoch_due(args.save_images_epochs), run.epoch_due(args.save_model_epochs)
        if save_images or save_model:
            run.save_results(make_pipeline, draw, save_images, save_model)

    if not run.stopped:
        run.save_results(make_pipeline, draw)
    run.finish("unconditional")


if __name__ == "__main__":
    main(*parse_args_with_preset(build_parser()))
