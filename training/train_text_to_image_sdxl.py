"""Fine-tunes the UNet of a Stable Diffusion XL pipeline with scaled long skip connections.

    accelerate launch training/train_text_to_image_sdxl.py --train_data_dir FOLDER --skip_scaling cs \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0

Every image and caption is encoded once, before the training, by the VAE and both text encoders; the results are kept
in Datasets' cache, and the training loop runs the UNet alone. Flags and defaults are those of Diffusers'
`train_text_to_image_sdxl.py`; `--skip_scaling`, `--kappa`, `--kappa_warmup_steps` and `--ls_initial_gate` choose the
scaling (arXiv 2310.13545).
"""

import argparse
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ModelMixin, StableDiffusionXLPipeline

from diffusers_scalelong.conditions import check_captions
from diffusers_scalelong.diffusion_data import DiffusionDataset, DiffusionTransform, load_rows, make_samples
from diffusers_scalelong.diffusion_loss import diffusion_loss
from diffusers_scalelong.image_data import ImageTransform
from diffusers_scalelong.precomputed import EncodedCaptions, SDXLEncoder, draw_latents, encode_rows
from diffusers_scalelong.text_to_image import (
    add_text_to_image_arguments,
    check_base_pipeline,
    check_prompts,
    load_base_pipeline,
    load_scaled_unet,
    training_scheduler,
)
from diffusers_scalelong.training_args import (
    add_data_arguments,
    add_output_arguments,
    add_scaling_arguments,
    add_training_arguments,
    check_args,
    new_parser,
)
from diffusers_scalelong.training_run import TrainingRun
from diffusers_scalelong.training_setup import start_accelerator


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_text_to_image_arguments(parser)
    group = parser.add_argument_group("SDXL")
    group.add_argument("--pretrained_vae_model_name_or_path", help="Takes the place of the pipeline's VAE.")
    group.add_argument("--validation_prompt", help="Draw images of it while training and at the end.")
    group.add_argument(
        "--proportion_empty_prompts", type=float, default=0.0, help="How often the caption is hidden, for guidance."
    )
    add_scaling_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser)
    parser.set_defaults(output_dir="sdxl-model-finetuned", resolution=1024, image_interpolation_mode="lanczos")
    return parser


def load_pipeline(args: argparse.Namespace, **components: Any) -> DiffusionPipeline:
    """The pretrained pipeline without its UNet, with the VAE of `--pretrained_vae_model_name_or_path` if given."""
    if args.pretrained_vae_model_name_or_path is not None:
        components["vae"] = AutoencoderKL.from_pretrained(
            args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir
        )
    return load_base_pipeline(args, StableDiffusionXLPipeline, **components)


def encode_samples(
    args: argparse.Namespace,
    accelerator: Accelerator,
    rows: datasets.Dataset,
    pipeline: DiffusionPipeline,
    noise_scheduler: DDPMScheduler,
) -> DiffusionDataset:
    """The training data: rows with every image and caption encoded by the pipeline."""
    image = ImageTransform(
        args.resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        interpolation=args.image_interpolation_mode,
    )
    encoder = SDXLEncoder(pipeline.to(accelerator.device), image, args.image_column, args.caption_column, args.seed)
    transform = DiffusionTransform(
        draw_latents,
        "posterior",
        noise_shape=encoder.latent_shape,
        condition=EncodedCaptions(encoder.unconditional, args.proportion_empty_prompts),
        num_train_timesteps=noise_scheduler.config.num_train_timesteps,
        noise_offset=args.noise_offset,
    )
    samples = make_samples(args, accelerator, transform, rows)
    samples.dataset = encode_rows(samples.dataset, encoder, accelerator)
    return samples


def main(args: argparse.Namespace) -> None:
    check_args(args)
    if args.streaming:
        raise ValueError("--streaming is not possible here: this script encodes the whole dataset before training.")
    check_prompts([args.validation_prompt] if args.validation_prompt is not None else [])
    check_base_pipeline(args, StableDiffusionXLPipeline)
    accelerator = start_accelerator(args)

    # Model, noise scheduler and data
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    rows = load_rows(args, accelerator, columns)
    check_captions(rows, args.caption_column)
    unet = load_scaled_unet(args)
    pipeline = load_pipeline(args)
    noise_scheduler = training_scheduler(pipeline, args.prediction_type)
    scheduler = pipeline.scheduler
    samples = encode_samples(args, accelerator, rows, pipeline, noise_scheduler)
    del pipeline
    release_memory()

    # Results
    def make_pipeline(unet: ModelMixin) -> DiffusionPipeline:
        pipeline = load_pipeline(args, scheduler=scheduler)
        pipeline.register_modules(unet=unet)
        return pipeline

    def draw(pipeline: DiffusionPipeline, generator: torch.Generator) -> np.ndarray:
        # In float32 but for the UNet, which Accelerate has wrapped: SDXL's VAE overflows in float16.
        pipeline.to(accelerator.device)
        options = {"height": args.resolution, "width": args.resolution, "num_inference_steps": 25}
        images = [
            pipeline(args.validation_prompt, generator=generator, output_type="np", **options).images
            for _ in range(args.num_validation_images)  # one at a time: training has filled most of the memory
        ]
        return np.concatenate(images)

    # Train
    accelerator.init_trackers(Path(__file__).stem)
    run = TrainingRun(args, accelerator, unet, samples)
    for batch in run:
        noisy_latents = noise_scheduler.add_noise(batch["input"], batch["noise"], batch["timestep"])
        with accelerator.accumulate(run.model):
            prediction = run.model(
                noisy_latents,
                batch["timestep"],
                encoder_hidden_states=batch["prompt_embeds"],
                added_cond_kwargs={"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"]},
            ).sample
            loss = diffusion_loss(
                *(noise_scheduler, prediction, batch["input"], batch["noise"], batch["timestep"]), args.snr_gamma
            )
            run.optimize(loss)
        if args.validation_prompt is not None and run.epoch_due(args.validation_epochs):
            run.save_results(make_pipeline, draw, save_model=False)

    if not run.stopped:
        run.save_results(make_pipeline, draw, save_images=args.validation_prompt is not None)
    run.finish("text-to-image", base_model=args.pretrained_model_name_or_path)


if __name__ == "__main__":
    main(build_parser().parse_args())
