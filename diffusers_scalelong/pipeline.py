"""Sampling with classifier-free guidance from a class-conditional UNet, or a class- or text-conditional U-ViT."""

import inspect
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .models import ScaleLongUViT2DModel

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ScaleLongPipeline(DiffusionPipeline):
    """Class-conditional image generation with a `UNet2DModel`, class- and text-conditional with a U-ViT.

    Other models have pipelines in Diffusers: `DDPMPipeline` and `DDIMPipeline` take an unconditional one as their
    `unet`, `StableDiffusionPipeline` takes a `UNet2DConditionModel`. With `import diffusers_scalelong`,
    `DiffusionPipeline.from_pretrained` loads a saved pipeline by its name.

    Args:
        unet: a `UNet2DModel`, scaled or not, with `num_class_embeds`; or a `ScaleLongUViT2DModel` with
            `num_class_embeds`, or with `cross_attention_dim`, or both.
        scheduler: any Diffusers scheduler.
        vae: decodes the samples, for a model of latents; without it the samples are the images.
        text_encoder, tokenizer: from Transformers; the encoder's first output, (batch, tokens, width), is the model's
            text. Without them a text-conditional model takes `prompt_embeds`.

    Classifier-free guidance needs a model that has learned a null condition. For classes it is the last embedding, as
    in the reference: `num_class_embeds` is the number of classes plus one. For text it is the empty prompt.

    Raises:
        TypeError: `unet` is a `UNet2DConditionModel`.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["vae", "text_encoder", "tokenizer"]

    unet: UNet2DModel | ScaleLongUViT2DModel
    scheduler: Any
    vae: AutoencoderKL | None
    text_encoder: Any
    tokenizer: Any

    def __init__(
        self,
        unet: UNet2DModel | ScaleLongUViT2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: object | None = None,
    ) -> None:
        super().__init__()
        if isinstance(unet, UNet2DConditionModel):
            raise TypeError(f"`unet` is a {type(unet).__name__}: sample from it with StableDiffusionPipeline.")
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.image_processor = VaeImageProcessor()

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, include_code: bool = False, **kwargs: Any
    ) -> None:
        """As in Diffusers. `include_code=True` adds the code: Diffusers alone loads it then (docs/hub.md)."""
        from .remote_code import including_code

        with including_code(self) if include_code else nullcontext():
            super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, include_code: bool = False, **kwargs: Any) -> str:
        """As in Diffusers. `include_code=True` adds the code: Diffusers alone loads it then (docs/hub.md)."""
        from .remote_code import including_code

        with including_code(self) if include_code else nullcontext():
            return super().push_to_hub(repo_id, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generates one image per class label or prompt.

        Args:
            class_labels: one integer or several, exactly for a class-conditional model.
            prompt: one text or several, for a text-conditional model. Longer ones than the model's number of tokens
                are cut, with a warning.
            prompt_embeds: the encoded text in place of `prompt`, (batch, num_context_tokens, cross_attention_dim).
            negative_prompt_embeds: the encoded empty prompt, of the same shape, for guidance without a text encoder.
            num_inference_steps: denoising steps; more cost time and usually raise the quality.
            guidance_scale: w of classifier-free guidance, unconditional + w · (conditional − unconditional), in force
                above 1. By default 1: no guidance.
            generator: makes the result reproducible; one, or one per image.
            output_type: `"pil"`, `"np"` (batch, height, width, channels) or `"pt"` (batch, channels, height, width),
                both in [0, 1], or `"latent"`: the model's samples as they are.
            return_dict: whether to return an `ImagePipelineOutput` or a tuple.

        Returns:
            `ImagePipelineOutput`, or a tuple with its one field: the images.

        Raises:
            ValueError, TypeError: the conditions are not those that the model takes, or another argument is invalid.
        """
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(_OUTPUT_TYPES)}, but is {output_type!r}.")
        device = self._execution_device
        guided = guidance_scale > 1
        labels = self._labels(class_labels, guided)
        text, null_text = self._text(prompt, prompt_embeds, negative_prompt_embeds, guided)
        sizes = {len(condition) for condition in (labels, text) if condition is not None}
        if not sizes:
            raise ValueError("This model is unconditional: sample from it with DDPMPipeline or DDIMPipeline.")
        if len(sizes) > 1:
            raise ValueError(f"Give as many labels as prompts, not {sorted(sizes)}.")
        batch_size = sizes.pop()
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"Give one generator per image, {batch_size}, or a single one, not {len(generator)}.")

        if guided:
            if labels is not None:
                null_label = self.unet.config["num_class_embeds"] - 1
                labels = torch.cat([labels, torch.full_like(labels, null_label)])
            if text is not None and null_text is not None:
                text = torch.cat([text, null_text])

        size = self.unet.config["sample_size"]
        if size is None:
            raise ValueError(
                "The config of `unet` has no `sample_size`: set it, `unet.register_to_config(sample_size=32)`."
            )
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config["in_channels"], height, width)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        latents = latents * self.scheduler.init_noise_sigma
        conditions = {"class_labels": labels}
        if text is not None:  # a UNet2DModel has no argument for it
            conditions["encoder_hidden_states"] = text
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = torch.cat([latents, latents]) if guided else latents
            model_input = self.scheduler.scale_model_input(model_input, timestep)
            prediction = self.unet(model_input, timestep, **conditions, return_dict=False)[0]
            if guided:
                conditional, unconditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]

        samples = latents
        if self.vae is not None and output_type != "latent":
            latents = latents.to(self.vae.dtype) / self.vae.config["scaling_factor"]
            samples = self.vae.decode(latents, return_dict=False)[0]
        images = self.image_processor.postprocess(samples, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels: int | Sequence[int] | torch.Tensor | None, guided: bool) -> torch.Tensor | None:
        """The labels, (batch,); `None` for a model without classes."""
        num_class_embeds = self.unet.config["num_class_embeds"]
        if class_labels is None or num_class_embeds is None:
            if class_labels is not None:
                raise ValueError("This model takes no `class_labels`: `num_class_embeds` is not set in its config.")
            if num_class_embeds is not None:
                raise ValueError(f"This model is class-conditional: give `class_labels` below {num_class_embeds}.")
            return None
        labels = torch.as_tensor(class_labels).reshape(-1)
        if len(labels) == 0:
            raise ValueError("`class_labels` is empty: give at least one label.")
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"`class_labels` must be integers, but are {labels.dtype}.")
        num_labels = num_class_embeds - guided
        if not all(0 <= label < num_labels for label in labels.tolist()):
            reason = " With guidance the last embedding is the null class." if guided else ""
            raise ValueError(f"`class_labels` must lie in [0, {num_labels}), but are {labels.tolist()}.{reason}")
        return labels.to(self._execution_device)

    def _text(
        self,
        prompt: str | Sequence[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        guided: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The text and, with guidance, the null text, each (batch, tokens, width); `None` for a model without text."""
        has_prompt = prompt is not None
        if self.unet.config.get("cross_attention_dim") is None:
            if has_prompt or prompt_embeds is not None or negative_prompt_embeds is not None:
                raise ValueError("This model takes no text: its config sets no `cross_attention_dim`.")
            return None, None
        if has_prompt == (prompt_embeds is not None):
            raise ValueError("This model is text-conditional: give `prompt` or `prompt_embeds`, one of the two.")

        if prompt is not None:
            prompt_embeds = self._encode([prompt] if isinstance(prompt, str) else list(prompt))
        assert prompt_embeds is not None
        text = prompt_embeds.to(self._execution_device, self.unet.dtype)
        if not guided:
            return text, None
        if negative_prompt_embeds is None:
            if self.text_encoder is None:
                raise ValueError("Guidance without a text encoder needs `negative_prompt_embeds`, the empty prompt's.")
            negative_prompt_embeds = self._encode([""])
        if negative_prompt_embeds.shape not in (text.shape, (1, *text.shape[1:])):
            raise ValueError(
                f"`negative_prompt_embeds` must have the shape of the text, {tuple(text.shape)}, but has "
                f"{tuple(negative_prompt_embeds.shape)}."
            )
        return text, negative_prompt_embeds.to(text).expand_as(text)

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        if not prompts:
            raise ValueError("`prompt` is empty: give at least one text.")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("This pipeline has no text encoder and tokenizer: give `prompt_embeds`.")
        num_tokens = self.unet.config["num_context_tokens"]
        longest = max(len(tokens) for tokens in self.tokenizer(prompts).input_ids)
        if longest > num_tokens:
            warnings.warn(f"A prompt has {longest} tokens and was cut to the {num_tokens} that the model takes.")
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0]
