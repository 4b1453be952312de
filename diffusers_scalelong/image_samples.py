"""A folder of generated images that belongs to one pipeline and one seed, and is completed after interruptions."""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, DiffusionPipeline
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm


class GeneratedImages(Dataset):
    """PNG files by index, as RGB images, uint8 (height, width, 3).

    Args:
        paths: the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            with Image.open(self.paths[index]) as image:
                return np.array(image.convert("RGB"))
        except OSError as error:
            raise OSError(f"{self.paths[index]} cannot be read: {error}. Remove it and repeat the command.") from error


class ImageSampler:
    """Generates the images of one pipeline and one seed into a folder, and keeps those that are there.

    Image i depends on the pipeline, its arguments, the seed and i, and neither on the number of processes nor on
    interruptions. In float32 on a CPU it is the same bit for bit for one batch size and number of threads.

    Args:
        folder: exists. It gets `sampling.json`, which tells how the images are made, and `images/000000.png`, ….
        pipeline: takes `generator`, `output_type` and, where there are no `conditions`, `batch_size`.
        arguments: JSON values, for every call of the pipeline.
        conditions: arguments with one value per image, by name; image i gets value i modulo their number.
        seed: at least 0.
        accelerator: gives the processes, the device and the mixed precision.

    Attributes:
        settings: what decides the images, by name; the content of `sampling.json`.

    Raises:
        OSError: nothing tells how the images that are there were made.
        ValueError: they were made differently.
    """

    def __init__(
        self,
        folder: Path,
        pipeline: DiffusionPipeline,
        arguments: Mapping[str, Any],
        conditions: Mapping[str, Sequence[Any]],
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        self.folder = folder
        self.pipeline = pipeline
        self.arguments = arguments
        self.conditions = conditions
        self.seed = seed
        self.accelerator = accelerator
        self.settings: dict[str, Any] = {
            "pipeline": type(pipeline).__name__,
            "weights": _fingerprint(pipeline),
            "scheduler": [type(pipeline.scheduler).__name__, _config(pipeline.scheduler)],
            "seed": seed,
            "mixed_precision": accelerator.mixed_precision,
            **arguments,
        }
        for name, values in conditions.items():
            digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
            self.settings[name] = {"number": len(values), "sha256": digest}
        self._record = folder / "sampling.json"
        self._check_folder()

    def _check_folder(self) -> None:
        if not self._record.exists():
            if any((self.folder / "images").glob("*.png")):
                raise OSError(
                    f"{self.folder}/images holds images, but no {self._record.name} says how they were made. Choose "
                    "another --output_dir."
                )
            return
        try:
            stored = json.loads(self._record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{self._record} is damaged ({error}). Choose another --output_dir.") from error
        names = stored.keys() | self.settings.keys()
        differing = sorted(name for name in names if stored.get(name) != self.settings.get(name))
        if differing:
            raise ValueError(
                f"--output_dir {self.folder} holds images that were generated differently: {', '.join(differing)}. "
                "Continue them with the pipeline and the arguments that made them, or choose another --output_dir."
            )

    def sample(self, num_images: int, batch_size: int) -> GeneratedImages:
        """Generates what is missing of the first images, each process its share. Every process must call.

        A batch is generated whole, even where only one of its images is missing: so every image is computed beside
        the same others.

        Args:
            num_images: how many there are in the end.
            batch_size: of one process.

        Returns:
            The first `num_images` images.

        Raises:
            FloatingPointError: the pipeline gave values that are not finite.
        """
        accelerator = self.accelerator
        paths = [self.folder / "images" / f"{index:06d}.png" for index in range(num_images)]
        missing = {index for index, path in enumerate(paths) if not path.exists()}
        accelerator.wait_for_everyone()  # every process has looked before the first one writes
        if accelerator.is_main_process:
            (self.folder / "images").mkdir(exist_ok=True)
            write_whole(self._record, json.dumps(self.settings, indent=2).encode())
        accelerator.wait_for_everyone()

        batches = [range(num_images)[start : start + batch_size] for start in range(0, num_images, batch_size)]
        todo = [batch for batch in batches if not missing.isdisjoint(batch)]
        mine = todo[accelerator.process_index :: accelerator.num_processes]
        self.pipeline.to(accelerator.device)
        self.pipeline.set_progress_bar_config(desc="Denoising", leave=False, disable=not accelerator.is_main_process)
        progress_bar = tqdm(
            total=sum(len(missing.intersection(batch)) for batch in mine),
            desc="Sampling" if accelerator.num_processes == 1 else "Sampling (the first process)",
            unit="image",
            disable=not accelerator.is_main_process,
        )
        for batch in mine:
            for index, pixels in zip(batch, self._generate(batch), strict=True):
                if index in missing:
                    png = io.BytesIO()
                    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(png, format="PNG")
                    write_whole(paths[index], png.getvalue())
                    progress_bar.update()
        progress_bar.close()
        self.pipeline.to("cpu")
        accelerator.wait_for_everyone()
        return GeneratedImages(paths)

    def _generate(self, batch: range) -> np.ndarray:
        """The images with the indices of `batch`, uint8 (len(batch), height, width, channels)."""
        varying: dict[str, Any] = {
            name: [values[index % len(values)] for index in batch] for name, values in self.conditions.items()
        }
        seeds = [np.random.SeedSequence((self.seed, index)).generate_state(1, np.uint64) for index in batch]
        # Generators of the CPU: the noise is the same on every device.
        generators = [torch.Generator().manual_seed(int(seed[0])) for seed in seeds]
        with self.accelerator.autocast():
            images = self.pipeline(
                **self.arguments,
                **(varying or {"batch_size": len(batch)}),
                generator=generators,
                output_type="pt",
            ).images
        images = images.float().cpu().permute(0, 2, 3, 1).numpy()
        if not np.isfinite(images).all():
            raise FloatingPointError(
                f"Images {batch[0]} to {batch[-1]} hold values that are not finite. With --mixed_precision fp16, try "
                "bf16 or no; otherwise the pipeline's weights are at fault."
            )
        return (images * 255).round().astype(np.uint8)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all: aside, flushed to the disk, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _fingerprint(pipeline: DiffusionPipeline) -> str:
    """A SHA-256 of the weights, and of the configs that give them their meaning (the κ_i live in there)."""
    digest = hashlib.sha256()
    for name, component in sorted(pipeline.components.items()):
        if not isinstance(component, torch.nn.Module):
            continue
        if isinstance(component, ConfigMixin):
            digest.update(json.dumps([name, _config(component)], sort_keys=True).encode())
        for key, tensor in component.state_dict().items():
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _config(component: ConfigMixin) -> dict[str, Any]:
    """A config as JSON has it, without the entries about where it came from."""
    own = {name: value for name, value in component.config.items() if not name.startswith("_")}
    return json.loads(json.dumps(own, default=str))
