from .unet_2d import ScaleLongUNet2DModel
from .unet_2d_condition import ScaleLongUNet2DConditionModel

__all__ = ["ScaleLongUNet2DConditionModel", "ScaleLongUNet2DModel"]
