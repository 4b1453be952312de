"""Checkpoints: whole or not at all, and never loaded when damaged."""

import json
import logging
import os
import resource
import subprocess
import sys

import pytest
from accelerate.state import PartialState

from diffusers_scalelong.checkpoints import (
    find_checkpoint,
    find_damage,
    list_checkpoints,
    read_state,
    remove_checkpoint,
    remove_leftovers,
    write_checkpoint,
)


@pytest.fixture(autouse=True)
def accelerate_state():
    PartialState(cpu=True)  # Accelerate's logger asks for it


def write(output_dir, step, contents=b"weights"):
    def write_files(folder):
        (folder / "unet").mkdir()
        (folder / "unet" / "model.bin").write_bytes(contents)
        (folder / "optimizer.bin").write_bytes(bytes(range(256)))

    return write_checkpoint(output_dir, step, write_files, {"step": step}, True, lambda: None)


def test_a_checkpoint_is_written_and_read(tmp_path):
    checkpoint = write(tmp_path, 7)
    assert checkpoint == tmp_path / "checkpoint-7"
    assert find_damage(checkpoint) is None
    assert read_state(checkpoint) == {"step": 7}
    assert os.listdir(tmp_path) == ["checkpoint-7"]
    replaced = write(tmp_path, 7, b"other")
    assert (replaced / "unet" / "model.bin").read_bytes() == b"other"
    assert os.listdir(tmp_path) == ["checkpoint-7"]


def test_checkpoints_are_ordered_by_step(tmp_path):
    for step in (1000, 90):
        write(tmp_path, step)
    for name in (".checkpoint-2000.partial", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-90", "checkpoint-1000"]
    assert find_checkpoint(str(tmp_path), "latest").name == "checkpoint-1000"
    assert find_checkpoint(str(tmp_path), "checkpoint-90") == tmp_path / "checkpoint-90"
    assert find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-90")) == tmp_path / "checkpoint-90"
    with pytest.raises(OSError, match=r"no checkpoint checkpoint-91.*checkpoint-90, checkpoint-1000"):
        find_checkpoint(str(tmp_path), "checkpoint-91")
    assert find_checkpoint(str(tmp_path / "empty"), "latest") is None


DAMAGE = {
    "cut": lambda c: (c / "unet" / "model.bin").write_bytes(b"weigh"),
    "flipped": lambda c: (c / "unet" / "model.bin").write_bytes(b"weightz"),
    "lost": lambda c: (c / "optimizer.bin").unlink(),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "half a manifest": lambda c: (c / "manifest.json").write_text('{"optim'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_latest_skips_a_damaged_checkpoint(tmp_path, damage, caplog):
    for step in (3, 6, 9):
        write(tmp_path, step)
    DAMAGE[damage](tmp_path / "checkpoint-9")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "latest").name == "checkpoint-6"
    assert "checkpoint-9" in caplog.text
    with pytest.raises(OSError, match=r"checkpoint-9 is damaged"):
        find_checkpoint(tmp_path, "checkpoint-9")
    for step in (3, 6):
        DAMAGE[damage](tmp_path / f"checkpoint-{step}")
    with pytest.raises(OSError, match="Every checkpoint"):
        find_checkpoint(tmp_path, "latest")


def test_a_failed_write_keeps_the_earlier_checkpoints(tmp_path):
    write(tmp_path, 3)

    def fail(folder):
        (folder / "half").write_bytes(b"h")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(OSError, match=r"checkpoint-6 could not be written: Pytorch.*checkpoint-3"):
        write_checkpoint(tmp_path, 6, fail, {}, True, lambda: None)
    assert os.listdir(tmp_path) == ["checkpoint-3"]
    assert find_damage(tmp_path / "checkpoint-3") is None


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    write(tmp_path, 3)
    for name in (".checkpoint-6.partial", ".checkpoint-1.removed"):
        (tmp_path / name / "unet").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-3"]
    remove_checkpoint(tmp_path / "checkpoint-3")
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import os, sys, torch
from accelerate import Accelerator
from diffusers_scalelong import ScaleLongUNet2DModel
from diffusers_scalelong.checkpoints import write_checkpoint
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(200, 200)
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer = accelerator.prepare(model, optimizer)
model(torch.ones(1, 200)).sum().backward()
optimizer.step()
try:
    write_checkpoint(sys.argv[1], 6, lambda folder: accelerator.save_state(str(folder)), {}, True, lambda: None)
except OSError as error:
    print(error)
"""


def test_a_full_disk_names_the_path_and_keeps_the_old_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True)
    limits = {}
    if mounted.returncode != 0:  # without the right to mount: a limit on the size of a file
        limits["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        write(disk, 3)
        command = [sys.executable, "-c", FULL_DISK, str(disk)]
        result = subprocess.run(command, capture_output=True, text=True, **limits)
        assert result.returncode == 0, result.stderr[-2000:]
        assert f"{disk}/checkpoint-6 could not be written" in result.stdout
        assert "checkpoint-3" in result.stdout
        assert os.listdir(disk) == ["checkpoint-3"]
        assert find_damage(disk / "checkpoint-3") is None
        assert json.loads((disk / "checkpoint-3" / "training_state.json").read_text()) == {"step": 3}
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", disk], check=True)
