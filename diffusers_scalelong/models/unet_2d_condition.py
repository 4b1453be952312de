"""`UNet2DConditionModel` with scaled long skip connections."""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config

from .skip_scaling_mixin import extends_signature
from .unet_mixin import SkipScalingUNetMixin


class ScaleLongUNet2DConditionModel(SkipScalingUNetMixin, UNet2DConditionModel):
    """A `diffusers.UNet2DConditionModel` whose decoder sees `cat([hidden, κ_i · skip_i])` (ScaleLong, 2310.13545).

    Args:
        skip_scaling: `"none"` (bit-identical to `UNet2DConditionModel`), `"uniform"`, `"cs"`, `"ls"` or
            `"ls_unshared"`; see `diffusers_scalelong.skip_scaling`.
        kappa: κ of the constant methods, as in `skip_coefficients`: by default 2^(-1/2) for `"uniform"` and 0.7 for
            `"cs"`.
        ls_reduction: the gate networks of `"ls"` have max(channels // ls_reduction, 1) hidden features.
        ls_initial_gate: `None` for the paper's initialisation of the gates, or p in (0, 1): every gate starts at p.
        Everything else: as in `diffusers.UNet2DConditionModel`.

    Attributes:
        num_skips: N, the number of long skip connections that the decoder concatenates.
        kappas: the constants in force, shallowest skip first; `None` for `"ls"` and `"ls_unshared"`.

    Raises:
        ValueError, TypeError: invalid scaling arguments; the message says what is expected.
    """

    plain_class: ClassVar[type[ModelMixin]] = UNet2DConditionModel

    @register_to_config
    @extends_signature(UNet2DConditionModel.__init__)
    def __init__(
        self,
        *args: Any,
        skip_scaling: str = "none",
        kappa: float | Sequence[float] | None = None,
        ls_reduction: int = 16,
        ls_initial_gate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._attach_skip_scaling(skip_scaling, kappa, ls_reduction, ls_initial_gate)
