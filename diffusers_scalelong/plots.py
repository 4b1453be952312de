"""The pictures that a training run leaves behind."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("agg")  # no screen
from matplotlib import pyplot as plt


def save_image_grid(
    images: np.ndarray, path: str | Path, padding: int = 2, min_tile: int = 64, columns: int | None = None
) -> None:
    """Saves images as one PNG, in a grid, row after row.

    Args:
        images: (number, height, width, channels) in [0, 1], as a pipeline returns with `output_type="np"`.
        path: the PNG.
        padding: pixels between the images.
        min_tile: smaller images are enlarged by a whole factor to at least this many pixels.
        columns: images in a row; by default as many as make the grid as square as possible.
    """
    factor = max(1, math.ceil(min_tile / images.shape[1]))
    pixels = (images * 255).round().astype(np.uint8).repeat(factor, axis=1).repeat(factor, axis=2)
    number, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    grid = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, channels), 255, np.uint8
    )
    for index, tile in enumerate(pixels):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        grid[top : top + height, left : left + width] = tile
    Image.fromarray(grid.squeeze(-1) if channels == 1 else grid).save(path)


def save_loss_curve(steps: Sequence[int], losses: Sequence[float], path: str | Path) -> None:
    """Saves the training loss over optimiser steps as a PNG, each value and an exponential moving average.

    Losses that are not finite, of skipped steps, are left out. Without any loss there is no picture.
    """
    finite = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if not finite:
        return
    steps, losses = zip(*finite, strict=True)
    span = max(len(losses) / 50, 1)
    average, averages = 0.0, []
    for number, loss in enumerate(losses, start=1):
        average += (loss - average) / min(number, span)
        averages.append(average)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
    if span >= 2:
        axes.plot(steps, averages, color="tab:blue", label=f"moving average over {span:.0f} steps")
    axes.set(xlabel="optimiser step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
