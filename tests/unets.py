"""Small UNets for the tests: one for every up-block type that Diffusers' two UNet classes accept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from diffusers_scalelong import ScaleLongUNet2DConditionModel, ScaleLongUNet2DModel

_TINY = {"sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 2}
_TEXT = {"cross_attention_dim": 24, "attention_head_dim": 8}

UNETS_2D = {
    "UpBlock2D": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "AttnUpBlock2D": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "ResnetUpsampleBlock2D": {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    },
    "SkipUpBlock2D": {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2},
    "AttnSkipUpBlock2D": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
    "no mid block": {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": None,
    },
    "KUpBlock2D": {
        "down_block_types": ("KDownBlock2D",) * 2,
        "up_block_types": ("KUpBlock2D",) * 2,
        "mid_block_type": None,
    },
}
UNETS_2D_CONDITION = {
    "UpBlock2D": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "CrossAttnUpBlock2D": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "CrossAttnUpBlock2D, other depths": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": (1, 3),
    },
    "ResnetUpsampleBlock2D": {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    },
    "SimpleCrossAttnUpBlock2D": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    },
    "KCrossAttnUpBlock2D": {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        "mid_block_type": None,
        "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "norm_num_groups": None,
        "act_fn": "gelu",
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "cross_attention_dim": 32,
    },
}
CASES = [
    *[(UNet2DModel, ScaleLongUNet2DModel, name) for name in UNETS_2D],
    *[(UNet2DConditionModel, ScaleLongUNet2DConditionModel, name) for name in UNETS_2D_CONDITION],
]
CASE_IDS = [f"{plain.__name__}-{name}" for plain, _, name in CASES]
ONE_CASE_PER_CLASS = [
    (UNet2DModel, ScaleLongUNet2DModel, "AttnUpBlock2D"),
    (UNet2DConditionModel, ScaleLongUNet2DConditionModel, "CrossAttnUpBlock2D"),
]
CLASS_IDS = ["UNet2DModel", "UNet2DConditionModel"]


def config_of(plain: type, name: str) -> dict:
    return _TINY | UNETS_2D[name] if plain is UNet2DModel else _TINY | _TEXT | UNETS_2D_CONDITION[name]


def seeded(cls: type, config: dict, **scaling: object) -> torch.nn.Module:
    """Two classes built under one seed get the same weights."""
    torch.manual_seed(0)
    return cls(**config, **scaling).eval()


def inputs_of(unet: torch.nn.Module, batch_size: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    size, channels = unet.config.sample_size, unet.config.in_channels
    inputs = {
        "sample": torch.randn(batch_size, channels, size, size, generator=generator),
        "timestep": torch.arange(batch_size) * 300 + 7,
    }
    if "cross_attention_dim" in unet.config:
        width = unet.config.cross_attention_dim
        inputs["encoder_hidden_states"] = torch.randn(batch_size, 5, width, generator=generator)
    return inputs


def output_of(unet: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs_of(unet)).sample


@contextmanager
def scaled_by_hand(coefficients: Sequence[float]) -> Iterator[list[int]]:
    """Multiplies the second half of the decoder's concatenations, wherever they happen, inside Diffusers' own code.

    The decoder's first concatenation meets the deepest skip, i = N. Yields a list that collects the skips' widths,
    shallowest first.
    """
    concatenate = torch.cat
    widths: list[int] = []

    def scaling_cat(tensors, dim=0, **kwargs):
        if len(tensors) == 2 and dim == 1 and tensors[0].ndim == 4:
            hidden, skip = tensors
            i = len(coefficients) - len(widths)
            widths.insert(0, skip.shape[1])
            tensors = [hidden, skip * coefficients[i - 1]]
        return concatenate(tensors, dim=dim, **kwargs)

    torch.cat = scaling_cat
    try:
        yield widths
    finally:
        torch.cat = concatenate
