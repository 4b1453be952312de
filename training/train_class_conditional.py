"""Trains a class-conditional diffusion model (DDPM), for classifier-free guidance, with scaled long skip connections.

    accelerate launch training/train_class_conditional.py --dataset_name digits --resolution 32 --skip_scaling cs

The model is a UNet or a U-ViT. Flags and defaults are those of `train_unconditional.py`, with the classes besides.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.logging import get_logger
from diffusers import DDPMScheduler, ModelMixin

from diffusers_scalelong import ScaleLongPipeline
from diffusers_scalelong.conditions import ClassLabels
from diffusers_scalelong.diffusion_data import DiffusionTransform, load_rows, make_samples
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

logger = get_logger(__name__, log_level="INFO")

MAX_SAMPLED_CLASSES = 10  # rows of the sample grid


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--model_config_name_or_path", help="Preset or config of the model; default: Diffusers' DDPM.")
    classes = parser.add_argument_group("classes")
    classes.add_argument("--label_column", default="label", help="The column that holds the class, an integer.")
    classes.add_argument("--num_classes", type=int, help="Default: what the dataset says of its label column.")
    classes.add_argument(
        "--class_dropout_prob", type=float, default=0.1, help="How often the class is hidden; guidance needs it."
    )
    classes.add_argument("--num_samples_per_class", type=int, default=4, help="Images in a row of the sample grid.")
    classes.add_argument("--guidance_scale", type=float, default=1.0, help="Of the samples; up to 1: no guidance.")
    add_scaling_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_ddpm_arguments(parser)
    add_output_arguments(parser)
    parser.set_defaults(output_dir="class-conditional-model")
    return parser


def count_classes(
    dataset: datasets.Dataset | datasets.IterableDataset, label_column: str, num_classes: int | None
) -> int:
    """The number of classes, given or the dataset's; checks the labels, which in a stream are seen only later."""
    feature = (dataset.features or {}).get(label_column)
    if num_classes is None:
        if not isinstance(feature, datasets.ClassLabel):
            raise ValueError(
                f"The dataset does not say how many classes its column {label_column!r} has (its type is {feature}): "
                "pass --num_classes, or choose another --label_column."
            )
        num_classes = feature.num_classes
    if isinstance(dataset, datasets.Dataset):
        labels = dataset.select_columns([label_column]).unique(label_column)
        wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < num_classes]
        if wrong:
            raise ValueError(
                f"Column {label_column!r} must hold integers in [0, {num_classes}), but has {wrong[0]!r}. Correct the "
                "dataset or --num_classes."
            )
    return num_classes


def main(args: argparse.Namespace, model_config: dict | None) -> None:
    check_args(args)
    if args.guidance_scale > 1 and args.class_dropout_prob == 0:
        raise ValueError(
            f"--guidance_scale {args.guidance_scale} needs a model that knows images without a class: set "
            "--class_dropout_prob above 0, or leave guidance out."
        )
    accelerator = start_accelerator(args)

    # Classes; the last embedding is the null class, for the images whose class is hidden
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    dataset = load_rows(args, accelerator, columns)
    num_classes = count_classes(dataset, args.label_column, args.num_classes)
    num_class_embeds = num_classes + (args.class_dropout_prob > 0)
    logger.info(f"Classes: {num_classes}, and {'a' if args.class_dropout_prob else 'no'} null class")

    # Model and noise scheduler
    model = model_from_config(
        model_config or DEFAULT_UNET,
        sample_size=args.resolution,
        num_class_embeds=num_class_embeds,
        skip_scaling=args.skip_scaling,
        kappa=kappa_argument(args),
        ls_initial_gate=args.ls_initial_gate,
    )
    check_model(model, args.resolution, takes_labels=True)
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
        condition=ClassLabels(args.label_column, num_classes, args.class_dropout_prob),
        num_train_timesteps=args.ddpm_num_steps,
    )
    samples = make_samples(args, accelerator, transform, dataset)

    # Samples: a row for each class, or for some, spread evenly
    sampled = np.linspace(0, num_classes - 1, min(num_classes, MAX_SAMPLED_CLASSES)).round().astype(int)
    logger.info(f"Rows of the sample grid: the classes {', '.join(map(str, sampled))}")

    def make_pipeline(unet: ModelMixin) -> ScaleLongPipeline:
        return ScaleLongPipeline(unet=unet, scheduler=noise_scheduler)

    def draw(pipeline: ScaleLongPipeline, generator: torch.Generator) -> np.ndarray:
        return pipeline(
            class_labels=sampled.repeat(args.num_samples_per_class).tolist(),
            guidance_scale=args.guidance_scale,
            generator=generator,
            num_inference_steps=args.ddpm_num_inference_steps,
            output_type="np",
        ).images

    # Train
    accelerator.init_trackers(Path(__file__).stem)
    run = TrainingRun(args, accelerator, model, samples)
    for batch in run:
        noisy_images = noise_scheduler.add_noise(batch["input"], batch["noise"], batch["timestep"])
        with accelerator.accumulate(run.model):
            prediction = run.model(noisy_images, batch["timestep"], class_labels=batch["class_label"]).sample
            run.optimize(
                diffusion_loss(noise_scheduler, prediction, batch["input"], batch["noise"], batch["timestep"])
            )
        save_images, save_model = run.epoch_due(args.save_images_epochs), run.epoch_due(args.save_model_epochs)
        if save_images or save_model:
            run.save_results(make_pipeline, draw, save_images, save_model, columns=args.num_samples_per_class)

    if not run.stopped:
        run.save_results(make_pipeline, draw, columns=args.num_samples_per_class)
    run.finish("class-conditional")


if __name__ == "__main__":
    main(*parse_args_with_preset(build_parser()))
