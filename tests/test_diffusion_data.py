"""Noise and timesteps: their distribution, and that nothing but seed, epoch and index decides them."""

import numpy as np
import torch

from diffusers_scalelong.diffusion_data import DiffusionDataset


class Numbers(torch.utils.data.Dataset):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 200

    def __getitem__(self, index):
        return {"input": torch.tensor([float(index)]), "epoch": self.epoch}


def draws(dataset, epoch=0):
    dataset.set_epoch(epoch)
    items = [dataset[i] for i in range(len(dataset))]
    return torch.stack([item["noise"] for item in items]), np.array([item["timestep"] for item in items])


def test_noise_is_standard_normal_and_timesteps_are_uniform():
    noise, timesteps = draws(DiffusionDataset(Numbers(), (3, 8, 8), num_train_timesteps=10))
    assert noise.shape == (200, 3, 8, 8)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02  # 38,400 draws: six standard errors are 0.03
    assert abs(noise.std() - 1) < 0.02
    assert set(timesteps) == set(range(10))
    assert all(5 <= count <= 40 for count in np.bincount(timesteps))


def test_every_sample_epoch_and_seed_draws_its_own():
    first, steps = draws(DiffusionDataset(Numbers(), (4,)))
    again, again_steps = draws(DiffusionDataset(Numbers(), (4,)))
    assert torch.equal(first, again)
    assert (steps == again_steps).all()
    for other, _ in (
        draws(DiffusionDataset(Numbers(), (4,)), epoch=1),
        draws(DiffusionDataset(Numbers(), (4,), seed=1)),
    ):
        assert not (first == other).any()
    assert len(torch.unique(first)) == first.numel()


def test_samples_keep_what_they_had():
    dataset = DiffusionDataset(Numbers(), (1,))
    dataset.set_epoch(3)
    assert dataset[7]["input"] == 7
    assert dataset[7]["epoch"] == 3
    assert len(dataset) == 200
