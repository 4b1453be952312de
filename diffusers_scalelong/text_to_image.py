"""What the text-to-image training scripts share: the pretrained pipeline, its frozen parts, latents and validation."""

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ModelMixin
from PIL import Image
from torch import nn

from .conditions import Captions, check_captions
from .diffusion_data import (
    DiffusionDataset,
    DiffusionTransform,
    StreamingDiffusionDataset,
    load_rows,
    make_samples,
)
from .image_data import ImageTransform
from .models import ScaleLongUNet2DConditionModel
from .training_args import kappa_argument

Module = TypeVar("Module", bound=nn.Module)


def add_text_to_image_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text-to-image")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Pipeline: a folder or a Hub name.")
    group.add_argument("--revision", help="Branch, tag or commit of the pipeline on the Hub.")
    group.add_argument("--variant", help="Variant of the pipeline's weight files, such as fp16.")
    group.add_argument("--caption_column", default="text", help="Holds texts, or lists of which one is drawn.")
    group.add_argument("--prediction_type", choices=["epsilon", "v_prediction"], help="Default: the pipeline's own.")
    group.add_argument("--snr_gamma", type=float, help="γ of min-SNR-γ weighting of the loss; 5.0 is recommended.")
    group.add_argument("--noise_offset", type=float, default=0.0, help="Scale of the noise added per channel.")
    group.add_argument("--validation_epochs", type=int, default=1, help="Epochs between validation images.")
    group.add_argument("--num_validation_images", type=int, default=4, help="For each validation prompt.")


def check_base_pipeline(args: argparse.Namespace, pipeline_class: type[DiffusionPipeline]) -> None:
    """Makes sure, by its `model_index.json` alone, that `--pretrained_model_name_or_path` is what the script trains.

    Raises:
        OSError: there is no such pipeline.
        ValueError: it is of another class.
    """
    name = args.pretrained_model_name_or_path
    try:
        if Path(name).is_file():  # Diffusers would take it for the config
            raise OSError("It is a single file.")
        index = DiffusionPipeline.load_config(name, revision=args.revision, cache_dir=args.cache_dir)
    except OSError as error:
        raise OSError(
            f"--pretrained_model_name_or_path {name} is no pipeline: give a folder or a Hub repository with a "
            f"model_index.json. {error}"
        ) from error
    found = index.get("_class_name")
    if found != pipeline_class.__name__:
        raise ValueError(
            f"--pretrained_model_name_or_path {name} is a {found}, but this script trains a {pipeline_class.__name__}."
        )


def check_prompts(prompts: Sequence[str]) -> None:
    """Makes sure that no validation prompt is empty.

    Raises:
        ValueError: one is.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("A validation prompt is empty: write a text, or leave the flag out.")


def check_text_model(model: ModelMixin, pipeline: DiffusionPipeline) -> None:
    """Makes sure that a model is made for the latents and the text of a pipeline, and for nothing else.

    Args:
        model: a UNet or a U-ViT.
        pipeline: with `vae` and `text_encoder`.

    Raises:
        ValueError: it is not.
    """
    channels, width = pipeline.vae.config.latent_channels, pipeline.text_encoder.config.hidden_size
    for key, expected, meaning in (
        ("in_channels", channels, "latents"),
        ("out_channels", channels, "latents"),
        ("cross_attention_dim", width, "text"),
        ("num_class_embeds", None, "text alone"),
        ("addition_embed_type", None, "text alone"),
    ):
        found = model.config.get(key, expected if key != "cross_attention_dim" else None)
        if found != expected:
            raise ValueError(
                f"The model has {key}={found}, but the pipeline's {meaning} needs {expected}: choose another model "
                "config or pipeline."
            )


def load_base_pipeline(
    args: argparse.Namespace, pipeline_class: type[DiffusionPipeline], **components: Any
) -> DiffusionPipeline:
    """Loads the pretrained pipeline in float32, without its UNet.

    Args:
        args: with the flags of `add_text_to_image_arguments`.
        pipeline_class: as in `check_base_pipeline`.
        **components: take the place of the pipeline's own; `None` leaves one out.

    Raises:
        OSError: a file is missing.
    """
    pipeline = pipeline_class.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        unet=None,
        **components,
    )
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.float()
    return pipeline


def load_scaled_unet(args: argparse.Namespace) -> ScaleLongUNet2DConditionModel:
    """Loads the pretrained pipeline's UNet in float32, scaled as the flags say.

    Raises:
        OSError: a file is missing.
        ValueError, TypeError: invalid scaling arguments.
    """
    scaling = {
        "skip_scaling": args.skip_scaling,
        "kappa": kappa_argument(args),
        "ls_initial_gate": args.ls_initial_gate,
    }
    unet = ScaleLongUNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path,
        subfolder="unet",
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        **{key: value for key, value in scaling.items() if value is not None},
    )
    return unet.float()


def training_scheduler(pipeline: DiffusionPipeline, prediction_type: str | None) -> DDPMScheduler:
    """The noise schedule of a pipeline, for training.

    Args:
        pipeline: its scheduler is changed to `prediction_type` too, so that the trained model samples rightly.
        prediction_type: what the model predicts; `None` for what the pipeline's scheduler says.
    """
    if prediction_type is not None:
        config = pipeline.scheduler.config
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, prediction_type=prediction_type)
    return DDPMScheduler.from_config(pipeline.scheduler.config)


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype for weights that are not trained: that of the mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def frozen_copy(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """A copy to compute with and not to train; the original keeps its precision, for saving."""
    frozen = copy.deepcopy(module).requires_grad_(False).eval()
    return nn.Module.to(frozen, device, dtype)  # Diffusers' own `to` warns of a dtype even where nothing is lost


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of an image with `resolution` pixels per side.

    Raises:
        ValueError: the VAE, or the pipelines that sample, cannot take images of that size.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    multiple = max(factor, 8)  # Stable Diffusion's pipelines want a multiple of 8
    if resolution % multiple:
        raise ValueError(f"--resolution {resolution} must be a multiple of {multiple} for this pipeline.")
    return vae.config.latent_channels, resolution // factor, resolution // factor


class WithPosteriorNoise:
    """An image for the VAE, with the noise for the draw from its posterior.

    Args:
        image: turns the image into tensors, as `ImageTransform`.
        shape: of the noise: that of the latents.
    """

    def __init__(
        self,
        image: Callable[[Image.Image, np.random.Generator], dict[str, torch.Tensor]],
        shape: Sequence[int],
    ) -> None:
        self.image = image
        self.shape = tuple(shape)

    def __call__(self, image: Image.Image, random: np.random.Generator) -> dict[str, torch.Tensor]:
        """What `image` makes, with `"posterior_noise"`, float32 of `shape`."""
        sample = self.image(image, random)
        noise = random.standard_normal(self.shape, dtype=np.float32)
        return sample | {"posterior_noise": torch.from_numpy(noise)}


def load_captioned_samples(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    num_train_timesteps: int,
    num_tokens: int | None = None,
    proportion_empty_prompts: float = 0.0,
) -> DiffusionDataset | StreamingDiffusionDataset:
    """Loads and checks the images and captions of a training; `encode_batch` encodes what the samples hold.

    Args:
        args: with the flags of `add_text_to_image_arguments` and `add_data_arguments`.
        accelerator: of the run.
        pipeline: with `vae` and `tokenizer`.
        num_train_timesteps: of the noise schedule.
        num_tokens: length of a caption; by default the tokenizer's own.
        proportion_empty_prompts: how often a caption is replaced with the empty text.

    Raises:
        OSError: the dataset or one of its images cannot be read.
        ValueError: a column is missing, a caption is not a text, all are empty, or the resolution is unsuitable.
    """
    vae = pipeline.vae
    shape = latent_shape(vae, args.resolution)
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    dataset = load_rows(args, accelerator, columns)
    check_captions(dataset, args.caption_column)
    image = ImageTransform(
        args.resolution, vae.config.in_channels, args.center_crop, args.random_flip, args.image_interpolation_mode
    )
    transform = DiffusionTransform(
        WithPosteriorNoise(image, shape),
        args.image_column,
        noise_shape=shape,
        condition=Captions(
            args.caption_column, {"input_ids": pipeline.tokenizer}, num_tokens, proportion_empty_prompts
        ),
        num_train_timesteps=num_train_timesteps,
        noise_offset=args.noise_offset,
    )
    return make_samples(args, accelerator, transform, dataset)


@torch.no_grad()
def encode_batch(
    vae: AutoencoderKL, text_encoder: nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes a batch of `load_captioned_samples`.

    Args:
        vae: its config has the scaling factor, which brings latents to the variance that the UNet works at.
        text_encoder: its first output is the text.
        batch: with `"input"`, `"posterior_noise"` and `"input_ids"`.

    Returns:
        Latents drawn from the VAE's posterior, float32, (batch, channels, height, width); and the text, (batch,
        tokens, width), in the encoder's dtype.
    """
    posterior = vae.encode(batch["input"].to(vae.dtype)).latent_dist
    latents = posterior.mean.float() + posterior.std.float() * batch["posterior_noise"]
    return latents * vae.config.scaling_factor, text_encoder(batch["input_ids"])[0]


def draw_validation_images(
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    num_images: int,
    generator: torch.Generator,
    **options: Any,
) -> np.ndarray:
    """Samples with a pipeline whose frozen parts may be of a lower precision than its UNet.

    Args:
        accelerator: of the run.
        pipeline: takes `prompt`.
        prompts: what to draw.
        num_images: for each prompt.
        generator: of the starting noise.
        **options: further arguments of the pipeline.

    Returns:
        (len(prompts) · num_images, height, width, channels) in [0, 1], prompt after prompt.
    """
    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(desc="Sampling", leave=False)
    with accelerator.autocast():
        return np.concatenate(
            [
                # One at a time: training has filled most of the memory.
                pipeline(prompt=prompt, generator=generator, output_type="np", **options).images
                for prompt in prompts
                for _ in range(num_images)
            ]
        )
