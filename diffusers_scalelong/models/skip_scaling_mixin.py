"""What every model with scaled long skip connections shares: its config keys, its constants, and how it loads."""

import inspect
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.utils.hub_utils import _get_model_file
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..skip_scaling import (
    DEFAULT_KAPPA,
    ConstantSkipScaling,
    LearnableSkipScaling,
    SkipGate,
    make_skip_scaling,
)

SCALING_KEYS = ("skip_scaling", "kappa", "ls_reduction", "ls_initial_gate")
_GATES = "skip_scaler."

SKIP_SCALING_FILE = "skip_scaling.safetensors"


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

    def warm_up_kappa(self, progress: float) -> None:
        """Puts 1 + progress · (κ_i - 1) in force for every skip, so that a pretrained UNet meets its κ without a jolt.

        Exact at both ends. The config keeps the κ_i themselves; a model that is saved on the way is saved as what it
        computes, with the constants in force as a `"uniform"` schedule.

        Args:
            progress: from 0, the unscaled model, to 1, the config's.

        Raises:
            ValueError: the model's method has no constants, or `progress` is outside [0, 1].
        """
        if not isinstance(self.skip_scaler, ConstantSkipScaling):
            raise ValueError(
                f"skip_scaling={self.config['skip_scaling']!r} has no constants to warm up: "
                "`warm_up_kappa` is for 'uniform' and 'cs'."
            )
        if not 0 <= progress <= 1:
            raise ValueError(f"`progress` must lie between 0 and 1, but is {progress}.")
        self.skip_scaler.warm_up(progress)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        scaler = self.skip_scaler
        if not isinstance(scaler, ConstantSkipScaling) or scaler.coefficients == scaler.targets:
            return super().save_config(save_directory, push_to_hub, **kwargs)
        of_the_config = {key: self.config[key] for key in ("skip_scaling", "kappa")}
        self.register_to_config(skip_scaling="uniform", kappa=list(scaler.coefficients))
        try:
            super().save_config(save_directory, push_to_hub, **kwargs)
        finally:
            self.register_to_config(**of_the_config)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, include_code: bool = False, **kwargs: Any
    ) -> None:
        """As in Diffusers. `include_code=True` adds this model's code: Diffusers alone loads it then (docs/hub.md)."""
        from ..remote_code import including_code

        with including_code(self) if include_code else nullcontext():
            super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, include_code: bool = False, **kwargs: Any) -> str:
        """As in Diffusers. `include_code=True` adds this model's code: Diffusers alone loads it then (docs/hub.md)."""
        from ..remote_code import including_code

        with including_code(self) if include_code else nullcontext():
            return super().push_to_hub(repo_id, *args, **kwargs)

    def save_skip_scaling(self, save_directory: str | os.PathLike) -> None:
        """Writes the scaling alone, gates or constants, to `skip_scaling.safetensors`; LoRA weights do not hold it.

        The file holds the gates' weights, if the method has gates, and in its metadata, under `config`, a JSON object
        with `skip_scaling`, `kappa`, `ls_reduction` and `num_skips`. It appears whole or not at all.

        Args:
            save_directory: a folder, created if it does not exist; an earlier file in it is replaced.

        Raises:
            OSError: the file cannot be written. An earlier one is intact then.
            ValueError: an adapter has wrapped the gates, so that their weights are not all of them.
        """
        gates = self._gates()
        if any("base_layer" in name for name in gates):
            raise ValueError(
                "An adapter wraps the gates, which are trained and saved as they are: choose its `target_modules` so "
                "that none is in `skip_scaler`."
            )
        config, scaler = self._scaling_config(), self.skip_scaler
        if isinstance(scaler, ConstantSkipScaling) and scaler.coefficients != scaler.targets:
            config.update(skip_scaling="uniform", kappa=list(scaler.coefficients))  # in warm-up, as in `save_config`
        data = save(gates, metadata={"format": "pt", "config": json.dumps(config)})
        path = Path(save_directory, SKIP_SCALING_FILE)
        aside = path.with_name(f"{path.name}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise OSError(f"{path} cannot be written: {error}") from error

    def load_skip_scaling(
        self, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any
    ) -> None:
        """Loads what `save_skip_scaling` wrote: the weights of the gates, or the constants.

        The gates take the model's dtype and device. A model with an adapter loads it as one without.

        Args:
            pretrained_model_name_or_path: a folder, the file itself, or a repository on the Hub.
            subfolder: the folder in it that has the file.
            **hub_kwargs: as in `from_pretrained`: `revision`, `token`, `cache_dir`, `local_files_only`,
                `force_download`, `proxies`.

        Raises:
            OSError: there is no such file, it cannot be downloaded, or it is damaged.
            ValueError: the file is for another method, reduction or architecture than the model's, or is not one of
                `save_skip_scaling`. Nothing changes then.
        """
        source = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(source):
            # Diffusers' helper would prefer a file in the folder itself to the one in `subfolder`.
            file = os.path.join(source, subfolder or "", SKIP_SCALING_FILE)
        else:
            file = _get_model_file(source, weights_name=SKIP_SCALING_FILE, subfolder=subfolder, **hub_kwargs)
        own = self._scaling_config()
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                gates = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            config = json.loads(metadata["config"])
            stored = {key: config[key] for key in own}
        except SafetensorError as error:
            raise OSError(f"{file} is damaged, or not a safetensors file: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} holds no scaling config: `save_skip_scaling` did not write it.") from error

        keys = ["skip_scaling", "ls_reduction"] if gates else ["skip_scaling"]
        if any(stored[key] != own[key] for key in keys):
            fitting, present = (", ".join(f"{key}={of[key]!r}" for key in keys) for of in (stored, own))
            raise ValueError(
                f"{file} is for {fitting}, but this model has {present}. Load the model with "
                f"{type(self).__name__}.from_pretrained(…, {fitting}) first."
            )
        if stored["num_skips"] != self.num_skips:
            raise ValueError(
                f"{file} is of a model with {stored['num_skips']} long skip connections, but this one has "
                f"{self.num_skips}: load the model that the file was trained with."
            )
        shapes, expected = ({name: tuple(t.shape) for name, t in of.items()} for of in (gates, self._gates()))
        if shapes != expected:
            different = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
            raise ValueError(
                f"The gates of {file} do not fit this {type(self).__name__}, for example {different[0]}: load the "
                "model that the file was trained with."
            )
        if isinstance(self.skip_scaler, LearnableSkipScaling):
            self.skip_scaler.load_state_dict(gates)
        elif isinstance(self.skip_scaler, ConstantSkipScaling):
            self.set_kappa(stored["kappa"])

    def _gates(self) -> dict[str, torch.Tensor]:
        """The weights of the gates; none for a method without gates."""
        return self.skip_scaler.state_dict() if self.skip_scaler is not None else {}

    def _scaling_config(self) -> dict[str, Any]:
        stored = {key: self.config[key] for key in ("skip_scaling", "kappa", "ls_reduction")}
        return {**stored, "num_skips": self.num_skips}

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        # By name: the class may be this package's or, with `trust_remote_code=True`, a repository's copy of it.
        stored_class = str(config_dict.get("_class_name"))
        if hasattr(diffusers, stored_class) and stored_class not in {base.__name__ for base in cls.__mro__}:
            raise ValueError(
                f"This is the config of a {config_dict['_class_name']}, which {cls.__name__} cannot load: "
                f"load it with {config_dict['_class_name']}.from_pretrained or a class derived from it."
            )
        # Names the code of a repository that holds it; not of what is saved later.
        config_dict = {key: value for key, value in config_dict.items() if key != "auto_map"}
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
