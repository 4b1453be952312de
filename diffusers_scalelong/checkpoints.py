"""Checkpoints that appear whole or not at all, and are checked before they are loaded."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

logger = get_logger(__name__)

_STATE = "training_state.json"
_MANIFEST = "manifest.json"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-STEP` in `output_dir`, oldest step first."""
    checkpoints = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(checkpoints, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimiser step after which `checkpoint-STEP` was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str) -> Path | None:
    """The checkpoint to resume from, undamaged.

    Args:
        output_dir: of the run.
        resume_from_checkpoint: `"latest"`, or a checkpoint's path or its name inside `output_dir`. `"latest"` skips
            damaged checkpoints with a warning.

    Returns:
        Its folder; `None` for `"latest"` when there is none yet.

    Raises:
        OSError: the named checkpoint does not exist or is damaged, or every checkpoint is.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        for checkpoint in reversed(checkpoints):
            damage = find_damage(checkpoint)
            if damage is None:
                return checkpoint
            logger.warning(f"Skipping the damaged checkpoint {checkpoint}: {damage}.", main_process_only=False)
        if checkpoints:
            raise OSError(
                f"Every checkpoint in {output_dir} is damaged, so there is nothing to resume from. Start anew in "
                "another --output_dir, or with --overwrite_output_dir."
            )
        return None
    for candidate in (Path(resume_from_checkpoint), Path(output_dir) / resume_from_checkpoint):
        if candidate.is_dir():
            damage = find_damage(candidate)
            if damage is not None:
                raise OSError(f"The checkpoint {candidate} is damaged: {damage}. Resume from another one.")
            return candidate
    known = ", ".join(path.name for path in checkpoints) or "none"
    raise OSError(f"There is no checkpoint {resume_from_checkpoint}. In {output_dir}: {known}.")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, by their sizes and SHA-256 sums; `None` when nothing is."""
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{_MANIFEST} is missing or cannot be read"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"] or _sha256(path) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def write_checkpoint(
    output_dir: str | Path,
    step: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    is_main_process: bool,
    wait_for_everyone: Callable[[], None],
) -> Path:
    """Writes `checkpoint-STEP`: aside, flushed to the disk, then renamed. Every process must call.

    Args:
        output_dir: of the run.
        step: optimiser steps done.
        write: called by every process with the folder to write into.
        state: JSON values that `read_state` gives back.
        is_main_process: whether this process is the one that renames.
        wait_for_everyone: a barrier between the processes.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written, on a full disk for example; the earlier checkpoints are as they were.
    """
    target = Path(output_dir) / f"checkpoint-{step}"
    partial = target.with_name(f".{target.name}.partial")
    if is_main_process:
        remove_leftovers(output_dir)
        partial.mkdir()
    wait_for_everyone()
    try:
        write(partial)
        wait_for_everyone()
        if is_main_process:
            _write_json(partial / _STATE, state)
            files = {
                path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            _write_json(partial / _MANIFEST, files)
            flush_folder(partial)
            if target.exists():  # of a run that was resumed from before it
                remove_checkpoint(target)
            partial.rename(target)
            _flush(target.parent)
    except Exception as error:  # PyTorch and safetensors have their own kinds for a full disk
        if is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        kept = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
        raise OSError(
            f"The checkpoint {target} could not be written: {error}. The earlier checkpoints are intact ({kept}): "
            "make room, then continue with --resume_from_checkpoint latest."
        ) from error
    wait_for_everyone()
    return target


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that `write_checkpoint` was given."""
    return json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint; one that cannot be removed is a warning, for training matters more."""
    removed = checkpoint.with_name(f".{checkpoint.name}.removed")  # a kill on the way leaves no half checkpoint
    try:
        checkpoint.rename(removed)
        shutil.rmtree(removed)
    except OSError as error:
        logger.warning(f"The old checkpoint {checkpoint} could not be removed: {error}")


def remove_leftovers(output_dir: str | Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for pattern in (".checkpoint-*.partial", ".checkpoint-*.removed"):
        for leftover in Path(output_dir).glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Writes a folder's files, and their names, to the disk through the system's buffers."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # not every system can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
