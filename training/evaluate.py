"""Samples images from a saved pipeline and compares them with real ones: FID, Inception Score, precision and recall.

    accelerate launch training/evaluate.py --pretrained_model_name_or_path outputs/run --dataset_name digits \\
        --num_images 2000 --feature_extractor facebook/dinov2-small --output_dir outputs/evaluation

Any number of processes; the same command continues where it was interrupted.
"""

import argparse
import inspect
import json
import platform
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import DiffusionPipeline
from PIL import Image
from torch.utils.data import Dataset

import diffusers_scalelong
from diffusers_scalelong.conditions import check_captions
from diffusers_scalelong.hub import command_line
from diffusers_scalelong.image_data import ImageTransform, drop_unreadable_images, load_images
from diffusers_scalelong.image_metrics import ImageMetrics, extract_features, load_feature_extractor
from diffusers_scalelong.image_samples import ImageSampler, write_whole
from diffusers_scalelong.plots import save_image_grid
from diffusers_scalelong.training_args import new_parser
from diffusers_scalelong.training_setup import check_output_dir

NUM_NEIGHBOURS = 3  # of precision and recall, as in their paper
GRID_IMAGES = 16


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    group = parser.add_argument_group("sampling")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Pipeline: a folder or a Hub name.")
    group.add_argument("--num_images", type=int, default=50_000, help="Images to generate.")
    group.add_argument("--batch_size", type=int, default=64, help="Per device.")
    group.add_argument("--num_inference_steps", type=int, help="Default: the pipeline's.")
    group.add_argument("--guidance_scale", type=float, help="Default: the pipeline's.")
    group.add_argument("--num_classes", type=int, help="Sample classes 0 … N-1. Default: all but the null class.")
    group.add_argument("--resolution", type=int, help="Pixels per side. Default: the pipeline's.")
    group.add_argument("--seed", type=int, default=0, help="Image i depends on it and on i alone.")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as in accelerate config.")

    group = parser.add_argument_group("real images")
    group.add_argument("--dataset_name", help="Hub name, local folder, parquet file, or 'digits' (needs no download).")
    group.add_argument("--dataset_config_name", help="The configuration of a dataset that has several.")
    group.add_argument("--train_data_dir", help="A folder of images. Ignored with --dataset_name.")
    group.add_argument("--image_column", default="image", help="The column that holds the images.")
    group.add_argument("--caption_column", default="text", help="The prompts of a text-to-image pipeline.")
    group.add_argument("--max_train_samples", type=int, help="Compare with a random part of this size.")
    group.add_argument("--skip_bad_images", action="store_true", help="Leave out images that cannot be read.")
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that load images.")

    group = parser.add_argument_group("features and output")
    group.add_argument("--feature_extractor", default="inception", help="Or a vision model of Transformers.")
    group.add_argument("--cache_dir", help="Where downloaded models and datasets are kept.")
    group.add_argument("--output_dir", required=True, help="Images, metrics.json and grid.png go here.")
    return parser


def check_args(args: argparse.Namespace) -> None:
    least = dict.fromkeys(("batch_size", "num_inference_steps", "num_classes", "resolution", "max_train_samples"), 1)
    least |= {"seed": 0, "dataloader_num_workers": 0, "num_images": NUM_NEIGHBOURS + 1}
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name} must be at least {minimum}, but is {value}.")
    check_output_dir(args.output_dir, resume=True, overwrite=False)


def load_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    try:
        pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, cache_dir=args.cache_dir)
    except Exception as error:  # Diffusers and the Hub have many kinds
        raise OSError(f"No pipeline could be loaded from {args.pretrained_model_name_or_path}: {error}") from error
    if getattr(pipeline, "unet", None) is None:
        raise ValueError(f"A {type(pipeline).__name__} has no `unet`, and this script samples pipelines that have.")
    return pipeline


def parameters_of(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What the pipeline can be called with, and the defaults."""
    return {name: p.default for name, p in inspect.signature(pipeline.__call__).parameters.items()}


def takes_prompts(pipeline: DiffusionPipeline) -> bool:
    return "prompt" in parameters_of(pipeline) and pipeline.unet.config.get("cross_attention_dim") is not None


def shared_arguments(pipeline: DiffusionPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline is called with for every image: the flags, and its own defaults, which are recorded too."""
    parameters, arguments = parameters_of(pipeline), {}
    flags = {"num_inference_steps": "num_inference_steps", "guidance_scale": "guidance_scale"}
    for name, flag in (flags | {"height": "resolution", "width": "resolution"}).items():
        value = getattr(args, flag)
        if name not in parameters and value is not None:
            raise ValueError(f"A {type(pipeline).__name__} takes no `{name}`: leave --{flag} out.")
        if name in parameters:
            arguments[name] = parameters[name] if value is None else value
    learned = pipeline.scheduler.config.num_train_timesteps
    if args.num_inference_steps is not None and args.num_inference_steps > learned:
        raise ValueError(f"--num_inference_steps {args.num_inference_steps} exceeds the {learned} of the training.")
    arguments["num_inference_steps"] = min(arguments["num_inference_steps"], learned)
    return arguments


def conditions_of_images(
    pipeline: DiffusionPipeline, guidance_scale: float, args: argparse.Namespace, dataset: datasets.Dataset
) -> dict[str, list]:
    """The classes and prompts that the images take turns with."""
    conditions: dict[str, list] = {}
    num_class_embeds = pipeline.unet.config.get("num_class_embeds")
    if num_class_embeds is not None:
        if "class_labels" not in parameters_of(pipeline):
            raise ValueError(
                f"The UNet is class-conditional, and a {type(pipeline).__name__} gives it no labels: use "
                "ScaleLongPipeline."
            )
        # Where a model has learned a null class, it is the last embedding.
        in_dataset = [f.num_classes for f in dataset.features.values() if isinstance(f, datasets.ClassLabel)]
        most = num_class_embeds - (guidance_scale > 1 or in_dataset == [num_class_embeds - 1])
        if args.num_classes is not None and args.num_classes > most:
            raise ValueError(f"--num_classes {args.num_classes} exceeds the {most} of the pipeline.")
        conditions["class_labels"] = list(range(args.num_classes or most))
    elif args.num_classes is not None:
        raise ValueError("--num_classes is for class-conditional pipelines, and this one is not.")
    if takes_prompts(pipeline):
        check_captions(dataset, args.caption_column)
        captions = dataset[args.caption_column]
        conditions["prompt"] = [caption if isinstance(caption, str) else caption[0] for caption in captions]
    return conditions


class RealImages(Dataset):
    """A dataset's images by index, resized and cropped in the middle to the generated ones' size."""

    def __init__(self, dataset: datasets.Dataset, image_column: str, resolution: int, channels: int) -> None:
        self.dataset = dataset.select_columns([image_column])
        self.image_column = image_column
        self.transform = ImageTransform(resolution, channels, center_crop=True)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self.transform(self.dataset[index][self.image_column], np.random.default_rng(0))["input"]
        return ((image + 1) * 127.5).round().byte()[:3].expand(3, -1, -1).permute(1, 2, 0).numpy()


def main(args: argparse.Namespace) -> None:
    check_args(args)
    output_dir = Path(args.output_dir)
    # A process waits for the slowest one, which may be a whole batch behind.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[patience])

    # All that can be wrong is found before the sampling
    with accelerator.main_process_first():
        pipeline = load_pipeline(args)
        columns = {"image_column": args.image_column}
        if takes_prompts(pipeline):
            columns["caption_column"] = args.caption_column
        source = (args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
        dataset = load_images(*source, columns, args.max_train_samples, seed=args.seed)
        dataset, num_bad_images = drop_unreadable_images(
            dataset, args.image_column, args.skip_bad_images, args.dataloader_num_workers
        )
        extractor = load_feature_extractor(args.feature_extractor, args.cache_dir).to(accelerator.device)
    if num_bad_images:
        accelerator.print(f"Left out {num_bad_images} images that cannot be read.")
    if len(dataset) <= NUM_NEIGHBOURS:
        raise ValueError(
            f"There are {len(dataset)} real images, but precision and recall with k = {NUM_NEIGHBOURS} need at "
            f"least {NUM_NEIGHBOURS + 1}. Scores worth comparing need thousands."
        )
    arguments = shared_arguments(pipeline, args)
    conditions = conditions_of_images(pipeline, arguments.get("guidance_scale", 1.0), args, dataset)
    sampler = ImageSampler(output_dir, pipeline, arguments, conditions, args.seed, accelerator)

    # Sample
    generated_images = sampler.sample(args.num_images, args.batch_size)
    with Image.open(generated_images.paths[0]) as first:
        (width, height), channels = first.size, len(first.getbands())
    if width != height:
        raise ValueError(f"The pipeline's images are {width}×{height} pixels, but this script compares square ones.")

    # Compare
    real_images = RealImages(dataset, args.image_column, width, channels)
    metrics = ImageMetrics(extractor.num_features, NUM_NEIGHBOURS)
    for images, real, desc in ((real_images, True, "Real images"), (generated_images, False, "Generated images")):
        loading = (args.batch_size, args.dataloader_num_workers, desc)
        for features, logits in extract_features(extractor, images, accelerator, *loading):
            if accelerator.is_main_process:
                metrics.update(features, logits, real)

    # Report
    if accelerator.is_main_process:
        scores, notes = metrics.compute(args.seed), metrics.notes()
        packages = ("diffusers", "transformers", "torch", "torchmetrics", "scikit-learn", "pillow")
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
            "sampling": sampler.settings,
            "command": command_line(),
            "versions": {"diffusers-scalelong": diffusers_scalelong.__version__, "python": platform.python_version()}
            | {package: version(package) for package in packages},
        }
        write_whole(output_dir / "metrics.json", json.dumps(report, indent=2).encode())
        grid = [generated_images[index] for index in range(min(GRID_IMAGES, args.num_images))]
        save_image_grid(np.stack(grid) / 255, output_dir / "grid.png")
        print(f"\n{args.num_images} generated and {len(dataset)} real images, features of {args.feature_extractor}\n")
        for name, score in scores.items():
            print(f"{name:<20}{score:10.4f}")
        print("\n".join(["", *notes, f"In {output_dir}: metrics.json, grid.png, images/"]), flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main(build_parser().parse_args())
