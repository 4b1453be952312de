"""ScaleLong for Diffusers: diffusion UNets with scaled long skip connections (arXiv 2310.13545)."""

import sys

import diffusers
from diffusers import ModelMixin  # Diffusers' pipeline loader looks it up on this package.
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

from .models import ScaleLongUNet2DConditionModel, ScaleLongUNet2DModel, ScaleLongUViT2DModel
from .pipeline import ScaleLongPipeline
from .skip_scaling import skip_coefficients

__version__ = "0.1.0"

__all__ = [
    "ModelMixin",
    "ScaleLongPipeline",
    "ScaleLongUNet2DConditionModel",
    "ScaleLongUNet2DModel",
    "ScaleLongUViT2DModel",
    "skip_coefficients",
]

# Pipelines save and load the models by this package's name …
LOADABLE_CLASSES["diffusers_scalelong"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES["diffusers_scalelong"])
# … and `AutoModel` and `DiffusionPipeline` look models and pipelines up as attributes of `diffusers`.
for _class in (ScaleLongUNet2DModel, ScaleLongUNet2DConditionModel, ScaleLongUViT2DModel, ScaleLongPipeline):
    setattr(diffusers, _class.__name__, _class)
# A component that comes with its code is looked up here first: with this package it needs no `trust_remote_code`.
diffusers.pipelines.diffusers_scalelong = sys.modules[__name__]
