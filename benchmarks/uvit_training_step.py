"""How long does one training step of the U-ViT take, beside the reference implementation?

    python benchmarks/uvit_training_step.py --reference PATH [--device cuda]

PATH is a checkout of https://github.com/sail-sg/ScaleLong or https://github.com/baofff/U-ViT, which needs the package
einops. A step is a forward and a backward pass. Both models have the same weights and their outputs are compared
first. The variants take turns in random order, so that whatever else the machine does falls on all of them.

On the CPU: float32, batch 16, 32×32 pixels, patch 4, width 256, 8 layers, 4 heads. On a GPU: bfloat16 autocast, the
U-ViT-S/2 of CIFAR-10 (32×32, patch 2, width 512, 12 layers, 8 heads), batch 128.
"""

import argparse
import contextlib
import importlib
import io
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from diffusers_scalelong import ScaleLongUViT2DModel

ROUNDS = 10
WARM_UP = 3
SIZES = {  # batch size, patch size, width, layers, heads
    "cpu": (16, 4, 256, 8, 4),
    "cuda": (128, 2, 512, 12, 8),
}


def load_reference(checkout: Path, patch_size: int, width: int, layers: int, heads: int) -> nn.Module:
    """The reference's U-ViT for 32×32 pixels, from its `libs/uvit.py`."""
    if not (checkout / "libs" / "uvit.py").is_file():
        sys.exit(f"error: {checkout} holds no libs/uvit.py: give a checkout of the reference implementation.")
    sys.path.insert(0, str(checkout))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it is imported and built
        try:
            module = importlib.import_module("libs.uvit")
        except ModuleNotFoundError as error:
            sys.exit(f"error: the reference needs the package {error.name}: pip install {error.name}")
        return module.UViT(
            img_size=32, patch_size=patch_size, embed_dim=width, depth=layers, num_heads=heads, num_classes=-1
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, help="A checkout of the reference implementation.")
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    args = parser.parse_args()

    device = args.device
    batch_size, patch_size, width, layers, heads = SIZES[device]
    torch.manual_seed(0)
    sample, noise = torch.randn(2, batch_size, 3, 32, 32, device=device)
    timesteps = torch.randint(1000, (batch_size,), device=device)

    if args.reference:
        reference = load_reference(args.reference, patch_size, width, layers, heads)
        model = ScaleLongUViT2DModel.from_original_checkpoint(reference.state_dict(), num_attention_heads=heads)
    else:
        print("No --reference is given, so nothing is compared: these are this package's times alone.")
        reference = None
        model = ScaleLongUViT2DModel(
            patch_size=patch_size, hidden_size=width, num_layers=layers, num_attention_heads=heads
        )
    model.to(device).train()
    compiled = torch.compile(model, fullgraph=True)

    variants: dict[str, tuple[nn.Module, Callable[[], torch.Tensor]]] = {}
    if reference is not None:
        reference.to(device).train()
        variants["reference"] = (reference, lambda: reference(sample, timesteps))
    variants["eager"] = (model, lambda: model(sample, timesteps, return_dict=False)[0])
    variants["compiled"] = (model, lambda: compiled(sample, timesteps, return_dict=False)[0])

    if reference is not None:
        with torch.no_grad():
            expected, output = variants["reference"][1](), variants["eager"][1]()
        error = ((output - expected).abs().max() / expected.abs().max()).item()
        print(f"Largest difference of the outputs, relative to the largest value: {error:.1e}")

    def step(name: str) -> float:
        module, predict = variants[name]
        module.zero_grad()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.mse_loss(predict().float(), noise)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for name in variants:
        for _ in range(WARM_UP):
            step(name)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name in random.sample(list(variants), len(variants)):
            seconds[name].append(step(name))

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}; median of {ROUNDS} steps (fastest to slowest):")
    for name, times in seconds.items():
        line = f"  {name:9}  {statistics.median(times):.4f} s ({min(times):.4f} to {max(times):.4f})"
        if reference is not None and name != "reference":
            ratios = [other / own for other, own in zip(seconds["reference"], times, strict=True)]
            ratio = statistics.median(seconds["reference"]) / statistics.median(times)
            line += f"  {ratio:.2f}× the reference's speed (round by round {min(ratios):.2f} to {max(ratios):.2f})"
        print(line)


if __name__ == "__main__":
    main()
