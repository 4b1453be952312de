"""A run that is stopped and resumed equals one that never stopped, bit for bit; many processes equal one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from images import write_images
from safetensors.torch import load_file
from scripts import ENVIRONMENT, ROOT, TINY_UNET, launch, losses

from diffusers_scalelong.checkpoints import list_checkpoints

SCRIPT = "train_unconditional.py"


@pytest.fixture
def tiny(tmp_path):
    """Flags of a run that takes seconds."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY_UNET))
    return [
        *("--model_config_name_or_path", config, "--train_batch_size", 8, "--ddpm_num_inference_steps", 1),
        *("--eval_batch_size", 1, "--seed", 0, "--cache_dir", tmp_path / "cache", "--lr_warmup_steps", 2),
        *("--use_ema", "--lr_scheduler", "constant_with_warmup"),
    ]


def state(checkpoint):
    """Weights, moving average and optimiser state of a checkpoint."""
    tensors = {}
    for folder in ("unet", "unet_ema"):
        weights = load_file(checkpoint / folder / "diffusion_pytorch_model.safetensors")
        tensors |= {f"{folder} {key}": value for key, value in weights.items()}
    for index, values in torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"].items():
        tensors |= {f"optimizer {index} {key}": value for key, value in values.items()}
    return tensors


def assert_same_run(first, second):
    assert losses(first) == losses(second)
    one, other = state(list_checkpoints(first)[-1]), state(list_checkpoints(second)[-1])
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_killed_at_random_moments(tmp_path):
    environment = ENVIRONMENT | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, str(ROOT / "tests" / "stress.py"), "--kills", "5"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "5 kills in" in result.stdout
    assert "bit-identical" in result.stdout


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_a_clean_exit(tmp_path, tiny, stop):
    write_images(tmp_path / "data", 40, size=(12, 10))
    flags = [
        *(*tiny, "--train_data_dir", tmp_path / "data", "--skip_scaling", "ls", "--random_flip"),
        *("--gradient_accumulation_steps", 2, "--dataloader_num_workers", 2, "--checkpointing_steps", 1000),
    ]
    command = [
        sys.executable,
        str(ROOT / "training" / SCRIPT),
        *map(str, flags),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    with (tmp_path / "log").open("w") as log:
        # In a group of its own, so that the workers get the signal too, as they do from a scheduler.
        process = subprocess.Popen(
            [*map(str, command), "--max_train_steps", "100000"], stderr=log, env=ENVIRONMENT, start_new_session=True
        )
        record = tmp_path / "run" / "loss.csv"
        while process.poll() is None and not (record.exists() and record.read_bytes().count(b"\n") > 4):
            time.sleep(0.01)
        os.killpg(process.pid, stop)
        assert process.wait() == 0, (tmp_path / "log").read_text()[-4000:]
    assert "Continue with --resume_from_checkpoint latest" in (tmp_path / "log").read_text()
    steps = len(losses(tmp_path / "run"))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{steps}"]
    assert not (tmp_path / "run" / "model_index.json").exists()

    end = ["--max_train_steps", steps + 3]
    launch(SCRIPT, *flags, *end, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    launch(SCRIPT, *flags, *end, "--output_dir", tmp_path / "straight")
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_stream_resumes_exactly(tmp_path, tiny):
    flags = [
        *(SCRIPT, *tiny, "--dataset_name", "digits", "--streaming", "--shuffle_buffer_size", 50),
        *("--skip_scaling", "cs", "--dataloader_num_workers", 2, "--checkpointing_steps", 9, "--random_flip"),
    ]
    launch(*flags, "--max_train_steps", 14, "--output_dir", tmp_path / "straight")
    launch(*flags, "--max_train_steps", 9, "--output_dir", tmp_path / "stopped")
    launch(
        *(*flags, "--max_train_steps", 14, "--output_dir", tmp_path / "stopped"),
        *("--resume_from_checkpoint", "latest"),
    )
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("scaling", [("ls",), ("cs", "--kappa_warmup_steps", 3)], ids=["ls", "kappa warm-up"])
def test_two_processes_train_what_one_does_and_resume(tmp_path, tiny, scaling):
    flags = [SCRIPT, *tiny, "--dataset_name", "digits", "--skip_scaling", *scaling, "--checkpointing_steps", 2]

    def run(name, batch_size, accumulation, num_processes, *more, steps=4):
        launch(
            *(*flags, "--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation),
            *("--output_dir", tmp_path / name, "--max_train_steps", steps, *more),
            num_processes=num_processes,
        )
        return tmp_path / name

    whole = run("whole", 16, 1, 1)
    two = run("two", 8, 1, 2)
    accumulated = run("accumulated", 8, 2, 1)
    for split in (two, accumulated):
        assert losses(split) == pytest.approx(losses(whole), rel=1e-4)
        expected, actual = state(whole / "checkpoint-4"), state(split / "checkpoint-4")
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-3, atol=2e-5, msg=key)
    assert len(list((two / "checkpoint-4").glob("random_states_*.pkl"))) == 2

    stopped = run("stopped", 8, 1, 2, steps=2)
    run("stopped", 8, 1, 2, "--resume_from_checkpoint", "latest")
    assert_same_run(stopped, two)
    if scaling[0] == "ls":
        other = launch(
            *(*flags, "--output_dir", stopped, "--max_train_steps", 6, "--resume_from_checkpoint", "latest"),
            check=False,
        )
        assert other.returncode != 0
        assert "processes was 2 and is 1" in other.stderr
