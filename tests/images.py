"""Small image folders that the tests write."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, number: int = 6, size: tuple[int, int] = (20, 16), suffix: str = "png") -> list[Path]:
    """Random colour images of (width, height) `size`, named 0.png, 1.png, …"""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths = []
    for index in range(number):
        pixels = random.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
        paths.append(folder / f"{index}.{suffix}")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
