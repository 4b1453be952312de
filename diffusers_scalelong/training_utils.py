"""What the training scripts share: presets, checkpoints and the record of the loss."""

import argparse
import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel

logger = get_logger(__name__)


def load_preset(name_or_path: str, cache_dir: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model's config: a JSON file, a folder with a `config.json`, or a model on the Hub.

    Args:
        name_or_path: of the config. A JSON file may also hold a dictionary `"training"`: values for the script's
            flags, which take the place of their defaults.
        cache_dir: where files from the Hub are kept.

    Returns:
        The model's config and the training flags (empty when there are none).

    Raises:
        OSError: there is no such file, or it is not JSON.
    """
    path = Path(name_or_path)
    if not path.is_file():
        return diffusers.UNet2DModel.load_config(name_or_path, cache_dir=cache_dir), {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is not a valid JSON file: {error}") from error
    if not isinstance(config, dict):
        raise OSError(f"{path} must hold a JSON object with a model's config.")
    return config, config.pop("training", {})


def parse_args_with_preset(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Parses the command line; flags that a preset sets take the place of the parser's defaults.

    Returns:
        The arguments, and the model's config or `None` without `--model_config_name_or_path`.

    Raises:
        OSError: as in `load_preset`.
        ValueError: the preset sets a flag that the script does not have.
    """
    args = parser.parse_args()
    if args.model_config_name_or_path is None:
        return args, None
    config, flags = load_preset(args.model_config_name_or_path, args.cache_dir)
    unknown = sorted(flags.keys() - vars(args).keys())
    if unknown:
        raise ValueError(
            f"{args.model_config_name_or_path} is no preset for this script: it sets --{', --'.join(unknown)}, which "
            "the script does not have."
        )
    if isinstance(config.get("sample_size"), int):
        parser.set_defaults(resolution=config["sample_size"])
    parser.set_defaults(**flags)
    return parser.parse_args(), config


def model_from_config(config: dict[str, Any], **overrides: Any) -> ModelMixin:
    """Builds a model of this package from a config; `_class_name` chooses the class.

    Args:
        config: of a `UNet2DModel`, `UNet2DConditionModel` or a model of this package.
        **overrides: values that replace the config's; `None` leaves the config's value.

    Raises:
        ValueError: the config names no class, or one that has no scaled version; invalid values.
    """
    import diffusers_scalelong

    name = str(config.get("_class_name"))
    cls = getattr(diffusers_scalelong, name if name.startswith("ScaleLong") else f"ScaleLong{name}", None)
    if cls is None:
        raise ValueError(
            f"The model config names the class {name!r}, but training needs one of UNet2DModel, "
            "UNet2DConditionModel, ScaleLongUNet2DModel, ScaleLongUNet2DConditionModel or ScaleLongUViT2DModel as its "
            "`_class_name`."
        )
    return cls.from_config(config, **{key: value for key, value in overrides.items() if value is not None})


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


def list_checkpoints(output_dir: str) -> list[Path]:
    """The folders `checkpoint-STEP` in `output_dir`, oldest step first."""
    checkpoints = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(checkpoints, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimiser step after which `checkpoint-STEP` was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(output_dir: str, resume_from_checkpoint: str) -> Path | None:
    """The checkpoint to resume from.

    Args:
        output_dir: of the run.
        resume_from_checkpoint: `"latest"`, or a checkpoint's path or its name inside `output_dir`.

    Returns:
        Its folder; `None` for `"latest"` when there is none yet.

    Raises:
        OSError: the named checkpoint does not exist.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        return checkpoints[-1] if checkpoints else None
    for candidate in (Path(resume_from_checkpoint), Path(output_dir) / resume_from_checkpoint):
        if candidate.is_dir():
            return candidate
    known = ", ".join(path.name for path in checkpoints) or "none"
    raise OSError(f"There is no checkpoint {resume_from_checkpoint}. In {output_dir}: {known}.")


def save_checkpoint(accelerator: Accelerator, output_dir: str, step: int, total_limit: int | None = None) -> None:
    """Saves the training state as `checkpoint-STEP`, whole or not at all, then removes the oldest beyond the limit.

    Args:
        accelerator: with everything prepared and `register_model_hooks` called. Every process must call.
        output_dir: of the run.
        step: optimiser steps done.
        total_limit: how many checkpoints to keep; `None` keeps all.
    """
    target = Path(output_dir) / f"checkpoint-{step}"
    partial = target.with_name(f".{target.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
        logger.info(f"Saved the training state to {target}")


def register_model_hooks(accelerator: Accelerator, ema_model: EMAModel | None) -> None:
    """Makes checkpoints hold the model, and its moving average, in Diffusers' format (`unet`, `unet_ema`)."""

    def save(models: list[torch.nn.Module], weights: list, output_dir: str) -> None:
        while weights:  # Accelerate saves what is left in here by itself
            weights.pop()
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save_pretrained(os.path.join(output_dir, "unet"))
            if ema_model is not None:
                ema_model.save_pretrained(os.path.join(output_dir, "unet_ema"))

    def load(models: list[torch.nn.Module], input_dir: str) -> None:
        model = accelerator.unwrap_model(models.pop())
        stored = type(model).from_pretrained(input_dir, subfolder="unet")
        differing = [key for key, value in _model_keys(stored).items() if _model_keys(model).get(key) != value]
        if differing:
            raise ValueError(
                f"{input_dir} was saved by another model: {', '.join(sorted(differing))} differ. Resume with the "
                "arguments of the interrupted run, or start a new one in another --output_dir."
            )
        model.load_state_dict(stored.state_dict())
        if ema_model is not None:
            stored_ema = EMAModel.from_pretrained(os.path.join(input_dir, "unet_ema"), type(model))
            ema_model.load_state_dict(stored_ema.state_dict())
            ema_model.to(accelerator.device)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _model_keys(model: ModelMixin) -> dict[str, Any]:
    # As JSON, so that tuples and lists are alike.
    return {key: json.dumps(value) for key, value in model.config.items() if not key.startswith("_")}


class LossRecord:
    """The loss of every optimiser step, in a CSV file that survives interruptions.

    Args:
        path: of the file; rows are appended to it.
        last_step: drop the rows after this step: a resumed run computes them again.
    """

    def __init__(self, path: str | Path, last_step: int = 0) -> None:
        self.path = Path(path)
        self.steps: list[int] = []
        self.losses: list[float] = []
        rows = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row[0].isdigit() and int(row[0]) <= last_step]
        self._file = self.path.open("w", newline="", buffering=1)
        self._writer = csv.writer(self._file)
        self._writer.writerow(["step", "loss", "learning_rate"])
        for step, loss, learning_rate in rows:
            self.append(int(step), float(loss), float(learning_rate))

    def append(self, step: int, loss: float, learning_rate: float) -> None:
        self.steps.append(step)
        self.losses.append(loss)
        self._writer.writerow([step, repr(loss), repr(learning_rate)])

    def close(self) -> None:
        self._file.close()
