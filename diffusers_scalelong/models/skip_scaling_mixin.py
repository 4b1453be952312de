"""What every model with scaled long skip connections shares: its config keys, its constants, and how it loads."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import diffusers
from diffusers import ModelMixin

from ..skip_scaling import (
    DEFAULT_KAPPA,
    ConstantSkipScaling,
    LearnableSkipScaling,
    SkipGate,
    make_skip_scaling,
)

_GATES = "skip_scaler."


class SkipScalingMixin(ModelMixin):
    """Adds `skip_scaling`, `kappa`, `ls_reduction` and `ls_initial_gate` to a Diffusers model.

    The model calls `_init_skip_scaling` at the end of its `__init__` and then scales each skip by
    `self.skip_scaler(skip, index)`, unless `self.skip_scaler` is `None`.
    """

    # Gates of a checkpoint that is loaded with another method.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^skip_scaler\."]

    skip_scaler: ConstantSkipScaling | LearnableSkipScaling | None

    def _init_skip_scaling(
        self,
        widths: Sequence[int],
        skip_scaling: str,
        kappa: float | Sequence[float] | None,
        ls_reduction: int,
        ls_initial_gate: float | None,
    ) -> None:
        self.num_skips = len(widths)
        self.skip_scaler = make_skip_scaling(skip_scaling, widths, kappa, ls_reduction, ls_initial_gate)
        if isinstance(self.skip_scaler, ConstantSkipScaling):
            # The constant itself goes into the config, lest a later default change a stored model.
            self._register_kappa(DEFAULT_KAPPA[skip_scaling] if kappa is None else kappa)

    def _register_kappa(self, kappa: float | Sequence[float]) -> None:
        self.register_to_config(kappa=[float(k) for k in kappa] if isinstance(kappa, Sequence) else float(kappa))

    @property
    def kappas(self) -> tuple[float, ...] | None:
        """The constants κ_1 … κ_N in force, shallowest skip first; `None` for the learnable methods."""
        if isinstance(self.skip_scaler, LearnableSkipScaling):
            return None
        return self.skip_scaler.coefficients if self.skip_scaler else (1.0,) * self.num_skips

    def set_kappa(self, kappa: float | Sequence[float]) -> None:
        """Changes the constants of `"uniform"` or `"cs"` and the config, without recompilation.

        Args:
            kappa: as in `skip_coefficients`: a number, or for `"uniform"` also a list of `num_skips` numbers.

        Raises:
            ValueError: the model's method has no constants, or `kappa` is invalid. Nothing changes then.
            TypeError: `kappa` is not a number or a list of numbers.
        """
        if not isinstance(self.skip_scaler, ConstantSkipScaling):
            raise ValueError(
                f"skip_scaling={self.config['skip_scaling']!r} has no constants to set: "
                "`set_kappa` is for 'uniform' and 'cs'."
            )
        self.skip_scaler.set_kappa(kappa)
        self._register_kappa(kappa)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        stored_class = getattr(diffusers, str(config_dict.get("_class_name")), cls)
        if not issubclass(cls, stored_class):
            raise ValueError(
                f"This is the config of a {config_dict['_class_name']}, which {cls.__name__} cannot load: "
                f"load it with {config_dict['_class_name']}.from_pretrained or a class derived from it."
            )
        # Another method at load: the stored method's own settings do not carry over.
        method = kwargs.get("skip_scaling")
        if method is not None and method != config_dict.get("skip_scaling", "none"):
            dropped = {"kappa"} if str(method).startswith("ls") else {"kappa", "ls_initial_gate"}
            config_dict = {key: value for key, value in config_dict.items() if key not in dropped}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def _load_pretrained_model(cls, model: "SkipScalingMixin", *args: Any, **kwargs: Any) -> tuple:
        # Diffusers leaves what a checkpoint lacks without values. Gates are new by right; anything else is an error.
        model, missing_keys, *rest = super()._load_pretrained_model(model, *args, **kwargs)
        missing = set(missing_keys)
        for name, module in model.named_modules():
            keys = {f"{name}.{key}" for key, _ in module.named_parameters()} if isinstance(module, SkipGate) else set()
            if keys and keys <= missing:
                if any(parameter.is_meta for parameter in module.parameters()):
                    module.to_empty(device="cpu")
                module.reset_parameters()
                missing -= keys
        if missing:
            raise ValueError(
                f"The weights lack {len(missing)} of the parameters of {cls.__name__}, for example "
                f"{', '.join(sorted(missing)[:3])}: the file is incomplete, or it belongs to another model or config."
            )
        return model, missing_keys, *rest


def extends_signature(parent_init: Callable) -> Callable[[Callable], Callable]:
    """Decorates an `__init__(self, *args, new=…, **kwargs)` to show the parent's parameters followed by its own.

    Diffusers reads the signature to know a model's config keys, and people read it in `help()`.
    """

    def decorate(init: Callable) -> Callable:
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        inherited = inspect.signature(parent_init).parameters.values()
        init.__signature__ = inspect.Signature([*inherited, *own])  # type: ignore[attr-defined]
        return init

    return decorate
