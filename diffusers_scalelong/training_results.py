"""What a training run leaves behind: pipelines and sample grids, replaced only when the new ones are complete."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from .checkpoints import flush_folder
from .plots import save_image_grid


def save_pipeline(pipeline: DiffusionPipeline, output_dir: str) -> None:
    """Saves a pipeline as `save_aside` does."""
    save_aside(output_dir, pipeline.save_pretrained)


def save_aside(output_dir: str, save: Callable[[Path], None]) -> None:
    """Saves into a folder that may hold older results: each file or folder is replaced when all are complete.

    Args:
        output_dir: the folder.
        save: writes the results into the folder that it is given.

    Raises:
        OSError: they could not be written; the older ones are intact.
    """
    partial = Path(output_dir) / ".results.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save(partial)
        flush_folder(partial)
    except Exception as error:  # PyTorch and safetensors have their own kinds for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"The results could not be saved in {output_dir}: {error}") from error
    for new in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):
        old = Path(output_dir) / new.name
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(new, old)
    partial.rmdir()


def save_samples(
    images: np.ndarray, output_dir: str, step: int, columns: int | None, accelerator: Accelerator
) -> None:
    """Saves samples as a grid, `samples.png` and `samples/step-STEP.png`, and shows them to the trackers.

    Args:
        images: (number, height, width, channels) in [0, 1].
        output_dir: of the run.
        step: optimiser steps done.
        columns: images in a row of the grid; `None` for a grid as square as possible.
        accelerator: of the run; only its main process may call.
    """
    folder = Path(output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    save_image_grid(images, folder / f"step-{step:07d}.png", columns=columns)
    save_image_grid(images, Path(output_dir) / "samples.png", columns=columns)
    pixels = (images * 255).round().astype(np.uint8)
    pixels = pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels}, step=step, **options)
