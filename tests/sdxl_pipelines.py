"""A small SDXL pipeline that the tests write; nothing is downloaded."""

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from text_pipelines import text_encoder_config, tiny_vae, write_tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection


def write_sdxl(folder: Path, prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """An SDXL pipeline of 16×16 images, with random weights and text encoders of the widths 16 and 24."""
    torch.manual_seed(0)
    tokenizers = [write_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    configs = [text_encoder_config(tokenizer, width) for tokenizer, width in zip(tokenizers, (16, 24), strict=True)]
    for config in configs:
        config.num_hidden_layers = 2  # SDXL takes the last layer but one
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(configs[0]),
        text_encoder_2=CLIPTextModelWithProjection(configs[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            prediction_type=prediction_type,
        ),
    )
    pipeline.save_pretrained(folder)
    return pipeline
