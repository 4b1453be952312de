"""Runs the training scripts as their users do: `accelerate launch`, in a process of its own."""

import csv
import os
import subprocess
import sys
from pathlib import Path

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


def launch(script: str, *args: object, num_processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    launcher = LAUNCH if num_processes == 1 else [*TORCHRUN, str(num_processes)]
    command = [*launcher, str(ROOT / "training" / script), *map(str, args)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result


def losses(output_dir: Path) -> list[float]:
    with (output_dir / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]
