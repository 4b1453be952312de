"""The random draws of diffusion training, made where the samples are loaded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class DiffusionDataset(torch.utils.data.Dataset):
    """Adds to every sample what training draws for it: Gaussian noise and a uniform timestep.

    The draws depend on seed, epoch and index alone. So a run is the same however it is divided into processes,
    batches and workers, and wherever it was interrupted; and it costs the training loop no time.

    Args:
        dataset: map-style, with `set_epoch`; its samples are dictionaries.
        noise_shape: of one sample's noise.
        num_train_timesteps: the timestep is drawn from 0 … num_train_timesteps - 1.
        seed: of the draws, at least 0.
    """

    def __init__(
        self, dataset: Any, noise_shape: Sequence[int], num_train_timesteps: int = 1000, seed: int = 0
    ) -> None:
        self.dataset = dataset
        self.noise_shape = tuple(noise_shape)
        self.num_train_timesteps = num_train_timesteps
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's draws and augmentation; Accelerate's data loader calls it."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample, with `"noise"` (float32, of `noise_shape`) and `"timestep"` (int64)."""
        random = np.random.default_rng((self.seed, self.epoch, index, 1))
        noise = random.standard_normal(self.noise_shape, dtype=np.float32)
        timestep = int(random.integers(self.num_train_timesteps))
        return {**self.dataset[index], "noise": torch.from_numpy(noise), "timestep": timestep}
