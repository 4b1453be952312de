"""Samples images from a saved pipeline and compares them with real ones: FID, Inception Score, precision and recall.

    accelerate launch training/evaluate.py --pretrained_model_name_or_path outputs/run --dataset_name digits \\
        --num_images 2000 --feature_extractor facebook/dinov2-small --output_dir outputs/evaluation

Any number of processes; the same command continues where it was interrupted.
"""

import argparse
import hashlib
import inspect
import io
import json
import logging
import os
import platform
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ModelMixin,
)
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import diffusers_scalelong
from diffusers_scalelong.hub import command_line
from diffusers_scalelong.image_data import ImageTransform, drop_unreadable_images, load_images
from diffusers_scalelong.image_metrics import ImageMetrics, load_feature_extractor
from diffusers_scalelong.plots import save_image_grid

logger = get_logger(__name__, log_level="INFO")

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmsolver": DPMSolverMultistepScheduler}
NUM_NEIGHBOURS = 3  # of precision and recall, as in their paper
GRID_IMAGES = 16


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--pretrained_model_name_or_path", required=True, help="Pipeline: a folder or a Hub name.")
    sampling.add_argument("--num_images", type=int, default=50_000, help="Images to generate.")
    sampling.add_argument("--batch_size", type=int, default=64, help="Per device.")
    sampling.add_argument("--num_inference_steps", type=int, help="Default: the pipeline's.")
    sampling.add_argument("--scheduler", choices=list(SCHEDULERS), help="Default: the one saved with the pipeline.")
    sampling.add_argument("--guidance_scale", type=float, help="Default: the pipeline's.")
    sampling.add_argument("--num_classes", type=int, help="Sample classes 0 … N-1. Default: all but the null class.")
    sampling.add_argument("--resolution", type=int, help="Pixels per side. Default: the pipeline's.")
    sampling.add_argument("--seed", type=int, default=0, help="Image i depends on it and on i alone.")
    sampling.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as in accelerate config."
    )

    data = parser.add_argument_group("real images")
    data.add_argument("--dataset_name", help="Hub name, local folder, parquet file, or 'digits' (needs no download).")
    data.add_argument("--dataset_config_name", help="The configuration of a dataset that has several.")
    data.add_argument("--train_data_dir", help="A folder of images. Ignored with --dataset_name.")
    data.add_argument("--image_column", default="image", help="The column that holds the images.")
    data.add_argument("--caption_column", default="text", help="The prompts of a text-to-image pipeline.")
    data.add_argument("--max_train_samples", type=int, help="Compare with a random part of the dataset, of this size.")
    data.add_argument("--skip_bad_images", action="store_true", help="Leave out images that cannot be read.")
    data.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that load images.")

    other = parser.add_argument_group("features and output")
    other.add_argument(
        "--feature_extractor",
        default="inception",
        help="'inception', or a vision model of Transformers: a folder or a Hub name.",
    )
    other.add_argument("--cache_dir", help="Where downloaded models and datasets are kept.")
    other.add_argument("--output_dir", required=True, help="Images, metrics.json and grid.png go here.")
    return parser


def check_args(args: argparse.Namespace) -> None:
    for name in ("batch_size", "num_inference_steps", "num_classes", "resolution", "max_train_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, but is {value}.")
    for name in ("seed", "dataloader_num_workers"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be at least 0, but is {getattr(args, name)}.")
    if args.num_images <= NUM_NEIGHBOURS:
        raise ValueError(
            f"--num_images must be at least {NUM_NEIGHBOURS + 1}, the fewest for precision and recall with "
            f"k = {NUM_NEIGHBOURS}, but is {args.num_images}. Scores worth comparing need thousands."
        )
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output_dir {args.output_dir} cannot be created: {error}") from error
    if not os.access(output_dir, os.W_OK):
        raise OSError(f"--output_dir {args.output_dir} is not writable.")


# ---- The pipeline and what it is called with


def load_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    try:
        pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, cache_dir=args.cache_dir)
    except Exception as error:  # Diffusers and the Hub have many kinds
        raise OSError(f"No pipeline could be loaded from {args.pretrained_model_name_or_path}: {error}") from error
    if getattr(pipeline, "unet", None) is None:
        raise ValueError(f"A {type(pipeline).__name__} has no `unet`, and this script samples pipelines that have.")
    if args.scheduler is not None:
        scheduler = SCHEDULERS[args.scheduler].from_config(pipeline.scheduler.config)
        if isinstance(pipeline, DDIMPipeline) and args.scheduler != "ddim":  # it passes η, which others do not take
            pipeline = DDPMPipeline(unet=pipeline.unet, scheduler=scheduler)
        pipeline.scheduler = scheduler
    return pipeline


def takes_prompts(pipeline: DiffusionPipeline) -> bool:
    parameters = inspect.signature(pipeline.__call__).parameters
    return "prompt" in parameters and pipeline.unet.config.get("cross_attention_dim") is not None


def call_arguments(
    pipeline: DiffusionPipeline, args: argparse.Namespace, dataset: datasets.Dataset
) -> tuple[dict[str, Any], int | None, list[str] | None]:
    """What the pipeline is called with: arguments of every image, the number of classes, the prompts."""
    parameters = inspect.signature(pipeline.__call__).parameters
    config, name = pipeline.unet.config, type(pipeline).__name__
    constant: dict[str, Any] = {}

    num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
    steps = args.num_inference_steps or min(parameters["num_inference_steps"].default, num_train_timesteps)
    if steps > num_train_timesteps:
        raise ValueError(f"--num_inference_steps {steps} exceeds the {num_train_timesteps} that the model learned.")
    constant["num_inference_steps"] = steps

    if "guidance_scale" in parameters:
        default = parameters["guidance_scale"].default
        constant["guidance_scale"] = default if args.guidance_scale is None else args.guidance_scale
    elif args.guidance_scale is not None:
        raise ValueError(f"A {name} takes no --guidance_scale.")

    if "height" in parameters:
        if args.resolution is not None:
            constant |= {"height": args.resolution, "width": args.resolution}
    elif args.resolution is not None:
        vae = getattr(pipeline, "vae", None)
        factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        if config.sample_size * factor != args.resolution:
            raise ValueError(
                f"A {name} makes images of a fixed size, here {config.sample_size * factor} pixels, not the "
                f"--resolution {args.resolution}. Leave the flag out."
            )

    num_classes = None
    if config.get("num_class_embeds") is not None:
        if "class_labels" not in parameters:
            raise ValueError(f"The UNet is class-conditional, and a {name} gives it no labels: use ScaleLongPipeline.")
        num_classes = count_classes(config.num_class_embeds, constant.get("guidance_scale", 1.0), args, dataset)
    elif args.num_classes is not None:
        raise ValueError("--num_classes is for class-conditional pipelines, and this one is not.")

    prompts = None
    if takes_prompts(pipeline):
        captions = dataset[args.caption_column]
        prompts = [caption if isinstance(caption, str) or not caption else caption[0] for caption in captions]
        bad = next((index for index, prompt in enumerate(prompts) if not isinstance(prompt, str)), None)
        if bad is not None:
            raise ValueError(
                f"--caption_column {args.caption_column} must hold texts or lists of texts, but row {bad} holds "
                f"{captions[bad]!r}."
            )
    return constant, num_classes, prompts


def count_classes(
    num_class_embeds: int, guidance_scale: float, args: argparse.Namespace, dataset: datasets.Dataset
) -> int:
    """The classes to sample. Where a model has learned a null class, it is the last embedding."""
    in_dataset = [f.num_classes for f in dataset.features.values() if isinstance(f, datasets.ClassLabel)]
    has_null_class = guidance_scale > 1 or in_dataset == [num_class_embeds - 1]
    most = num_class_embeds - has_null_class
    if args.num_classes is not None and args.num_classes > most:
        raise ValueError(f"--num_classes {args.num_classes} exceeds the {most} of the pipeline.")
    return args.num_classes or most


def fingerprint(pipeline: DiffusionPipeline) -> str:
    """A SHA-256 of the weights, and of the configs that give them their meaning (the κ_i live in there)."""
    digest = hashlib.sha256()
    for name, component in sorted(pipeline.components.items()):
        if not isinstance(component, torch.nn.Module):
            continue
        if isinstance(component, ModelMixin):
            digest.update(json.dumps([name, public(component.config)], sort_keys=True).encode())
        for key, tensor in component.state_dict().items():
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def public(config: dict[str, Any]) -> dict[str, Any]:
    """A config as JSON, without the entries about where it came from."""
    return json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, default=str))


# ---- The generated images


def check_sampling_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """Makes sure that images which are there already are those that this run would generate."""
    path = output_dir / "sampling.json"
    if not path.exists():
        if any((output_dir / "images").glob("*.png")):
            raise OSError(
                f"{output_dir}/images holds images, but no {path.name} says how they were made. Choose another "
                "--output_dir."
            )
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is damaged ({error}). Choose another --output_dir.") from error
    differing = sorted(key for key in stored.keys() | settings.keys() if stored.get(key) != settings.get(key))
    if differing:
        raise ValueError(
            f"--output_dir {output_dir} holds images that were generated differently: {', '.join(differing)}. "
            "Continue them with the pipeline and the arguments that made them, or choose another --output_dir."
        )


def image_path(output_dir: Path, index: int) -> Path:
    return output_dir / "images" / f"{index:06d}.png"


def sample_images(
    pipeline: DiffusionPipeline,
    constant: dict[str, Any],
    num_classes: int | None,
    prompts: Sequence[str] | None,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> None:
    """Generates the images that are missing, each process its share of the batches.

    A batch is generated whole, even where only one of its images is missing: so every image is computed beside the
    same others, bit for bit alike, however often the run was interrupted and however many processes there are.
    """
    output_dir = Path(args.output_dir)
    batches = [
        range(start, min(start + args.batch_size, args.num_images))
        for start in range(0, args.num_images, args.batch_size)
    ]
    missing = {index for index in range(args.num_images) if not image_path(output_dir, index).exists()}
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    todo = [batch for batch in batches if not missing.isdisjoint(batch)]
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    logger.info(f"Sampling {len(missing)} of {args.num_images} images; {args.num_images - len(missing)} are there.")

    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(desc="Denoising", leave=False, disable=not accelerator.is_main_process)
    progress_bar = tqdm(
        total=sum(len(missing.intersection(batch)) for batch in mine),
        desc="Sampling" if accelerator.num_processes == 1 else "Sampling (the first process)",
        unit="image",
        disable=not accelerator.is_main_process,
    )
    for batch in mine:
        arguments = dict(constant)
        if num_classes is not None:
            arguments["class_labels"] = [index % num_classes for index in batch]
        if prompts is not None:
            arguments["prompt"] = [prompts[index % len(prompts)] for index in batch]
        if num_classes is None and prompts is None:
            arguments["batch_size"] = len(batch)
        seeds = [np.random.SeedSequence((args.seed, index)).generate_state(1, np.uint64) for index in batch]
        # Generators of the CPU: the noise is the same on every device.
        generators = [torch.Generator().manual_seed(int(seed[0])) for seed in seeds]
        with accelerator.autocast():
            images = pipeline(**arguments, generator=generators, output_type="pt").images
        images = images.float().cpu().permute(0, 2, 3, 1).numpy()
        if not np.isfinite(images).all():
            raise FloatingPointError(
                f"Images {batch[0]} to {batch[-1]} hold values that are not finite. With --mixed_precision fp16, try "
                "bf16 or no; otherwise the pipeline's weights are at fault."
            )
        for index, pixels in zip(batch, (images * 255).round().astype(np.uint8), strict=True):
            if index in missing:
                png = io.BytesIO()
                Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(png, format="PNG")
                write_whole(image_path(output_dir, index), png.getvalue())
                progress_bar.update()
    progress_bar.close()
    accelerator.wait_for_everyone()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


# ---- Features of both sets


class GeneratedImages(Dataset):
    """The PNGs of a run, as inputs of the feature extractor."""

    def __init__(self, output_dir: Path, num_images: int, preprocess: Callable[[np.ndarray], torch.Tensor]) -> None:
        self.output_dir = output_dir
        self.num_images = num_images
        self.preprocess = preprocess

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> torch.Tensor:
        path = image_path(self.output_dir, index)
        try:
            with Image.open(path) as image:
                return self.preprocess(np.array(image.convert("RGB")))
        except OSError as error:
            raise OSError(f"{path} cannot be read: {error}. Remove it and repeat the command.") from error


class RealImages(Dataset):
    """A dataset's images, resized and cropped as in training, as inputs of the feature extractor."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        transform: ImageTransform,
        preprocess: Callable[[np.ndarray], torch.Tensor],
    ) -> None:
        self.dataset = dataset.select_columns([image_column])
        self.image_column = image_column
        self.transform = transform
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self.transform(self.dataset[index][self.image_column], np.random.default_rng(index))["input"]
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        rgb = pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
        return self.preprocess(rgb)


def extract_features(
    extractor: torch.nn.Module,
    images: Dataset,
    real: bool,
    metrics: ImageMetrics,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> None:
    """Feeds the features of all images to `metrics`, on the main process: in order, for any number of processes."""
    loader = accelerator.prepare(
        DataLoader(images, batch_size=args.batch_size, num_workers=args.dataloader_num_workers)
    )
    for inputs in tqdm(
        loader,
        desc=f"Features of {'real' if real else 'generated'} images",
        unit="batch",
        disable=not accelerator.is_main_process,
    ):
        outputs = [output for output in extractor(inputs) if output is not None]
        features, *logits = accelerator.gather_for_metrics(outputs)
        if accelerator.is_main_process:
            metrics.update(features, logits[0] if logits else None, real)


# ---- The report


def notes_on(metrics: dict[str, float | None], num_images: int, num_real_images: int, num_features: int) -> list[str]:
    notes = []
    for kind, number in (("generated", num_images), ("real", num_real_images)):
        if number <= num_features:
            notes.append(
                f"FID is unreliable: {number} {kind} images are too few for features of {num_features} "
                "dimensions, whose covariance matrix is then singular. Take several times as many."
            )
    if metrics["inception_score"] is None:
        notes.append(
            "Inception Score is not available: it needs class probabilities, and the feature extractor has no "
            "classification head."
        )
    return notes


def table(metrics: dict[str, float | None]) -> str:
    score, deviation = metrics["inception_score"], metrics["inception_score_std"]
    rows = {
        "FID (lower is better)": f"{metrics['fid']:.4f}",
        "Inception Score": "not available" if score is None else f"{score:.4f} ± {deviation:.4f}",
        f"Precision (k = {NUM_NEIGHBOURS})": f"{metrics['precision']:.4f}",
        f"Recall (k = {NUM_NEIGHBOURS})": f"{metrics['recall']:.4f}",
    }
    return "\n".join(f"{name:<24}{value}" for name, value in rows.items())


def main(args: argparse.Namespace) -> None:
    check_args(args)
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # A process waits for the slowest one, which may be a whole batch behind.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        level=logging.INFO if accelerator.is_local_main_process else logging.ERROR,
    )
    datasets.utils.logging.set_verbosity_warning()

    # All that can be wrong is found before the sampling.
    with accelerator.main_process_first():
        pipeline = load_pipeline(args)
        columns = {"image_column": args.image_column}
        if takes_prompts(pipeline):
            columns["caption_column"] = args.caption_column
        dataset = load_images(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.cache_dir,
            columns,
            args.max_train_samples,
            seed=args.seed,
        )
        dataset, num_bad_images = drop_unreadable_images(
            dataset, args.image_column, args.skip_bad_images, args.dataloader_num_workers
        )
        if num_bad_images:
            logger.warning(f"Left out {num_bad_images} images that cannot be read.")
        if len(dataset) <= NUM_NEIGHBOURS:
            raise ValueError(
                f"There are {len(dataset)} real images, but precision and recall with k = {NUM_NEIGHBOURS} need at "
                f"least {NUM_NEIGHBOURS + 1}. Scores worth comparing need thousands."
            )
        extractor = load_feature_extractor(args.feature_extractor, args.cache_dir).to(accelerator.device)
    constant, num_classes, prompts = call_arguments(pipeline, args, dataset)
    settings = {
        "pipeline": type(pipeline).__name__,
        "weights": fingerprint(pipeline),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": public(pipeline.scheduler.config),
        **constant,
        "num_classes": num_classes,
        "prompts": None if prompts is None else hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "seed": args.seed,
        "mixed_precision": accelerator.mixed_precision,
    }
    check_sampling_settings(output_dir, settings)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (output_dir / "images").mkdir(exist_ok=True)
        write_whole(output_dir / "sampling.json", json.dumps(settings, indent=2).encode())
    accelerator.wait_for_everyone()

    sample_images(pipeline, constant, num_classes, prompts, args, accelerator)
    pipeline.to("cpu")

    with Image.open(image_path(output_dir, 0)) as first:
        (width, height), channels = first.size, len(first.getbands())
    if width != height:
        raise ValueError(f"The pipeline's images are {width}×{height} pixels, but this script compares square ones.")
    metrics = ImageMetrics(extractor.num_features, NUM_NEIGHBOURS)
    real_images = RealImages(
        dataset, args.image_column, ImageTransform(width, channels, center_crop=True), extractor.preprocess
    )
    generated_images = GeneratedImages(output_dir, args.num_images, extractor.preprocess)
    extract_features(extractor, real_images, True, metrics, args, accelerator)
    extract_features(extractor, generated_images, False, metrics, args, accelerator)

    if accelerator.is_main_process:
        scores = metrics.compute(args.seed)
        notes = notes_on(scores, args.num_images, len(dataset), extractor.num_features)
        packages = ("diffusers", "transformers", "torch", "torchmetrics", "scikit-learn", "accelerate")
        report = {
            "metrics": scores,
            "notes": notes,
            "num_images": args.num_images,
            "num_real_images": len(dataset),
            "dataset": args.dataset_name or args.train_data_dir,
            "resolution": width,
            "feature_extractor": args.feature_extractor,
            "num_features": extractor.num_features,
            "num_neighbours": NUM_NEIGHBOURS,
            "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
            "sampling": settings,
            "command": command_line(),
            "versions": {
                "diffusers-scalelong": diffusers_scalelong.__version__,
                "python": platform.python_version(),
                **{package: version(package) for package in packages},
            },
        }
        write_whole(output_dir / "metrics.json", json.dumps(report, indent=2).encode())
        indices = range(min(GRID_IMAGES, args.num_images))
        pixels = np.stack([np.asarray(Image.open(image_path(output_dir, index))) for index in indices])
        save_image_grid(pixels.reshape(len(indices), height, width, channels) / 255, output_dir / "grid.png")
        for note in notes:
            logger.warning(note)
        print(f"\n{args.num_images} generated and {len(dataset)} real images, features of {args.feature_extractor}\n")
        print(table(scores))
        print(f"\nIn {output_dir}: metrics.json, grid.png, images/", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main(build_parser().parse_args())
