"""Images for training: where they come from, whether they can be read, and how they become tensors."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

_IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def load_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    cache_dir: str | None = None,
    image_column: str = "image",
) -> datasets.Dataset:
    """Loads the training split of a dataset of images.

    Args:
        dataset_name: a dataset on the Hub, a local folder or parquet file, or `"digits"`: the 1,797 handwritten
            digits of 8×8 pixels that scikit-learn ships, which need no download.
        dataset_config_name: the configuration of a dataset that has several.
        train_data_dir: a folder of images (`imagefolder`), used when `dataset_name` is `None`.
        cache_dir: where Datasets keeps what it downloads and converts.
        image_column: the column that holds the images.

    Returns:
        A dataset whose `image_column` is of the feature type `Image`.

    Raises:
        OSError: there is no such dataset, or it cannot be read.
        ValueError: neither source is given, no such column, or no images.
    """
    if dataset_name == "digits":
        dataset = _digits()
    elif dataset_name is not None:
        dataset = _load(dataset_name, dataset_config_name, cache_dir)
    elif train_data_dir is not None:
        if not Path(train_data_dir).is_dir():
            raise OSError(f"--train_data_dir: there is no folder {train_data_dir}.")
        dataset = _load("imagefolder", None, cache_dir, data_dir=train_data_dir)
    else:
        raise ValueError("Name the training images: pass --dataset_name or --train_data_dir.")

    if image_column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {image_column!r}. Choose one of {', '.join(dataset.column_names)} with "
            "--image_column."
        )
    if len(dataset) == 0:
        raise ValueError(f"{dataset_name or train_data_dir} holds no images.")
    return dataset.cast_column(image_column, datasets.Image())


def _load(name: str, config_name: str | None, cache_dir: str | None, **kwargs: Any) -> datasets.Dataset:
    path = Path(name)
    if path.is_file():  # `load_dataset` wants the format's name in place of a single file's
        name, kwargs = path.suffix.lstrip("."), {"data_files": str(path)}
    try:
        return datasets.load_dataset(name, config_name, cache_dir=cache_dir, split="train", **kwargs)
    except Exception as error:  # Datasets raises many kinds, from its own down to Arrow's
        source = kwargs.get("data_dir") or kwargs.get("data_files") or name
        raise OSError(f"No training images could be loaded from {source}: {error}") from error


def _digits() -> datasets.Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    return datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}, features=features
    )


def drop_unreadable_images(
    dataset: datasets.Dataset, image_column: str = "image", skip_bad_images: bool = False, num_proc: int | None = None
) -> tuple[datasets.Dataset, int]:
    """Decodes every image once, so that a corrupt one is found before training and not in its third day.

    Datasets caches the answer: the same images are not checked twice.

    Args:
        dataset: from `load_images`.
        image_column: the column that holds the images.
        skip_bad_images: leave unreadable images out instead of raising.
        num_proc: the number of processes.

    Returns:
        The readable part of the dataset and the number of images left out.

    Raises:
        OSError: an image cannot be read (the message names it), or none can.
    """
    undecoded = dataset.cast_column(image_column, datasets.Image(decode=False)).select_columns([image_column])
    problems = undecoded.map(
        _find_problems,
        input_columns=image_column,
        batched=True,
        remove_columns=undecoded.column_names,
        num_proc=num_proc or None,
        desc="Checking images",
    )["problem"]
    bad = [index for index, problem in enumerate(problems) if problem]
    if not bad:
        return dataset, 0
    if not skip_bad_images:
        name = undecoded[bad[0]][image_column]["path"] or f"image {bad[0]} of the dataset"
        raise OSError(
            f"{len(bad)} of {len(dataset)} images cannot be read, the first is {name}: {problems[bad[0]]}. "
            "Repair or remove them, or pass --skip_bad_images."
        )
    if len(bad) == len(dataset):
        raise OSError(f"None of the {len(dataset)} images can be read, the first says: {problems[bad[0]]}.")
    excluded = set(bad)
    return dataset.select([index for index in range(len(dataset)) if index not in excluded]), len(bad)


def _find_problems(images: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    return {"problem": [_problem(image) for image in images]}


def _problem(image: dict[str, Any] | None) -> str:
    if image is None:
        return "the entry is empty"
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
            opened.load()
    except Exception as error:  # a decoder may raise anything on corrupt bytes
        return str(error) or type(error).__name__
    return ""


class ImageDataset(torch.utils.data.Dataset):
    """Images as float32 tensors (channels, resolution, resolution) in [-1, 1], under the key `"input"`.

    The shorter side is resized to `resolution` (bilinear), then a square is cropped. Augmentation depends on seed,
    epoch and index alone, so it is the same whatever the number of workers and wherever a run was interrupted.

    Args:
        dataset: from `load_images`.
        image_column: the column that holds the images.
        resolution: pixels per side.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        center_crop: crop the middle; otherwise a random place.
        random_flip: mirror half of the images.
        seed: of the augmentation, at least 0.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str = "image",
        resolution: int = 64,
        channels: int = 3,
        center_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
    ) -> None:
        if channels not in _IMAGE_MODES:
            raise ValueError(f"The model takes {channels} channels, but images have 1, 3 or 4.")
        self.dataset = dataset.select_columns([image_column])
        self.image_column = image_column
        self.resolution = resolution
        self.mode = _IMAGE_MODES[channels]
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's augmentation; Accelerate's data loader calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng((self.seed, self.epoch, index, 0))
        image = self.dataset[index][self.image_column].convert(self.mode)
        width, height = image.size
        scale = self.resolution / min(width, height)
        size = (max(round(width * scale), self.resolution), max(round(height * scale), self.resolution))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        slack = np.array(size) - self.resolution
        left, top = slack // 2 if self.center_crop else random.integers(slack, endpoint=True)
        pixels = np.asarray(image)[top : top + self.resolution, left : left + self.resolution]
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        pixels = pixels.reshape(self.resolution, self.resolution, -1).transpose(2, 0, 1)
        return {"input": torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)}
