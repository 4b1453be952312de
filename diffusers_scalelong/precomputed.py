"""Rows that are encoded once, before the training, so that its loop runs the UNet alone.

The encoder makes of a captioned image the distribution of its latents, the embeddings of its text and SDXL's time ids;
Datasets caches them. What the training draws of them (latents, dropped captions) is drawn anew in every epoch.
"""

from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets.fingerprint import Hasher
from diffusers import StableDiffusionXLPipeline
from tqdm.auto import tqdm

from .conditions import choose_caption
from .image_data import ImageTransform
from .text_to_image import latent_shape

# Rows that are cached together: what an interrupted encoding loses at most, for each process.
_ROWS_PER_PART = 512
# Rows that are encoded together. A constant: rounding depends on it, and the cache must not depend on the training.
_ROWS_PER_BATCH = 8


class SDXLEncoder:
    """Encodes captioned images as SDXL's UNet is trained on them (Podell et al., arXiv 2307.01952).

    Crop, mirroring and the choice among several captions are drawn once for each row, from the seed and its index.

    Args:
        pipeline: the VAE, tokenizers and text encoders, in float32 and on the device to use; it needs no UNet.
        image: turns images into tensors.
        image_column, caption_column: the columns that hold an image and a text, or a list of texts.
        seed: of the draws, at least 0.

    Attributes:
        latent_shape: of an image, (channels, height, width).
        unconditional: the embeddings of the empty prompt, by column of `features`: as the pipeline's guidance has
            them, which are zeros in a pipeline with `force_zeros_for_empty_prompt`.

    Raises:
        ValueError: the pipeline cannot take images of this size.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        image: ImageTransform,
        image_column: str,
        caption_column: str,
        seed: int = 0,
    ) -> None:
        self.pipeline = pipeline
        self.image = image
        self.image_column = image_column
        self.caption_column = caption_column
        self.seed = seed
        self.latent_shape = latent_shape(pipeline.vae, image.resolution)
        pipeline.vae.enable_slicing()  # one image at a time: 1024 pixels a side need gigabytes each
        with torch.no_grad():
            embeds = pipeline.encode_prompt("", device=pipeline.device, do_classifier_free_guidance=True)
        self.unconditional = {
            "prompt_embeds": embeds[1][0].cpu().numpy(),
            "pooled_prompt_embeds": embeds[3][0].cpu().numpy(),
        }

    @property
    def features(self) -> datasets.Features:
        """The columns of the encoded rows, float32.

        `"posterior"`: mean and standard deviation of the latents, in the UNet's scale, (2, *latent_shape);
        `"prompt_embeds"`: (tokens, width); `"pooled_prompt_embeds"`: (width,); `"time_ids"`: original height and
        width, top and left of the crop, height and width of the result.
        """
        tokens, width = self.unconditional["prompt_embeds"].shape
        (pooled_width,) = self.unconditional["pooled_prompt_embeds"].shape
        return datasets.Features(
            {
                "posterior": datasets.Array4D((2, *self.latent_shape), "float32"),
                "prompt_embeds": datasets.Array2D((tokens, width), "float32"),
                "pooled_prompt_embeds": datasets.Sequence(datasets.Value("float32"), length=pooled_width),
                "time_ids": datasets.Sequence(datasets.Value("float32"), length=6),
            }
        )

    @torch.no_grad()
    def __call__(self, rows: dict[str, list], indices: list[int]) -> dict[str, np.ndarray]:
        """Encodes rows, given by column, into `features`.

        Raises:
            OSError: an image cannot be decoded.
            ValueError: a caption is neither a text nor a list of texts.
        """
        images, captions = [], []
        for index, image, caption in zip(indices, rows[self.image_column], rows[self.caption_column], strict=True):
            random = np.random.default_rng((self.seed, index))
            images.append(self.image(image, random))
            captions.append(choose_caption(caption, self.caption_column, random))
        device, vae = self.pipeline.device, self.pipeline.vae
        target_size = torch.tensor((self.image.resolution, self.image.resolution))
        time_ids = [torch.cat([image["original_size"], image["crop_top_left"], target_size]) for image in images]
        posterior = vae.encode(torch.stack([image["input"] for image in images]).to(device)).latent_dist
        embeds, _, pooled, _ = self.pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
        encoded = {
            "posterior": torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor,
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "time_ids": torch.stack(time_ids),
        }
        return {name: value.float().cpu().numpy() for name, value in encoded.items()}

    def fingerprint(self) -> str:
        """Of all that the encoded rows depend on besides the rows; of the weights themselves, not their name."""
        hasher = Hasher()
        pipeline, vae = self.pipeline, self.pipeline.vae
        for model in (vae, pipeline.text_encoder, pipeline.text_encoder_2):
            for name, weight in model.state_dict().items():
                hasher.update(name)
                hasher.update(weight)
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            hasher.update((sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length))
        hasher.update(vae.config.scaling_factor)
        hasher.update(sorted(vars(self.image).items()))
        hasher.update((self.image_column, self.caption_column, self.seed))
        return hasher.hexdigest()


def encode_rows(rows: datasets.Dataset, encoder: SDXLEncoder, accelerator: Accelerator) -> datasets.Dataset:
    """Encodes every row once; Datasets caches the results, so that a repeated call only opens them.

    The processes share the work in parts of the dataset, each of which is cached by itself: an interrupted encoding
    continues with the next part. Every process must call.

    Args:
        rows: images and captions.
        encoder: encodes them.
        accelerator: of the run. Its processes find one another's results where they share a file system, and encode
            what they do not find.

    Returns:
        The encoded rows as NumPy arrays, in the order of `rows`.

    Raises:
        OSError, ValueError: as the encoder does.
    """
    parts = [range(start, min(start + _ROWS_PER_PART, len(rows))) for start in range(0, len(rows), _ROWS_PER_PART)]
    own = parts[accelerator.process_index :: accelerator.num_processes]
    fingerprint = encoder.fingerprint()
    progress = tqdm(
        total=sum(map(len, own)),
        desc="Encoding images and captions",
        unit="row",
        disable=not accelerator.is_local_main_process,
    )

    def encode(part: range) -> datasets.Dataset:
        def encode_batch(batch: dict[str, list], indices: list[int]) -> dict[str, np.ndarray]:
            encoded = encoder(batch, [part.start + index for index in indices])
            progress.update(len(indices))
            return encoded

        return rows.select(part).map(
            encode_batch,
            batched=True,
            batch_size=_ROWS_PER_BATCH,
            with_indices=True,
            remove_columns=rows.column_names,
            features=encoder.features,
            new_fingerprint=Hasher.hash((rows._fingerprint, fingerprint, part.start, part.stop)),
        )

    datasets.disable_progress_bars()  # one bar for all of the parts
    try:
        with progress:
            encoded = {}
            for part in own:
                encoded[part] = encode(part)
                progress.update(sum(map(len, encoded)) - progress.n)  # a part out of the cache counts too
            accelerator.wait_for_everyone()
            whole = [encoded[part] if part in encoded else encode(part) for part in parts]
    finally:
        datasets.enable_progress_bars()
    return datasets.concatenate_datasets(whole).with_format("numpy")


def draw_latents(posterior: np.ndarray, random: np.random.Generator) -> dict[str, torch.Tensor]:
    """Draws an image's latents from their distribution: the image of a `DiffusionTransform`.

    Args:
        posterior: mean and standard deviation, (2, channels, height, width).
        random: draws the noise.

    Returns:
        `"input"`: float32, (channels, height, width).
    """
    mean, std = posterior
    return {"input": torch.from_numpy(mean + std * random.standard_normal(mean.shape, dtype=np.float32))}


class EncodedCaptions:
    """The embeddings of a row's caption, replaced with the empty prompt's with some probability, and the time ids.

    Args:
        unconditional: the embeddings of the empty prompt, by column.
        proportion_empty: the probability of the empty prompt.
    """

    def __init__(self, unconditional: dict[str, np.ndarray], proportion_empty: float = 0.0) -> None:
        self.unconditional = unconditional
        self.proportion_empty = proportion_empty

    def __call__(self, row: dict[str, Any], random: np.random.Generator) -> dict[str, torch.Tensor]:
        """The columns of `unconditional`, and `"time_ids"`."""
        embeds = self.unconditional if random.random() < self.proportion_empty else row
        arrays = {name: embeds[name] for name in self.unconditional} | {"time_ids": row["time_ids"]}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}  # the cache is read-only
