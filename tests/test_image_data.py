"""From files to tensors."""

import io

import datasets
import numpy as np
import pytest
import torch
from images import truncate, write_images
from PIL import Image

from diffusers_scalelong.image_data import ImageTransform, drop_unreadable_images, load_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tensor_of(image, seed=0, **options) -> torch.Tensor:
    return ImageTransform(**options)(image, np.random.default_rng(seed))["input"]


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
    dataset = load_images(str(file.parent if as_folder else file), columns={"image_column": "img"})
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


def test_crops_lie_inside_and_are_where_they_say():
    image = Image.fromarray(np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(10, 30))
    seen = set()
    for seed in range(60):
        sample = ImageTransform(resolution=10, channels=1)(image, np.random.default_rng(seed))
        top, left = sample["crop_top_left"].tolist()
        seen.add(left)
        assert (top, sample["original_size"].tolist()) == (0, [10, 30])
        expected = np.asarray(image)[:, left : left + 10]
        assert np.array_equal(((sample["input"][0] + 1) * 127.5).round().numpy(), expected)
    assert min(seen) == 0
    assert max(seen) == 20


def test_augmentation_comes_from_the_given_generator_alone():
    image = Image.fromarray(np.random.default_rng(1).integers(256, size=(8, 16, 3), dtype=np.uint8))
    first = tensor_of(image, seed=5, resolution=8, random_flip=True)
    torch.rand(3), np.random.rand(3)  # global generators play no part
    assert torch.equal(tensor_of(image, seed=5, resolution=8, random_flip=True), first)
    assert len({tensor_of(image, seed, resolution=8, random_flip=True).numpy().tobytes() for seed in range(20)}) > 5


def test_flips_are_mirror_images_of_about_half():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    straight = tensor_of(image, resolution=4)
    flipped = 0
    for seed in range(200):
        tensor = tensor_of(image, seed, resolution=4, random_flip=True)
        assert torch.equal(tensor, straight) or torch.equal(tensor, straight.flip(-1))
        flipped += torch.equal(tensor, straight.flip(-1))
    assert 70 < flipped < 130


def test_the_filter_is_pillows():
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8))
    for name in ("lanczos", "nearest"):
        expected = np.asarray(image.resize((8, 8), Image.Resampling[name.upper()])).transpose(2, 0, 1)
        tensor = tensor_of(image, resolution=8, interpolation=name)
        assert np.array_equal(((tensor + 1) * 127.5).round().numpy(), expected)
    with pytest.raises(ValueError, match="lanczos"):
        ImageTransform(interpolation="sharp")


def test_a_part_of_the_dataset_is_random_and_reproducible():
    part, again, other = (load_images("digits", max_train_samples=50, seed=seed)["label"][:] for seed in (0, 0, 1))
    assert len(part) == 50
    assert part == again != other
    assert load_images("digits", max_train_samples=5000).num_rows == 1797
