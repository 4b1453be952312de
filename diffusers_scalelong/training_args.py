"""The command-line flags that the training scripts share."""

import argparse

import torch

from .hub import add_hub_arguments, check_hub_args
from .skip_scaling import SKIP_SCALING_METHODS


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the first line of `description`, whose help shows the defaults."""
    return argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub name, local folder, parquet file, or 'digits' (needs no download).")
    group.add_argument("--dataset_config_name", help="The configuration of a dataset that has several.")
    group.add_argument("--train_data_dir", help="A folder of images. Ignored with --dataset_name.")
    group.add_argument("--image_column", default="image", help="The column that holds the images.")
    group.add_argument("--max_train_samples", type=int, help="Train on a random part of the dataset, of this size.")
    group.add_argument("--skip_bad_images", action="store_true", help="Leave out images that cannot be read.")
    group.add_argument("--streaming", action="store_true", help="Read the dataset while training; see the README.")
    group.add_argument("--shuffle_buffer_size", type=int, default=1000, help="Rows shuffled at a time in a stream.")
    group.add_argument("--cache_dir", help="Where downloaded models and datasets are kept.")
    group.add_argument("--resolution", type=int, default=64, help="Images are resized to this many pixels per side.")
    group.add_argument("--center_crop", action="store_true", help="Crop the middle instead of a random place.")
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    group.add_argument("--image_interpolation_mode", default="bilinear", help="Pillow's filter for resizing.")
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that load images.")


def add_scaling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scaling of the long skip connections (arXiv 2310.13545)")
    group.add_argument("--skip_scaling", choices=SKIP_SCALING_METHODS, help="The method.")
    group.add_argument("--kappa", type=float, nargs="+", help="κ; for 'uniform' also one per skip, shallowest first.")
    group.add_argument("--kappa_warmup_steps", type=int, default=0, help="Steps in which every κ_i moves from 1.")
    group.add_argument("--ls_initial_gate", type=float, help="Every gate of 'ls' starts at this value in (0, 1).")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--seed", type=int, default=0, help="Of weights, data order, augmentation and noise.")
    group.add_argument("--train_batch_size", type=int, default=16, help="Per device.")
    group.add_argument("--num_train_epochs", type=int, default=100)
    group.add_argument("--max_train_steps", type=int, help="Optimiser steps. Overrides --num_train_epochs.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--gradient_checkpointing", action="store_true", help="Less memory for more computation.")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="After the warm-up.")
    group.add_argument(
        "--scale_lr", action="store_true", help="Multiply it by processes, accumulation steps and batch size."
    )
    group.add_argument("--lr_scheduler", default="constant", help="linear, cosine, constant_with_warmup, …")
    group.add_argument("--lr_warmup_steps", type=int, default=500)
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=1e-2)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--use_8bit_adam", action="store_true", help="Needs bitsandbytes and a GPU.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    group.add_argument("--on_nan", choices=["stop", "skip"], default="stop", help="At a loss that is not finite.")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as in accelerate config.")
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and later.")
    group.add_argument("--compile", action="store_true", help="Compile the model with torch.compile.")
    group.add_argument("--channels_last", action="store_true", help="Keep images and weights as NHWC in memory.")
    group.add_argument("--use_ema", action="store_true", help="Sample from a moving average of the weights.")
    group.add_argument("--ema_inv_gamma", type=float, default=1.0)
    group.add_argument("--ema_power", type=float, default=3 / 4)
    group.add_argument("--ema_max_decay", type=float, default=0.9999)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", help="Pipeline, checkpoints and pictures go here.")
    group.add_argument("--overwrite_output_dir", action="store_true", help="Replace an earlier run in there.")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    group.add_argument("--checkpoints_total_limit", type=int, help="Keep this many checkpoints.")
    group.add_argument("--resume_from_checkpoint", help="'latest', or a checkpoint's path.")
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb or another tracker.")
    group.add_argument("--logging_dir", default="logs", help="Inside --output_dir.")
    add_hub_arguments(parser)


def add_ddpm_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a model that is trained from scratch on pixels, with the optimiser of Diffusers' example."""
    group = parser.add_argument_group("diffusion process and results")
    group.add_argument("--prediction_type", default="epsilon", choices=["epsilon", "sample", "v_prediction"])
    group.add_argument("--ddpm_num_steps", type=int, default=1000)
    group.add_argument("--ddpm_num_inference_steps", type=int, default=1000)
    group.add_argument("--ddpm_beta_schedule", default="linear")
    group.add_argument("--save_images_epochs", type=int, default=10, help="Epochs between sample grids.")
    group.add_argument("--save_model_epochs", type=int, default=10, help="Epochs between saved pipelines.")
    parser.set_defaults(lr_scheduler="cosine", adam_beta1=0.95, adam_weight_decay=1e-6)


# Integer flags that must be at least 1, in whichever script has them.
_AT_LEAST_ONE = (
    "resolution train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps eval_batch_size "
    "save_images_epochs save_model_epochs checkpointing_steps checkpoints_total_limit ddpm_num_steps "
    "ddpm_num_inference_steps max_train_samples shuffle_buffer_size validation_epochs num_validation_images rank "
    "num_classes num_samples_per_class"
)
_AT_LEAST_ZERO = "seed dataloader_num_workers kappa_warmup_steps lr_warmup_steps learning_rate noise_offset"
_PROBABILITIES = "proportion_empty_prompts class_dropout_prob"


def check_args(args: argparse.Namespace) -> None:
    """Finds what is wrong with a command line before anything is loaded.

    Raises:
        ValueError: a value out of range, or flags that contradict each other.
        ImportError: a flag needs a package that is not installed.
    """
    values = {name: value for name, value in vars(args).items() if value is not None}
    for names, accepts, expected in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (_AT_LEAST_ZERO, lambda value: value >= 0, "at least 0"),
        (_PROBABILITIES, lambda value: 0 <= value <= 1, "a probability"),
    ):
        for name in names.split():
            if name in values and not accepts(values[name]):
                raise ValueError(f"--{name} must be {expected}, but is {values[name]}.")
    if values.get("ddpm_num_inference_steps", 1) > values.get("ddpm_num_steps", 1):
        raise ValueError(
            f"--ddpm_num_inference_steps {args.ddpm_num_inference_steps} exceeds the {args.ddpm_num_steps} steps of "
            "--ddpm_num_steps."
        )
    if args.kappa_warmup_steps and args.skip_scaling in ("none", "ls", "ls_unshared"):
        raise ValueError(
            f"--kappa_warmup_steps moves constants, which --skip_scaling {args.skip_scaling} does not have: use 'cs' "
            "or 'uniform', or --ls_initial_gate 0.99 for a gentle start of 'ls'."
        )
    if args.streaming and args.max_train_steps is None:
        raise ValueError("The length of a stream is not known: --streaming needs --max_train_steps.")
    if args.streaming and args.max_train_samples is not None:
        raise ValueError("--max_train_samples picks from a whole dataset, which --streaming does not have.")
    check_hub_args(args)
    if args.use_8bit_adam:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ImportError("--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes") from error
        if not torch.cuda.is_available():
            raise ValueError("--use_8bit_adam needs a GPU, and there is none.")


def kappa_argument(args: argparse.Namespace) -> float | list[float] | None:
    """`--kappa` as a model takes it: one number alone, or the list."""
    return args.kappa[0] if args.kappa and len(args.kappa) == 1 else args.kappa
