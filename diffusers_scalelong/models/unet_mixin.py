"""Attaches skip scaling to Diffusers' UNets without touching their `forward`."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import ModelMixin
from torch import nn

from .skip_scaling_mixin import _GATES, SCALING_KEYS, SkipScalingMixin

Self = TypeVar("Self", bound="SkipScalingUNetMixin")

# These concatenate the deepest of the skips that they are handed, once.
_BLOCKS_WITH_ONE_SKIP = ("KUpBlock2D", "KCrossAttnUpBlock2D")


class SkipScalingUNetMixin(SkipScalingMixin):
    """For subclasses of `UNet2DModel` and `UNet2DConditionModel`.

    Before each up-block runs, a hook scales the skips in its `res_hidden_states_tuple`. The tuple is ordered from
    shallow to deep; the first up-block consumes the deepest skips.
    """

    plain_class: ClassVar[type[ModelMixin]]

    up_blocks: nn.ModuleList

    def _attach_skip_scaling(
        self,
        skip_scaling: str,
        kappa: float | Sequence[float] | None,
        ls_reduction: int,
        ls_initial_gate: float | None,
    ) -> None:
        widths_by_block = self._skip_widths()
        widths = [width for block in reversed(widths_by_block) for width in block]
        self._init_skip_scaling(widths, skip_scaling, kappa, ls_reduction, ls_initial_gate)
        if self.skip_scaler is None:
            return
        first = len(widths)
        for block, block_widths in zip(self.up_blocks, widths_by_block, strict=True):
            if not block_widths:
                continue
            first -= len(block_widths)
            # A partial of a bound method: unlike a closure, it is rebound by deepcopy and pickle.
            hook = functools.partial(self._scale_skips, first, len(block_widths))
            block.register_forward_pre_hook(hook, with_kwargs=True)

    def _skip_widths(self) -> list[list[int]]:
        """For each up-block, the channels of the skips that it concatenates, shallow to deep."""
        hidden = self.config["block_out_channels"][-1]
        widths_by_block = []
        for block in self.up_blocks:
            widths = []
            for resnet in block.get_submodule("resnets").children():
                widths.append(resnet.in_channels - hidden)
                hidden = resnet.get_submodule("conv2").out_channels
            if type(block).__name__ in _BLOCKS_WITH_ONE_SKIP:
                # None at all for a first KCrossAttnUpBlock2D: its encoder hands over `None`.
                widths = widths[:1] if widths[0] else []
            widths_by_block.append(widths[::-1])
        return widths_by_block

    def _scale_skips(
        self, first: int, count: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Scales the last `count` skips that `block` is handed; they are the model's skips `first`, `first` + 1, …"""
        by_keyword = "res_hidden_states_tuple" in kwargs
        skips: tuple[torch.Tensor, ...] = kwargs["res_hidden_states_tuple"] if by_keyword else args[1]
        assert self.skip_scaler is not None
        scaled = skips[:-count] + tuple(
            self.skip_scaler(skip, first + offset) for offset, skip in enumerate(skips[-count:])
        )
        if by_keyword:
            return args, {**kwargs, "res_hidden_states_tuple": scaled}
        return (args[0], scaled, *args[2:]), kwargs

    @classmethod
    def from_unet(
        cls: type[Self],
        unet: ModelMixin,
        skip_scaling: str = "none",
        kappa: float | Sequence[float] | None = None,
        ls_reduction: int = 16,
        ls_initial_gate: float | None = None,
    ) -> Self:
        """A scaled copy of a UNet: the same config and weights, dtype, device and mode; no storage is shared.

        Args:
            unet: a `UNet2DModel` for `ScaleLongUNet2DModel`, a `UNet2DConditionModel` for
                `ScaleLongUNet2DConditionModel`, scaled or not. The gates of a scaled one are copied where they fit.
            skip_scaling, kappa, ls_reduction, ls_initial_gate: as in the constructor.

        Raises:
            TypeError: `unet` is of another class (an `accelerate` or `torch.compile` wrapper included).
            ValueError: its weights do not fit its config (LoRA layers, for example); invalid scaling arguments.
        """
        if not isinstance(unet, cls.plain_class):
            raise TypeError(
                f"{cls.__name__}.from_unet needs a {cls.plain_class.__name__}, but got a {type(unet).__name__}. "
                "Unwrap a compiled or distributed model first."
            )
        return _copy(
            unet,
            cls,
            skip_scaling=skip_scaling,
            kappa=kappa,
            ls_reduction=ls_reduction,
            ls_initial_gate=ls_initial_gate,
        )

    def to_unet(self, *, drop_scaling: bool = False) -> ModelMixin:
        """A plain copy, of Diffusers' own class: the same weights, dtype, device and mode; no storage is shared.

        Saved, it loads and computes the same without this package.

        Args:
            drop_scaling: whether to make one of a model that scales its skips. The constants and gates are left out,
                so the plain UNet's output differs from this model's until it is fine-tuned.

        Raises:
            ValueError: the model scales its skips (a κ_i is not 1, or the method has gates) and `drop_scaling` is not
                set; the weights do not fit the config (LoRA layers, for example).
        """
        if not drop_scaling and self.kappas != (1.0,) * self.num_skips:
            raise ValueError(
                f"This model scales its skips, skip_scaling={self.config['skip_scaling']!r}: a "
                f"{self.plain_class.__name__} with the same weights computes something else. Pass drop_scaling=True "
                "if that is what you want, for example to fine-tune it without the scaling."
            )
        return _copy(self, self.plain_class)


def _copy(unet: ModelMixin, cls: type, **scaling: Any) -> Any:
    """A `cls` with the config, the weights, dtype, device and mode of `unet`, and the scaling that is given."""
    config = {key: value for key, value in unet.config.items() if not key.startswith("_") and key not in SCALING_KEYS}
    # Not Diffusers' own `to`, which warns of any dtype, as if modules of these classes had to stay in float32.
    model = nn.Module.to(cls(**config, **scaling), device=unet.device, dtype=unet.dtype)
    expected = model.state_dict()
    weights = {
        key: value.detach().clone()
        for key, value in unet.state_dict().items()
        if not key.startswith(_GATES) or (key in expected and expected[key].shape == value.shape)
    }
    unmatched = {key for key in weights.keys() ^ expected.keys() if not key.startswith(_GATES)}
    if unmatched:
        raise ValueError(
            f"The weights of this {type(unet).__name__} do not fit its config, for example "
            f"{', '.join(sorted(unmatched)[:3])}. Merge or unload adapters first."
        )
    model.load_state_dict(weights, strict=False, assign=True)  # assign keeps each tensor's own dtype
    return model.train(unet.training)
