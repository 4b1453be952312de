from .unet_2d import ScaleLongUNet2DModel
from .unet_2d_condition import ScaleLongUNet2DConditionModel
from .uvit_2d import ScaleLongUViT2DModel

__all__ = ["ScaleLongUNet2DConditionModel", "ScaleLongUNet2DModel", "ScaleLongUViT2DModel"]
