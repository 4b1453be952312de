"""The start of a training run: the output folder, Accelerate, logging and seed, the optimiser."""

import argparse
import logging
import os
import shutil
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed

from .checkpoints import list_checkpoints

logger = get_logger(__name__, log_level="INFO")


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """Checks `--output_dir`, then sets up Accelerate, logging, TF32 and the seed.

    Raises:
        OSError: as in `check_output_dir`.
        ValueError: `--on_nan skip` with DeepSpeed.
    """
    check_output_dir(args.output_dir, bool(args.resume_from_checkpoint), args.overwrite_output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # Batches run across the ends of epochs, so accumulation does too.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, args.logging_dir)
        ),
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and args.on_nan == "skip":
        raise ValueError("--on_nan skip is not possible with DeepSpeed, which steps before the loss can be looked at.")
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        level=logging.INFO if accelerator.is_local_main_process else logging.ERROR,
    )
    for client in ("httpx", "httpx2"):  # of the Hub: a line for each request
        logging.getLogger(client).setLevel(logging.WARNING)
    logger.info(accelerator.state, main_process_only=False)
    datasets.utils.logging.set_verbosity_warning()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    set_seed(args.seed)
    return accelerator


def check_output_dir(output_dir: str, resume: bool, overwrite: bool) -> None:
    """Makes sure that a new run will not mix with an older run's files. Changes none of them.

    Args:
        output_dir: created if it does not exist.
        resume: the run continues what is there.
        overwrite: the run replaces what is there, with `remove_earlier_run`.

    Raises:
        OSError: the folder holds a run and neither `resume` nor `overwrite` is set, or it is not writable.
    """
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output_dir {output_dir} cannot be created: {error}") from error
    if not os.access(path, os.W_OK):
        raise OSError(f"--output_dir {output_dir} is not writable.")
    earlier = [*list_checkpoints(output_dir), *path.glob("model_index.json"), *path.glob("loss.csv")]
    if earlier and not resume and not overwrite:
        raise OSError(
            f"--output_dir {output_dir} already holds a training run ({earlier[0].name}). Continue it with "
            "--resume_from_checkpoint latest, replace it with --overwrite_output_dir, or choose another folder."
        )


def remove_earlier_run(output_dir: str) -> None:
    """Removes the checkpoints and the loss record of an earlier run, when everything else is ready to start."""
    for checkpoint in list_checkpoints(output_dir):
        shutil.rmtree(checkpoint)
    (Path(output_dir) / "loss.csv").unlink(missing_ok=True)


def make_optimizer(
    args: argparse.Namespace, parameters: list[torch.nn.Parameter], learning_rate: float, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW with the flags of `training_args`, fused where PyTorch can; or 8-bit AdamW."""
    options = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=device.type in ("cpu", "cuda"), **options)
