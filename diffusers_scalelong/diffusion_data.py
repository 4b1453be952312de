"""The data of diffusion training: every random draw is made where the samples are loaded, and can be made again.

The draws of a sample (crop, mirroring, noise, timestep, dropped condition) depend on the seed, the epoch and the
sample's place alone. So a run is the same however it is divided into processes, batches, accumulation steps and
workers, and wherever it was interrupted; and drawing costs the training loop no time.
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import datasets
import datasets.distributed
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from .image_data import drop_unreadable_images, load_images

logger = get_logger(__name__)

# On resumption Datasets warns that the rows of its shuffle buffer are lost; ours holds one row, which has been used.
logging.getLogger("datasets.iterable_dataset").addFilter(lambda record: "shuffle buffer" not in record.getMessage())

# Turns a row of the dataset into tensors, drawing what is random from the generator.
Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, torch.Tensor]]


class DiffusionTransform:
    """Makes of a row what a training step needs: the image, its condition, noise and a timestep.

    Args:
        image: turns the image into tensors.
        image_column: the column that holds the image.
        noise_shape: of one sample's noise, (channels, height, width).
        condition: adds the tensors of the condition; `None` for an unconditional model.
        num_train_timesteps: the timestep is drawn from 0 … num_train_timesteps - 1.
        noise_offset: adds noise_offset · ε to every channel of the noise, ε a standard normal number per channel
            (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """

    def __init__(
        self,
        image: Callable[[Any, np.random.Generator], dict[str, torch.Tensor]],
        image_column: str,
        noise_shape: Sequence[int],
        condition: Transform | None = None,
        num_train_timesteps: int = 1000,
        noise_offset: float = 0.0,
    ) -> None:
        self.image = image
        self.image_column = image_column
        self.noise_shape = tuple(noise_shape)
        self.condition = condition
        self.num_train_timesteps = num_train_timesteps
        self.noise_offset = noise_offset

    def __call__(self, row: dict[str, Any], random: np.random.Generator) -> dict[str, torch.Tensor]:
        """What `image` and `condition` make, with `"noise"` (float32, of `noise_shape`) and `"timestep"` (int64)."""
        sample = self.image(row[self.image_column], random)
        if self.condition is not None:
            sample |= self.condition(row, random)
        noise = random.standard_normal(self.noise_shape, dtype=np.float32)
        if self.noise_offset:
            per_channel = (self.noise_shape[0], 1, 1)
            noise += self.noise_offset * random.standard_normal(per_channel, dtype=np.float32)
        timestep = torch.tensor(int(random.integers(self.num_train_timesteps)))
        return sample | {"noise": torch.from_numpy(noise), "timestep": timestep}


class DiffusionDataset(Dataset):
    """A dataset of rows, as training samples.

    Args:
        dataset: of Datasets, or with its `__getitems__`; rows are dictionaries.
        transform: makes a sample of a row.
        seed: of the draws, at least 0.
    """

    def __init__(self, dataset: Any, transform: Transform, seed: int = 0) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, torch.Tensor]:
        return self.__getitems__([epoch_and_index])[0]

    def __getitems__(self, batch: Sequence[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
        """The samples of a batch: the data loader asks for them at once, and Datasets reads rows faster together."""
        rows = self.dataset.__getitems__([index for _, index in batch])
        return [
            self.transform(row, np.random.default_rng((self.seed, epoch, index)))
            for (epoch, index), row in zip(batch, rows, strict=True)
        ]


class RunSampler(Sampler[tuple[int, int]]):
    """The order of a whole run, for one process: (epoch, index) pairs, each epoch a new permutation.

    Batches run across the ends of epochs. So every batch is full, no sample is left out or taken twice, and processes
    and accumulation steps share a large batch exactly.

    Args:
        num_samples: the size of the dataset.
        num_batches: batches of the whole run, for each process.
        batch_size: samples of one batch of one process.
        seed: of the permutations, at least 0.
        num_processes, process_index: batch b of the run goes to process b % num_processes.
        first_batch: batches of this process that an earlier part of the run has consumed.
    """

    def __init__(
        self,
        num_samples: int,
        num_batches: int,
        batch_size: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        first_batch: int = 0,
    ) -> None:
        self.num_samples = num_samples
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.first_batch = first_batch

    def __len__(self) -> int:
        return (self.num_batches - self.first_batch) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        permuted_epoch, permutation = -1, np.arange(0)
        for batch in range(self.first_batch, self.num_batches):
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            for position in range(start, start + self.batch_size):
                epoch, offset = divmod(position, self.num_samples)
                if epoch != permuted_epoch:
                    permuted_epoch = epoch
                    permutation = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
                yield epoch, int(permutation[offset])


class StreamingDiffusionDataset(IterableDataset):
    """A stream of rows, as training samples, without end: epoch after epoch.

    Rows are shuffled within blocks of `buffer_size`. The state is the stream's at the start of the block, which is
    read again on resumption: Datasets' own shuffle buffer is lost then. The draws depend on the process and the worker
    besides seed, epoch and place, since each reads a part of its own.

    Args:
        dataset: the stream; its rows are dictionaries.
        transform: makes a sample of a row.
        seed: of order and draws, at least 0.
        buffer_size: rows in a block.
        skip_bad_images: leave out images that cannot be decoded, instead of raising their `OSError`.
        num_processes, process_index: which part of the stream this process reads.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Transform,
        seed: int = 0,
        buffer_size: int = 1000,
        skip_bad_images: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.buffer_size = buffer_size
        self.skip_bad_images = skip_bad_images
        self.num_processes = num_processes
        self.process_index = process_index
        self.epoch, self.block, self.offset = 0, 0, 0
        self.block_state: dict[str, Any] | None = None  # of the stream, where the block starts

    def state_dict(self) -> dict[str, Any]:
        # As a text: torchdata sends the differences of states between processes and loses lists in them.
        block_state = json.dumps(self.block_state)
        return {"epoch": self.epoch, "block": self.block, "offset": self.offset, "block_state": block_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.block, self.offset = state["epoch"], state["block"], state["offset"]
        self.block_state = json.loads(state["block_state"])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        part = (self.process_index, worker.id if worker else 0)
        while True:
            dataset = self._shuffled_shards()
            if self.block_state is not None:
                dataset.load_state_dict(self.block_state)
            any_readable = self.block > 0 or self.offset > 0
            rows = iter(dataset)
            while block := list(islice(rows, self.buffer_size)):
                place = (self.seed, self.epoch, *part, self.block)
                order = np.random.default_rng(place).permutation(len(block))
                for offset in range(self.offset, len(block)):
                    random = np.random.default_rng((*place, offset))
                    self.offset = offset + 1
                    try:
                        sample = self.transform(block[order[offset]], random)
                    except OSError:
                        if not self.skip_bad_images:
                            raise
                        continue
                    any_readable = True
                    yield sample
                self.block, self.offset, self.block_state = self.block + 1, 0, dataset.state_dict()
            if self.block == 0:
                return  # more workers than shards: nothing to read for this one
            if not any_readable:
                raise OSError("None of the stream's images can be read.")
            self.epoch, self.block, self.offset, self.block_state = self.epoch + 1, 0, 0, None

    def _shuffled_shards(self) -> datasets.IterableDataset:
        """This process's part of the stream, its shards in the epoch's order."""
        # Not by `set_epoch`: Datasets keeps that number in memory that the workers share, and they are at different
        # epochs. A buffer of one row shuffles the shards alone; they are read one after the other, for Datasets 5.2
        # cannot restore the state of interleaved shards in a worker.
        seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        shuffled = self.dataset.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        return datasets.distributed.split_dataset_by_node(shuffled, self.process_index, self.num_processes)


def load_samples(
    args: argparse.Namespace, accelerator: Accelerator, transform: Transform, columns: Mapping[str, str]
) -> DiffusionDataset | StreamingDiffusionDataset:
    """`make_samples` of `load_rows`, for a transform that need not know the dataset."""
    return make_samples(args, accelerator, transform, load_rows(args, accelerator, columns))


def load_rows(
    args: argparse.Namespace, accelerator: Accelerator, columns: Mapping[str, str]
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads the dataset of a training script, the needed columns alone.

    Args:
        args: with the data flags of `training_args`.
        accelerator: of the run; its main process loads first, the others find the result in the cache.
        columns: as in `load_images`.

    Raises:
        OSError, ValueError: as in `load_images`.
    """
    with accelerator.main_process_first():
        dataset = load_images(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.cache_dir,
            columns=columns,
            max_train_samples=args.max_train_samples,
            streaming=args.streaming,
            seed=args.seed,
        )
    return dataset.select_columns(list(columns.values()))


def make_samples(
    args: argparse.Namespace,
    accelerator: Accelerator,
    transform: Transform,
    dataset: datasets.Dataset | datasets.IterableDataset,
) -> DiffusionDataset | StreamingDiffusionDataset:
    """Checks the images of a dataset, and makes training samples of its rows.

    Args:
        args: with the data flags of `training_args`.
        accelerator: of the run; its main process checks first, the others find the result in the cache. Each reads a
            part of a stream.
        transform: makes a sample of a row.
        dataset: from `load_rows`. The images of a stream are not checked.

    Raises:
        OSError: as in `drop_unreadable_images`.
    """
    if not args.streaming:
        with accelerator.main_process_first():
            dataset, num_bad_images = drop_unreadable_images(
                dataset, args.image_column, args.skip_bad_images, args.dataloader_num_workers
            )
        if num_bad_images:
            logger.warning(f"Left out {num_bad_images} images that cannot be read.")
        return DiffusionDataset(dataset, transform, args.seed)
    return StreamingDiffusionDataset(
        dataset,
        transform,
        args.seed,
        buffer_size=args.shuffle_buffer_size,
        skip_bad_images=args.skip_bad_images,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
