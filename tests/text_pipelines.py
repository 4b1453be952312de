"""Small text-to-image pipelines and captioned images that the tests write; nothing is downloaded."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (240, 240, 240)}
NUM_TOKENS = 12


def write_tokenizer(folder: Path, num_tokens: int = NUM_TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte, inside and at the end of a word, and merges none: 514 tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": num_tokens}
    config |= {f"{name}_token": "<|endoftext|>" for name in ("eos", "unk", "pad")} | {"bos_token": "<|startoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder_config(tokenizer: CLIPTokenizer, hidden_size: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_vae(scaling_factor: float = 0.5) -> AutoencoderKL:
    """Halves height and width; 4 latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=scaling_factor,
    )


def write_stable_diffusion(folder: Path, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x pipeline of 16×16 images, with random weights; `v_prediction` makes it a 2.x."""
    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text_encoder_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def write_captioned_images(folder: Path, number: int = 8, size: tuple[int, int] = (20, 16)) -> list[str]:
    """An `imagefolder`: noisy images of one colour, (width, height) `size`, which their captions in `text` name."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    captions, rows = [], []
    for index in range(number):
        colour = list(COLOURS)[index % len(COLOURS)]
        pixels = np.array(COLOURS[colour]) + random.normal(scale=10, size=(size[1], size[0], 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
        captions.append(f"a {colour} wall")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": captions[-1]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return captions
