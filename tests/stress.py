"""Kills a training process again and again, and compares what comes out with a run that was never disturbed.

    python tests/stress.py --kills 100

Every attempt trains in a process of its own (forked after the imports, so that an attempt takes seconds) and gets
SIGKILL at a random moment: after a random step, or while a checkpoint is being written, with a random number of its
files there. The next attempt resumes from the latest checkpoint. When a run reaches its end, its weights, moving
average, optimiser state and losses must be those of the undisturbed run bit for bit, and a new run starts.

The random moments are drawn from --seed. What the system does with them is not: no two stress tests are alike.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr
from pathlib import Path

import torch
from safetensors.torch import load_file
from scripts import TINY_UNET, losses, start
from tqdm import tqdm

from diffusers_scalelong.checkpoints import find_damage, list_checkpoints

STEPS = 24
CHECKPOINTING_STEPS = 3


def train(folder: Path, name: str, resume: bool) -> int:
    """Starts the training in a child process; returns its id."""
    flags = [
        *("--model_config_name_or_path", folder / "tiny.json", "--dataset_name", "digits"),
        *("--cache_dir", folder / "cache", "--output_dir", folder / name, "--max_train_steps", STEPS),
        *("--checkpointing_steps", CHECKPOINTING_STEPS, "--checkpoints_total_limit", 3, "--train_batch_size", 16),
        *("--gradient_accumulation_steps", 2, "--random_flip", "--use_ema", "--kappa_warmup_steps", 10),
        *("--skip_scaling", "cs", "--dataloader_num_workers", 1, "--ddpm_num_inference_steps", 1),
        *("--eval_batch_size", 1, "--lr_warmup_steps", 4),
        *(("--resume_from_checkpoint", "latest") if resume else ()),
    ]
    child = os.fork()
    if child:
        return child
    with (folder / f"{name}.log").open("a") as log, redirect_stderr(log):
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
        code = 1
        try:
            start("train_unconditional.py", *flags)
            code = 0
        finally:
            log.flush()
            os._exit(code)


def rows(run: Path) -> int:
    """The steps that a run has recorded."""
    path = run / "loss.csv"
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0


def count_files(folder: Path) -> int:
    try:
        return sum(path.is_file() for path in folder.rglob("*"))
    except FileNotFoundError:  # complete, and renamed meanwhile
        return 0


def kill_at_random(child: int, run: Path, chance: random.Random) -> str:
    """Waits for the drawn moment and kills; returns what happened."""
    at_write = chance.random() < 0.5
    ahead = chance.randint(1, 8)
    files = chance.randint(0, 9)
    step = None
    while True:
        if os.waitpid(child, os.WNOHANG)[0]:
            return "finished"
        if step is None and rows(run) > 0:  # now the record has been cut to where the run resumes
            step = rows(run) + ahead
        if at_write:
            for partial in run.glob(".checkpoint-*.partial"):
                if count_files(partial) >= files:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return "killed in a write" if partial.exists() else "killed after a write"
        elif step is not None and rows(run) >= step:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "killed at a step"
        time.sleep(0.0005)


def result(run: Path) -> dict[str, torch.Tensor]:
    """Everything that must be equal: weights, moving average, optimiser state, losses."""
    checkpoint = list_checkpoints(run)[-1]
    assert checkpoint.name == f"checkpoint-{STEPS}", checkpoint
    assert find_damage(checkpoint) is None
    tensors = {}
    for folder in ("unet", "unet_ema"):
        weights = load_file(checkpoint / folder / "diffusion_pytorch_model.safetensors")
        tensors |= {f"{folder} {key}": value for key, value in weights.items()}
    for index, state in torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"].items():
        tensors |= {f"optimizer {index} {key}": value for key, value in state.items()}
    pipeline = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    tensors |= {f"pipeline {key}": value for key, value in pipeline.items()}
    tensors["losses"] = torch.tensor(losses(run), dtype=torch.float64)
    return tensors


def compare(run: Path, expected: dict[str, torch.Tensor]) -> None:
    actual = result(run)
    assert actual.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(actual[key], expected[key])]
    assert not different, f"{run.name} differs: {different[:5]}"
    leftovers = [path.name for path in run.iterdir() if path.name.startswith(".")]
    assert not leftovers, leftovers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    tqdm.monitor_interval = 0  # nor a thread's lock
    tqdm.set_lock(threading.RLock())  # nor share one, which it would hold when it is killed
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    (folder / "tiny.json").write_text(json.dumps(TINY_UNET))

    assert os.waitpid(train(folder, "undisturbed", resume=False), 0)[1] == 0, (folder / "undisturbed.log").read_text()
    expected = result(folder / "undisturbed")

    counts: dict[str, int] = {}
    kills, runs = 0, 0
    progress = tqdm(total=args.kills, desc="Kills", unit="kill")
    while kills < args.kills:
        runs += 1
        name = f"run-{runs}"
        while True:
            child = train(folder, name, resume=True)
            if kills < args.kills:
                what = kill_at_random(child, folder / name, chance)
            else:
                os.waitpid(child, 0)
                what = "finished"
            if what == "finished":
                break
            counts[what] = counts.get(what, 0) + 1
            kills += 1
            progress.update(1)
        assert (folder / name / "model_index.json").exists(), (folder / f"{name}.log").read_text()[-4000:]
        compare(folder / name, expected)
        shutil.rmtree(folder / name)
    progress.close()
    shutil.rmtree(folder)
    print(f"{kills} kills in {runs} runs of {STEPS} steps: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    print(
        "Every run's weights, moving average, optimiser state and losses are bit-identical to the undisturbed run's."
    )


if __name__ == "__main__":
    sys.exit(main())
