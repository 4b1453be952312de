"""From files to tensors."""

import io

import datasets
import numpy as np
import pytest
import torch
from images import truncate, write_images
from PIL import Image

from diffusers_scalelong.image_data import ImageDataset, drop_unreadable_images, load_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def as_dataset(images) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))


def tensor_of(image, **options) -> torch.Tensor:
    return ImageDataset(as_dataset([image]), **options)[0]["input"]


def test_digits_are_the_real_ones():
    digits = load_images("digits")
    assert len(digits) == 1797
    assert digits[0]["image"].size == (8, 8)
    assert digits["label"][:10] == list(range(10))
    assert np.asarray(digits[0]["image"]).max() == 239  # 15 of 16


@pytest.mark.parametrize("by", ["dataset_name", "train_data_dir"])
def test_a_folder_of_images(tmp_path, by):
    paths = write_images(tmp_path / "data", 3)
    dataset = load_images(**{by: str(tmp_path / "data")})
    assert len(dataset) == 3
    for row, path in zip(dataset, paths, strict=True):
        assert (np.asarray(row["image"]) == np.asarray(Image.open(path))).all()


@pytest.mark.parametrize("as_folder", [True, False])
def test_parquet_with_image_bytes(tmp_path, as_folder):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    file = tmp_path / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    datasets.Dataset.from_dict({"img": [{"bytes": buffer.getvalue(), "path": None}] * 2}).to_parquet(file)
    dataset = load_images(str(file.parent if as_folder else file), image_column="img")
    assert (np.asarray(dataset[1]["img"]) == pixels).all()
    with pytest.raises(ValueError, match=r"no column 'image'.*Choose one of img"):
        load_images(str(file))


def test_nothing_to_load_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="empty"):
        load_images(train_data_dir=str(tmp_path / "empty"))
    with pytest.raises(OSError, match="empty"):
        load_images(str(tmp_path / "empty"))
    with pytest.raises(OSError, match="no folder"):
        load_images(train_data_dir=str(tmp_path / "missing"))
    with pytest.raises(OSError, match="nowhere/nothing"):
        load_images("nowhere/nothing")
    with pytest.raises(ValueError, match="--train_data_dir"):
        load_images()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("no")])
def test_corrupt_images_are_named_or_skipped(tmp_path, suffix, damage):
    paths = write_images(tmp_path / "data", 5, suffix=suffix)
    damage(paths[3])
    dataset = load_images(train_data_dir=str(tmp_path / "data"))
    with pytest.raises(OSError, match=rf"1 of 5 images.*3\.{suffix}.*--skip_bad_images"):
        drop_unreadable_images(dataset)
    readable, skipped = drop_unreadable_images(dataset, skip_bad_images=True)
    assert (len(readable), skipped) == (4, 1)
    assert [row["image"].size for row in readable] == [(20, 16)] * 4


def test_good_images_all_stay_and_bad_ones_do_not_pass_together(tmp_path):
    paths = write_images(tmp_path / "data", 2)
    dataset = load_images(train_data_dir=str(tmp_path / "data"))
    assert drop_unreadable_images(dataset) == (dataset, 0)
    for path in paths:
        truncate(path)
    damaged = load_images(train_data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "other cache"))
    with pytest.raises(OSError, match="None of the 2 images"):
        drop_unreadable_images(damaged, skip_bad_images=True)


def test_pixels_map_onto_minus_one_to_one():
    pixels = np.array([[[0, 255, 51]]], dtype=np.uint8)
    tensor = tensor_of(Image.fromarray(pixels), resolution=1)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor.flatten(), torch.tensor([-1, 1, 51 / 127.5 - 1]))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_follow_the_models_channels(channels, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(4, 4, 3), dtype=np.uint8))
    tensor = tensor_of(image, resolution=4, channels=channels)
    assert tensor.shape == (channels, 4, 4)
    expected = np.asarray(image.convert(mode)).reshape(4, 4, channels).transpose(2, 0, 1)
    assert np.array_equal(((tensor + 1) * 127.5).round().numpy(), expected)
    with pytest.raises(ValueError, match="1, 3 or 4"):
        tensor_of(image, channels=2)


@pytest.mark.parametrize("size", [(9, 5), (5, 9), (100, 7), (3, 3), (8, 8)])
def test_any_size_becomes_a_square(size):
    image = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    assert tensor_of(image, resolution=8).shape == (3, 8, 8)


def test_center_crop_takes_the_middle():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255
    assert (tensor_of(Image.fromarray(pixels), resolution=4, center_crop=True) == 1).all()


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    images = [Image.fromarray(np.random.default_rng(i).integers(256, size=(8, 16, 3), dtype=np.uint8)) for i in (0, 1)]

    def draw(index, epoch=0, seed=0):
        dataset = ImageDataset(as_dataset(images), resolution=8, random_flip=True, seed=seed)
        dataset.set_epoch(epoch)
        return dataset[index]["input"]

    assert torch.equal(draw(0), draw(0))
    torch.rand(3), np.random.rand(3)  # global generators play no part
    assert torch.equal(draw(1, 5, 7), draw(1, 5, 7))
    assert len({draw(0, epoch).numpy().tobytes() for epoch in range(20)}) > 5
    assert len({draw(0, 0, seed).numpy().tobytes() for seed in range(20)}) > 5


def test_flips_are_mirror_images_of_about_half():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    dataset = ImageDataset(as_dataset([image]), resolution=4, random_flip=True)
    straight = tensor_of(image, resolution=4)
    flipped = 0
    for epoch in range(200):
        dataset.set_epoch(epoch)
        tensor = dataset[0]["input"]
        assert torch.equal(tensor, straight) or torch.equal(tensor, straight.flip(-1))
        flipped += torch.equal(tensor, straight.flip(-1))
    assert 70 < flipped < 130
