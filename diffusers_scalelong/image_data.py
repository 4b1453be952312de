"""Images for training: where they come from, whether they can be read, and how they become tensors."""

from collections.abc import Mapping, Sequence
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
    columns: Mapping[str, str] | None = None,
    max_train_samples: int | None = None,
    streaming: bool = False,
    seed: int = 0,
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads the training split of a dataset of images.

    Args:
        dataset_name: a dataset on the Hub, a local folder or parquet file, or `"digits"`: the 1,797 handwritten
            digits of 8×8 pixels that scikit-learn ships, which need no download.
        dataset_config_name: the configuration of a dataset that has several.
        train_data_dir: a folder of images (`imagefolder`), used when `dataset_name` is `None`. A `metadata.jsonl` in
            it adds captions or labels.
        cache_dir: where Datasets keeps what it downloads and converts.
        columns: the columns that are needed, by the flags that name them: `{"image_column": "image"}` by default. The
            one of `image_column` holds the images.
        max_train_samples: take a random part of the dataset, of this size.
        streaming: read the dataset while training in place of loading it first.
        seed: of the random part.

    Returns:
        A dataset whose image column is of the feature type `Image`.

    Raises:
        OSError: there is no such dataset, or it cannot be read.
        ValueError: neither source is given, a column is missing, or there are no images.
    """
    columns = columns or {"image_column": "image"}
    if dataset_name == "digits":
        dataset = _digits()
        dataset = dataset.to_iterable_dataset(num_shards=8) if streaming else dataset
    elif dataset_name is not None:
        dataset = _load(dataset_name, dataset_config_name, cache_dir, streaming)
    elif train_data_dir is not None:
        if not Path(train_data_dir).is_dir():
            raise OSError(f"--train_data_dir: there is no folder {train_data_dir}.")
        dataset = _load("imagefolder", None, cache_dir, streaming, data_dir=train_data_dir)
    else:
        raise ValueError("Name the training images: pass --dataset_name or --train_data_dir.")

    present = dataset.column_names
    if present is None:  # a stream that does not know its columns before its first row
        present = list(next(iter(dataset), {}))
    for flag, column in columns.items():
        if column not in present:
            raise ValueError(
                f"The dataset has no column {column!r}. Choose one of {', '.join(present)} with --{flag}."
            )
    if not streaming and len(dataset) == 0:
        raise ValueError(f"{dataset_name or train_data_dir} holds no images.")
    if max_train_samples is not None and max_train_samples < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(max_train_samples))
    # A stream is shuffled in blocks: its images are decoded when their turn comes, not when a block is read.
    return dataset.cast_column(columns["image_column"], datasets.Image(decode=not streaming))


def _load(
    name: str, config_name: str | None, cache_dir: str | None, streaming: bool, **kwargs: Any
) -> datasets.Dataset | datasets.IterableDataset:
    path = Path(name)
    if path.is_file():  # `load_dataset` wants the format's name in place of a single file's
        name, kwargs = path.suffix.lstrip("."), {"data_files": str(path)}
    try:
        return datasets.load_dataset(
            name, config_name, cache_dir=cache_dir, split="train", streaming=streaming, **kwargs
        )
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
    try:
        decode_image(image)
    except OSError as error:
        return str(error)
    return ""


def decode_image(image: Image.Image | dict[str, Any] | None) -> Image.Image:
    """The image of a dataset's entry, decoded or not.

    Raises:
        OSError: it cannot be decoded.
    """
    if image is None:
        raise OSError("the entry is empty")
    if isinstance(image, Image.Image):
        return image
    try:
        return datasets.Image().decode_example(image)
    except Exception as error:  # a decoder may raise anything on corrupt bytes
        raise OSError(str(error) or type(error).__name__) from error


class ImageTransform:
    """Turns an image into a tensor: resizes the shorter side to `resolution`, then crops a square.

    Args:
        resolution: pixels per side.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        center_crop: crop the middle; otherwise a random place.
        random_flip: mirror half of the images.
        interpolation: `"bilinear"`, `"lanczos"` or another filter of Pillow's.

    Raises:
        ValueError: another number of channels, or an unknown filter.
    """

    def __init__(
        self,
        resolution: int = 64,
        channels: int = 3,
        center_crop: bool = False,
        random_flip: bool = False,
        interpolation: str = "bilinear",
    ) -> None:
        if channels not in _IMAGE_MODES:
            raise ValueError(f"The model takes {channels} channels, but images have 1, 3 or 4.")
        filters = [resampling.name.lower() for resampling in Image.Resampling]
        if interpolation not in filters:
            raise ValueError(f"The interpolation must be one of {', '.join(filters)}, but is {interpolation!r}.")
        self.resolution = resolution
        self.mode = _IMAGE_MODES[channels]
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.interpolation = Image.Resampling[interpolation.upper()]

    def __call__(self, image: Image.Image | dict[str, Any], random: np.random.Generator) -> dict[str, torch.Tensor]:
        """Draws crop and mirroring from `random`.

        Returns:
            `"input"`, float32 (channels, resolution, resolution) in [-1, 1]; and what SDXL is told of the image,
            int64 (2,): `"original_size"`, its height and width, and `"crop_top_left"`, in pixels after resizing.

        Raises:
            OSError: the image cannot be decoded.
        """
        image = decode_image(image)
        width, height = image.size
        image = image.convert(self.mode)
        scale = self.resolution / min(width, height)
        size = (max(round(width * scale), self.resolution), max(round(height * scale), self.resolution))
        if size != image.size:
            image = image.resize(size, self.interpolation)
        slack = np.array(size) - self.resolution
        left, top = slack // 2 if self.center_crop else random.integers(slack, endpoint=True)
        pixels = np.asarray(image)[top : top + self.resolution, left : left + self.resolution]
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
            left = slack[0] - left  # the corner in the mirrored image
        pixels = pixels.reshape(self.resolution, self.resolution, -1).transpose(2, 0, 1)
        return {
            "input": torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1),
            "original_size": torch.tensor((height, width)),
            "crop_top_left": torch.tensor((int(top), int(left))),
        }
