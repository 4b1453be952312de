"""`--on_nan`: what a run does at a loss or a gradient that is not finite. The data hold real NaNs.

The test of two processes starts this file under torchrun.
"""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file
from scripts import ENVIRONMENT, ROOT, TINY_UNET, TORCHRUN, load_script, start
from torch.nn import functional as F

from diffusers_scalelong.diffusion_data import DiffusionDataset, RunSampler
from diffusers_scalelong.presets import model_from_config
from diffusers_scalelong.training_run import TrainingRun
from diffusers_scalelong.training_setup import start_accelerator

NUM_SAMPLES, BATCH_SIZE = 16, 4  # 4 steps an epoch
# What is wrong with one sample, which is in the second step of the first epoch and once in the second epoch
ORDER = [index for _, index in RunSampler(NUM_SAMPLES, 8, BATCH_SIZE)]
BAD_SAMPLE = ORDER[7]
BAD_STEPS = [position // BATCH_SIZE + 1 for position, index in enumerate(ORDER) if index == BAD_SAMPLE]
KINDS = ["NaN in the image", "infinite gradient"]


@pytest.fixture(autouse=True)
def clean_up() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    reset()


def reset() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def transform(row: dict[str, Any], random: np.random.Generator) -> dict[str, torch.Tensor]:
    image = torch.from_numpy(random.standard_normal((1, 8, 8), dtype=np.float32))
    if row["bad"] == KINDS[0]:
        image[0, 3, 3] = math.nan
    return {"input": image, "steep": torch.tensor(row["bad"] == KINDS[1])}


def draw(pipeline: DDPMPipeline, generator: torch.Generator) -> np.ndarray:
    return pipeline(generator=generator, num_inference_steps=1, output_type="np").images


class Trained:
    """A run of a tiny UNet to its end, with its weights and moving average after each step."""

    def __init__(self, output_dir: Path, bad: str, *flags: object, batch_size: int = BATCH_SIZE) -> None:
        script = load_script("train_unconditional.py")
        args = script.build_parser().parse_args(
            [
                *("--output_dir", str(output_dir), "--train_batch_size", str(batch_size), "--use_ema"),
                *("--lr_scheduler", "constant", "--learning_rate", "1e-3", "--train_data_dir", "made-here"),
                *map(str, flags),
            ]
        )
        bad_column = [bad if index == BAD_SAMPLE else None for index in range(NUM_SAMPLES)]
        rows = datasets.Dataset.from_dict({"bad": bad_column})
        accelerator = start_accelerator(args)
        model = model_from_config(TINY_UNET, skip_scaling="ls")
        self.run = TrainingRun(args, accelerator, model, DiffusionDataset(rows, transform))
        self.snapshots = [self.weights()]
        self.error: str | None = None
        self.saw_bad_batch = False
        for batch in self.run:
            self.saw_bad_batch |= bool(batch["input"].isnan().any() or batch["steep"].any())
            with accelerator.accumulate(self.run.model):
                output = self.run.model(batch["input"], torch.zeros(len(batch["input"]))).sample
                loss = F.mse_loss(output, batch["input"])
                if batch["steep"].any():
                    loss = loss + (output - output.detach()).sum().sqrt()  # +0, with an infinite slope
                try:
                    self.run.optimize(loss)
                except FloatingPointError as error:
                    self.error = str(error)
                    break
                finally:
                    self.snapshots.append(self.weights())
        if self.error is None:
            self.run.save_results(lambda unet: DDPMPipeline(unet, DDPMScheduler()), draw)
            self.run.finish("unconditional")
        reset()

    def weights(self) -> torch.Tensor:
        assert self.run.ema is not None
        tensors = [*self.run.model.parameters(), *self.run.ema.shadow_params]
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    def changed(self) -> list[int]:
        """The steps that have changed the weights."""
        pairs = zip(self.snapshots, self.snapshots[1:], strict=False)
        return [step for step, (before, after) in enumerate(pairs, 1) if not torch.equal(before, after)]


def checkpoint_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")


def skipped(checkpoint: Path) -> int:
    return json.loads((checkpoint / "training_state.json").read_text())["skipped_steps"]


def test_the_bad_sample_is_in_one_step_of_each_epoch():
    assert len(BAD_STEPS) == 2
    assert BAD_STEPS[0] == 2
    assert 5 <= BAD_STEPS[1] <= 8


@pytest.mark.parametrize("bad", KINDS)
def test_stop(tmp_path, bad):
    trained = Trained(tmp_path, bad, "--max_train_steps", 8, "--checkpointing_steps", 1)
    assert trained.error is not None
    assert "At step 2 the loss is" in trained.error
    assert ("loss is nan" in trained.error) == (bad == KINDS[0])
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-1'}." in trained.error
    assert "--on_nan skip" in trained.error
    # The bad step has changed nothing, and what it would have spoilt is in the checkpoint.
    assert trained.changed() == [1]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    model = trained.run.accelerator.unwrap_model(trained.run.model).state_dict()
    assert all(torch.equal(model[key], value) for key, value in checkpoint_weights(tmp_path / "checkpoint-1").items())
    assert trained.run.loss_record.steps == [1]


@pytest.mark.parametrize("bad", KINDS)
def test_skip_leaves_the_steps_out_and_counts_them(tmp_path, bad):
    flags = ("--on_nan", "skip", "--checkpointing_steps", 3)
    trained = Trained(tmp_path / "straight", bad, *flags, "--max_train_steps", 8)
    assert trained.run.global_step == 8
    assert trained.changed() == [step for step in range(1, 9) if step not in BAD_STEPS]
    assert trained.run.skipped_steps == 2
    assert torch.isfinite(trained.snapshots[-1]).all()
    saved = DDPMPipeline.from_pretrained(tmp_path / "straight").unet
    assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())
    assert skipped(tmp_path / "straight" / "checkpoint-3") == 1
    assert skipped(tmp_path / "straight" / "checkpoint-8") == 2

    # The count, too, continues where the checkpoint was.
    Trained(tmp_path / "stopped", bad, *flags, "--max_train_steps", 3)
    resumed = Trained(
        *(tmp_path / "stopped", bad, *flags, "--max_train_steps", 8, "--resume_from_checkpoint", "latest")
    )
    assert resumed.run.skipped_steps == 2
    assert skipped(tmp_path / "stopped" / "checkpoint-8") == 2
    assert torch.equal(resumed.snapshots[-1], trained.snapshots[-1])


def test_a_script_stops_when_training_diverges(tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY_UNET))
    flags = [
        *("--model_config_name_or_path", config, "--dataset_name", "digits", "--cache_dir", tmp_path / "cache"),
        *("--learning_rate", 1e30, "--lr_scheduler", "constant", "--max_grad_norm", "inf", "--max_train_steps", 5),
        *("--output_dir", tmp_path / "run", "--ddpm_num_inference_steps", 1, "--checkpointing_steps", 1),
    ]
    with pytest.raises(FloatingPointError, match=r"At step 2 .* The last good checkpoint is .*checkpoint-1\."):
        start("train_unconditional.py", *flags)
    assert not (tmp_path / "run" / "model_index.json").exists()


# Two processes, of which one alone sees the bad sample


def test_both_processes_stop_or_skip(tmp_path):
    command = [*TORCHRUN, "2", __file__, str(tmp_path)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT / "tests")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-6000:]
    one = Trained(tmp_path / "one", KINDS[0], "--on_nan", "skip", "--max_train_steps", 8)
    for process in range(2):
        reports = json.loads((tmp_path / f"{process}.json").read_text())
        assert [report["saw the bad batch"] for report in reports] == [process == 1] * 2
        assert "At step 2 the loss is nan" in reports[0]["error"]
        assert reports[0]["changed"] == [1]
        assert reports[1]["error"] is None
        assert reports[1]["changed"] == one.changed()
        assert reports[1]["skipped"] == one.run.skipped_steps == 2
    two = checkpoint_weights(tmp_path / "skip" / "checkpoint-8")
    for key, value in checkpoint_weights(tmp_path / "one" / "checkpoint-8").items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=key)


def report_of(trained: Trained) -> dict[str, Any]:
    return {
        "error": trained.error,
        "changed": trained.changed(),
        "skipped": trained.run.skipped_steps,
        "saw the bad batch": trained.saw_bad_batch,
    }


# One process group for both runs: its processes do not leave a run at the same moment, so they could not meet again.
@patch.object(PartialState, "destroy_process_group", lambda state, group=None: None)
def run_both(folder: Path) -> None:
    flags = ("--max_train_steps", 8, "--checkpointing_steps", 8)
    reports = [
        report_of(Trained(folder / on_nan, KINDS[0], *flags, "--on_nan", on_nan, batch_size=BATCH_SIZE // 2))
        for on_nan in ("stop", "skip")
    ]
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    run_both(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
