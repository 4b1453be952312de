"""Runs the training scripts as their users do: `accelerate launch`, in a process of its own."""

import csv
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from accelerate.state import AcceleratorState, PartialState

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
# `accelerate launch` starts several CPU processes only through MPI; torchrun starts them anywhere.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

TINY_UNET = {
    "_class_name": "ScaleLongUNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "add_attention": False,
}


TINY_UVIT = {
    "_class_name": "ScaleLongUViT2DModel",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "num_layers": 4,
    "num_attention_heads": 4,
    "hidden_size": 64,
}


ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true"}


def launch(script: str, *args: object, num_processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    launcher = LAUNCH if num_processes == 1 else [*TORCHRUN, str(num_processes)]
    command = [*launcher, str(ROOT / "training" / script), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "training" / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(script: str, *args: object) -> None:
    """Runs a script in this process: for command lines that it refuses, with an exception to look at."""
    with patch.object(sys, "argv", [script, *map(str, args)]):
        try:
            runpy.run_path(str(ROOT / "training" / script), run_name="__main__")
        finally:
            AcceleratorState._reset_state()
            PartialState._reset_state()


def losses(output_dir: Path) -> list[float]:
    with (output_dir / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]
