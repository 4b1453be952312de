"""The draws of a sample, the order of a run, and streams: nothing but seed, epoch and place decides them."""

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from images import truncate, write_images
from torchdata.stateful_dataloader import StatefulDataLoader

from diffusers_scalelong.diffusion_data import (
    DiffusionDataset,
    DiffusionTransform,
    RunSampler,
    StreamingDiffusionDataset,
)
from diffusers_scalelong.image_data import ImageTransform, load_images


def number(value, random):
    return {"input": torch.tensor(value)}


def condition(row, random):
    return {"kept": torch.tensor(random.random() >= 0.25)}


def make(noise_shape=(4,), num_samples=200, seed=0, **options):
    transform = DiffusionTransform(number, "image", noise_shape, **options)
    return DiffusionDataset(datasets.Dataset.from_dict({"image": list(range(num_samples))}), transform, seed)


def draws(dataset, epoch=0):
    items = [dataset[epoch, i] for i in range(len(dataset))]
    assert [item["input"] for item in items] == list(range(len(dataset)))
    return torch.stack([item["noise"] for item in items]), torch.stack([item["timestep"] for item in items])


def test_noise_is_standard_normal_and_timesteps_are_uniform():
    noise, timesteps = draws(make((3, 8, 8), num_train_timesteps=10))
    assert noise.shape == (200, 3, 8, 8)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02  # 38,400 draws: six standard errors are 0.03
    assert abs(noise.std() - 1) < 0.02
    assert timesteps.dtype == torch.int64
    assert all(5 <= count <= 40 for count in np.bincount(timesteps, minlength=10))


def test_the_noise_offset_is_one_number_per_channel():
    noise, _ = draws(make((3, 32, 32), noise_offset=2.0))
    means = noise.mean(dim=(2, 3))
    # The mean of a channel varies by 2² of the offset and 1/1024 of the noise.
    assert means.var() == pytest.approx(4 + 1 / 1024, rel=0.25)
    assert noise.var(dim=(2, 3)).mean() == pytest.approx(1, rel=0.05)


def test_every_sample_epoch_and_seed_draws_its_own():
    first, steps = draws(make())
    torch.rand(3), np.random.rand(3)  # global generators play no part
    again, again_steps = draws(make())
    assert torch.equal(first, again)
    assert torch.equal(steps, again_steps)
    for other, _ in (draws(make(), epoch=1), draws(make(seed=1))):
        assert not (first == other).any()
    assert len(torch.unique(first)) == first.numel()


def test_a_condition_is_part_of_the_sample():
    dataset = make(condition=condition)
    assert 120 < sum(int(dataset[0, i]["kept"]) for i in range(200)) < 180


def order(num_processes=1, batch_size=6, num_batches=20, first_batch=0, num_samples=25):
    """For each process its batches of (epoch, index) pairs."""
    batches = []
    for process in range(num_processes):
        sampler = RunSampler(num_samples, num_batches, batch_size, 0, num_processes, process, first_batch)
        pairs = list(sampler)
        assert len(pairs) == len(sampler)
        batches.append([pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)])
    return batches


def test_every_epoch_takes_every_sample_once_in_an_order_of_its_own():
    pairs = [pair for batch in order(num_batches=25)[0] for pair in batch]
    assert Counter(pairs) == Counter((epoch, index) for epoch in range(6) for index in range(25))
    assert [epoch for epoch, _ in pairs] == sorted(epoch for epoch, _ in pairs)
    orders = {tuple(index for epoch, index in pairs if epoch == e) for e in range(6)}
    assert len(orders) == 6


def test_processes_and_accumulation_share_the_large_batch():
    whole = order(num_processes=1, batch_size=12, num_batches=10)[0]
    first, second = order(num_processes=2, batch_size=6, num_batches=10)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    accumulated = order(num_processes=1, batch_size=6, num_batches=20)[0]
    assert [a + b for a, b in zip(accumulated[::2], accumulated[1::2], strict=True)] == whole


def test_a_resumed_order_continues_the_order():
    for process, batches in enumerate(order(num_processes=2)):
        assert order(num_processes=2, first_batch=7)[process] == batches[7:]


# Streams


def stream(num_rows=60, num_shards=4, buffer_size=7, **options):
    rows = datasets.Dataset.from_dict({"image": list(range(num_rows))}).to_iterable_dataset(num_shards=num_shards)
    transform = DiffusionTransform(number, "image", (4,))
    return StreamingDiffusionDataset(rows, transform, seed=3, buffer_size=buffer_size, **options)


def take(loader, number):
    batches = iter(loader)
    return [next(batches) for _ in range(number)]


def values(batches):
    return [value for batch in batches for value in batch["input"].tolist()]


def test_a_stream_takes_every_row_once_in_each_epoch():
    seen = values(take(StatefulDataLoader(stream(), batch_size=6), 30))
    epochs = [seen[:60], seen[60:120], seen[120:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(60))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_processes_divide_a_stream():
    parts = [
        values(take(StatefulDataLoader(stream(num_processes=2, process_index=i), batch_size=6), 5)) for i in (0, 1)
    ]
    assert sorted(parts[0] + parts[1]) == list(range(60))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("at", [1, 4, 11, 23])
def test_a_stream_resumes_where_it_was(num_workers, at):
    straight = take(StatefulDataLoader(stream(), batch_size=5, num_workers=num_workers), at + 12)
    loader = StatefulDataLoader(stream(), batch_size=5, num_workers=num_workers)
    take_some = iter(loader)
    for _ in range(at):
        next(take_some)
    state = loader.state_dict()
    resumed_loader = StatefulDataLoader(stream(), batch_size=5, num_workers=num_workers)
    resumed_loader.load_state_dict(state)
    resumed = take(resumed_loader, 12)
    for expected, batch in zip(straight[at:], resumed, strict=True):
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_a_stream_has_no_use_for_more_workers_than_shards():
    seen = values(take(StatefulDataLoader(stream(num_rows=12, num_shards=1), batch_size=3, num_workers=2), 4))
    assert sorted(seen) == list(range(12))


def test_bad_images_in_a_stream_are_raised_or_left_out(tmp_path):
    truncate(write_images(tmp_path / "data", 6)[2])
    rows = load_images(train_data_dir=str(tmp_path / "data"), streaming=True)
    transform = DiffusionTransform(ImageTransform(8), "image", (3, 8, 8))
    with pytest.raises(OSError):
        list(zip(range(6), StreamingDiffusionDataset(rows, transform), strict=False))
    skipping = StreamingDiffusionDataset(rows, transform, skip_bad_images=True)
    inputs = [sample["input"].numpy().tobytes() for _, sample in zip(range(5), skipping, strict=False)]
    assert len(set(inputs)) == 5
    for index in (0, 1, 3, 4, 5):
        truncate(tmp_path / "data" / f"{index}.png")
    with pytest.raises(OSError, match="None of the stream"):
        next(iter(StreamingDiffusionDataset(rows, transform, skip_bad_images=True)))
