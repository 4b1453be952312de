"""How many images a second does the training loop take, beside Diffusers' own script?

    python benchmarks/training_loop.py --official PATH

PATH is `examples/unconditional_image_generation/train_unconditional.py` in a checkout of
https://github.com/huggingface/diffusers, which needs the package torchvision. Both scripts run unchanged, as processes
of their own, one after the other in random order, with the same model (`--skip_scaling none`, so that it is the same),
images, batch size, workers, optimiser and moving average of the weights. `--variants` adds rows for what the scaling
costs and what `--channels_last` and `--compile` give.

Both scripts log the loss of every step to TensorBoard. The times in those files, from the last step of the warm-up to
the last step, give the images per second: data, training step, moving average and logging, without start, checkpoints
and samples.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

import datasets
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_scalelong.image_data import load_images
from diffusers_scalelong.presets import load_preset

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "training" / "train_unconditional.py"
VARIANTS = {  # the flags that only this package's script has
    "plain": ["--skip_scaling", "none"],
    "cs": ["--skip_scaling", "cs"],
    "channels_last": ["--skip_scaling", "none", "--channels_last"],
    "compile": ["--skip_scaling", "none", "--compile"],
}


def write_images(dataset_name: str, folder: Path, number: int) -> None:
    """One epoch of images: the official script draws samples at the end of an epoch, which is not to be timed."""
    images = load_images(dataset_name).select_columns(["image"])
    indices = list(islice(cycle(range(len(images))), number))
    folder.mkdir()
    images.select(indices).to_parquet(folder / "train.parquet")


def write_model_config(preset: str, path: Path, divide_width: int) -> int:
    """The preset's model for RGB images, which is all that the official script gives. Returns its resolution."""
    config, _ = load_preset(preset)
    widths = [width // divide_width for width in config["block_out_channels"]]
    config |= {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3, "block_out_channels": widths}
    path.write_text(json.dumps(config))
    return config["sample_size"]


def images_per_second(command: list[str], output_dir: Path, batch_size: int, warm_up: int, steps: int) -> float:
    """Runs a training script and reads its speed from the times at which it logged its steps."""
    process = subprocess.run([*command, "--output_dir", str(output_dir)], capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{process.stderr[-2000:]}")
    (log,) = output_dir.glob("logs/*/events.*")
    events = EventAccumulator(str(log), size_guidance={"scalars": 0}).Reload().Scalars("loss")
    assert len(events) == steps, f"{command[1]} logged {len(events)} steps in place of {steps}."
    return (steps - warm_up) * batch_size / (events[-1].wall_time - events[warm_up - 1].wall_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, help="Diffusers' train_unconditional.py.")
    parser.add_argument("--dataset_name", default="digits", help="A dataset, as in the training scripts.")
    parser.add_argument(
        "--model_config_name_or_path",
        default=str(REPOSITORY / "training" / "configs" / "digits_unet.json"),
        help="Config or preset of a UNet2DModel.",
    )
    parser.add_argument("--divide_width", type=int, default=1, help="Make every level this many times narrower.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain"], help="Of this package's script.")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--dataloader_num_workers", type=int, nargs="+", default=[0, 2], help="One table for each.")
    parser.add_argument("--steps", type=int, default=100, help="Timed steps of each run.")
    parser.add_argument("--warm_up", type=int, default=20, help="Steps before them.")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    datasets.disable_progress_bars()

    scripts = {name: [str(SCRIPT), *flags] for name, flags in VARIANTS.items() if name in args.variants}
    if args.official is None:
        print("No --official is given, so nothing is compared: these are this package's speeds alone.")
    elif not args.official.is_file():
        sys.exit(f"error: there is no file {args.official}: give Diffusers' train_unconditional.py.")
    else:
        scripts["official"] = [str(args.official)]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        resolution = write_model_config(args.model_config_name_or_path, folder / "model.json", args.divide_width)
        all_steps = args.warm_up + args.steps
        write_images(args.dataset_name, folder / "images", all_steps * args.train_batch_size)
        flags = [
            *("--dataset_name", folder / "images", "--model_config_name_or_path", folder / "model.json"),
            *("--resolution", resolution, "--train_batch_size", args.train_batch_size, "--random_flip", "--use_ema"),
            *("--num_epochs", 1, "--eval_batch_size", 1, "--ddpm_num_inference_steps", 1),
            *("--cache_dir", folder / "cache", "--checkpointing_steps", 10**9),
        ]
        where = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        print(
            f"{where}, torch {torch.__version__}; {resolution}×{resolution}, batch {args.train_batch_size}, "
            f"{args.steps} steps; median of {args.rounds} runs (slowest to fastest):"
        )
        for workers in args.dataloader_num_workers:
            print(f"{workers} workers")
            speeds: dict[str, list[float]] = {name: [] for name in scripts}
            for number in range(args.rounds):
                for name in random.sample(list(scripts), len(scripts)):
                    command = [sys.executable, *scripts[name], *flags, "--dataloader_num_workers", workers]
                    output_dir = folder / f"{name}-{workers}-{number}"
                    command = [str(part) for part in command]
                    speed = images_per_second(command, output_dir, args.train_batch_size, args.warm_up, all_steps)
                    speeds[name].append(speed)
            for name, own in speeds.items():
                line = f"  {name:13}  {statistics.median(own):7.1f} images/s ({min(own):.1f} to {max(own):.1f})"
                if "official" in speeds and name != "official":
                    ratios = [a / b for a, b in zip(own, speeds["official"], strict=True)]
                    line += f"  {statistics.median(ratios):.2f}× the official script's"
                    line += f" (round by round {min(ratios):.2f} to {max(ratios):.2f})"
                print(line, flush=True)


if __name__ == "__main__":
    main()
