"""Fine-tunes Stable Diffusion with scaled long skip connections, or trains a U-ViT on its latents from scratch.

    accelerate launch training/train_text_to_image.py --pretrained_model_name_or_path FOLDER --train_data_dir IMAGES \
        --skip_scaling cs --kappa_warmup_steps 500

With `--model_config_name_or_path` the pretrained pipeline lends its VAE, text encoder and tokenizer alone. Flags and
defaults are those of Diffusers' `train_text_to_image.py`; `--skip_scaling`, `--kappa`, `--kappa_warmup_steps` and
`--ls_initial_gate` choose the scaling (arXiv 2310.13545).
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionPipeline

from diffusers_scalelong import ScaleLongPipeline, ScaleLongUViT2DModel
from diffusers_scalelong.diffusion_loss import diffusion_loss
from diffusers_scalelong.presets import model_from_config, parse_args_with_preset
from diffusers_scalelong.text_to_image import (
    add_text_to_image_arguments,
    check_base_pipeline,
    check_prompts,
    check_text_model,
    draw_validation_images,
    encode_batch,
    frozen_copy,
    latent_shape,
    load_base_pipeline,
    load_captioned_samples,
    load_scaled_unet,
    training_scheduler,
    weight_dtype,
)
from diffusers_scalelong.training_args import (
    add_data_arguments,
    add_output_arguments,
    add_scaling_arguments,
    add_training_arguments,
    check_args,
    kappa_argument,
    new_parser,
)
from diffusers_scalelong.training_run import TrainingRun
from diffusers_scalelong.training_setup import start_accelerator

VALIDATION_STEPS = 20  # as in Diffusers' example


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_text_to_image_arguments(parser)
    parser.add_argument("--model_config_name_or_path", help="Train this model from scratch: a preset or a config.")
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.0, help="How often a caption is dropped.")
    parser.add_argument("--validation_prompts", nargs="+", help="Texts to draw images of while training.")
    add_scaling_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser)
    parser.set_defaults(
        output_dir="sd-model-finetuned",
        resolution=512,
        image_interpolation_mode="lanczos",
        validation_epochs=5,
        num_validation_images=1,
    )
    return parser


def main(args: argparse.Namespace, model_config: dict | None) -> None:
    check_args(args)
    prompts = args.validation_prompts or []
    check_prompts(prompts)
    check_base_pipeline(args, StableDiffusionPipeline)
    accelerator = start_accelerator(args)

    # The model, the noise schedule, the frozen parts and the data
    base = load_base_pipeline(args, StableDiffusionPipeline)
    if model_config is None:
        model = load_scaled_unet(args)
    else:
        model = model_from_config(
            model_config,
            sample_size=latent_shape(base.vae, args.resolution)[-1],
            skip_scaling=args.skip_scaling,
            kappa=kappa_argument(args),
            ls_initial_gate=args.ls_initial_gate,
        )
    check_text_model(model, base)
    noise_scheduler = training_scheduler(base, args.prediction_type)
    vae, text_encoder = (
        frozen_copy(part, accelerator.device, weight_dtype(accelerator)) for part in (base.vae, base.text_encoder)
    )
    samples = load_captioned_samples(
        *(args, accelerator, base, noise_scheduler.config.num_train_timesteps),
        num_tokens=model.config.get("num_context_tokens"),  # of a U-ViT
        proportion_empty_prompts=args.proportion_empty_prompts,
    )

    # Results: the pipeline with its own frozen parts, samples with those of the training
    def make_pipeline(unet: ModelMixin, **parts: Any) -> DiffusionPipeline:
        components = base.components | {"unet": unet} | parts
        if isinstance(unet, ScaleLongUViT2DModel):
            names = ("unet", "scheduler", "vae", "text_encoder", "tokenizer")
            return ScaleLongPipeline(**{name: components[name] for name in names})
        return StableDiffusionPipeline(**components, requires_safety_checker=components["safety_checker"] is not None)

    def draw(pipeline: DiffusionPipeline, generator: torch.Generator) -> np.ndarray:
        sampler = make_pipeline(pipeline.unet, vae=vae, text_encoder=text_encoder, safety_checker=None)
        size = {} if isinstance(pipeline, ScaleLongPipeline) else {"height": args.resolution, "width": args.resolution}
        return draw_validation_images(
            *(accelerator, sampler, prompts, args.num_validation_images, generator),
            num_inference_steps=VALIDATION_STEPS,
            **size,
        )

    # Train
    accelerator.init_trackers(Path(__file__).stem)
    run = TrainingRun(args, accelerator, model, samples)
    for batch in run:
        latents, text = encode_batch(vae, text_encoder, batch)
        noisy_latents = noise_scheduler.add_noise(latents, batch["noise"], batch["timestep"])
        with accelerator.accumulate(run.model):
            prediction = run.model(noisy_latents, batch["timestep"], encoder_hidden_states=text).sample
            run.optimize(
                diffusion_loss(noise_scheduler, prediction, latents, batch["noise"], batch["timestep"], args.snr_gamma)
            )
        if prompts and run.epoch_due(args.validation_epochs):
            run.save_results(make_pipeline, draw, save_model=False, columns=args.num_validation_images)

    if not run.stopped:
        run.save_results(make_pipeline, draw, save_images=bool(prompts), columns=args.num_validation_images)
    run.finish("text-to-image", base_model=args.pretrained_model_name_or_path if model_config is None else None)


if __name__ == "__main__":
    main(*parse_args_with_preset(build_parser()))
