"""ScaleLong: scaling the long skip connections of a diffusion UNet (Huang et al., NeurIPS 2023, arXiv 2310.13545).

A UNet decoder concatenates its hidden features with the long skip connections of the encoder. ScaleLong multiplies
skip i by a coefficient κ_i before that:

    cat([hidden, κ_i · skip_i]),    i = 1 … N,

counted from the outside in: i = 1 is the shallowest skip (made first, consumed last), i = N the deepest.

    skip_scaling     the paper's name    κ_i
    "none"           original            1
    "uniform"        1/√2-CS             κ, by default 2^(-1/2)
    "cs"             CS                  κ^(i-1)
    "ls"             LS                  σ(W₂ · ReLU(W₁ · pool(skip_i))), one network for all skips of one width
    "ls_unshared"    LS (non-share)      the same, one network per skip
"""

import math
import warnings
from collections.abc import Sequence
from numbers import Real

import torch
from torch import nn

SKIP_SCALING_METHODS = ("none", "uniform", "cs", "ls", "ls_unshared")

# CS: the paper (section 4.1) suggests κ in [0.5, 0.95] and fixes no value; 0.7 is the middle of that range.
DEFAULT_KAPPA = {"uniform": 2**-0.5, "cs": 0.7}


def skip_coefficients(method: str, num_skips: int, kappa: float | Sequence[float] | None = None) -> tuple[float, ...]:
    """The constants κ_1 … κ_N of a scaling method, shallowest skip first (paper, section 4.1).

    Args:
        method: `"none"`, `"uniform"` or `"cs"`. The learnable methods have no constants.
        num_skips: N, the number of long skip connections, at least 1.
        kappa: κ > 0. Default: 2^(-1/2) for `"uniform"`, 0.7 for `"cs"`. For `"uniform"` also a sequence of N
            constants, i = 1 first.

    Returns:
        N floats: 1 for `"none"`, κ for `"uniform"`, κ^(i-1) for `"cs"`.

    Raises:
        ValueError: unknown or learnable `method`; κ not finite or not positive; a sequence of the wrong length or
            for another method; κ given with `"none"`.
        TypeError: κ or `num_skips` of the wrong type.

    A κ above 1 amplifies the skips, against the paper's advice: it is allowed, with a `UserWarning`.
    """
    check_method(method)
    if isinstance(num_skips, bool) or not isinstance(num_skips, int):
        raise TypeError(f"`num_skips` must be an integer, but is {num_skips!r}.")
    if num_skips < 1:
        raise ValueError(f"`num_skips` must be at least 1, but is {num_skips}.")
    if method not in DEFAULT_KAPPA:
        if kappa is not None:
            raise ValueError(
                f"`kappa` has no meaning with skip_scaling={method!r}. Leave it out, or choose 'uniform' or 'cs'."
            )
        if method != "none":
            raise ValueError(f"skip_scaling={method!r} learns its coefficients: it has no constants.")
        return (1.0,) * num_skips

    if kappa is None:
        kappa = DEFAULT_KAPPA[method]
    is_schedule = isinstance(kappa, Sequence) and not isinstance(kappa, str)
    values = tuple(map(_check_kappa, kappa if isinstance(kappa, Sequence) else [kappa]))
    if is_schedule:
        if method != "uniform":
            raise ValueError(f"A list of constants needs skip_scaling='uniform', but skip_scaling is {method!r}.")
        if len(values) != num_skips:
            raise ValueError(
                f"`kappa` has {len(values)} constants, but this model has {num_skips} long skip connections: "
                "give one number for all, or one per skip with the shallowest first."
            )
    if max(values) > 1:
        warnings.warn(f"kappa={kappa} is above 1: it amplifies the long skip connections instead of damping them.")

    if is_schedule:
        return values
    if method == "uniform":
        return values * num_skips
    try:
        return tuple(values[0] ** i for i in range(num_skips))  # κ^(i-1) with i counted from 1
    except OverflowError:
        raise ValueError(f"kappa={values[0]} is too large: kappa^{num_skips - 1} is not a finite number.") from None


def check_method(method: str) -> None:
    """Raises `ValueError` unless `method` is one of `SKIP_SCALING_METHODS`."""
    if method not in SKIP_SCALING_METHODS:
        raise ValueError(f"`skip_scaling` must be one of {', '.join(SKIP_SCALING_METHODS)}, but is {method!r}.")


def _check_kappa(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`kappa` must be a number or a list of numbers, but holds {value!r}.")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"`kappa` must be finite and greater than 0, but holds {float(value)}.")
    return float(value)


class ConstantSkipScaling(nn.Module):
    """Multiplies skip i by its constant κ_i (methods `"uniform"` and `"cs"`).

    The constants are not in the state dict: the model's config has them. They can change at any time without a
    recompilation, and no change of dtype rounds them.

    Args:
        method: `"uniform"` or `"cs"`.
        num_skips: N.
        kappa: as in `skip_coefficients`.
    """

    _coefficient_tensor: torch.Tensor

    def __init__(self, method: str, num_skips: int, kappa: float | Sequence[float] | None = None) -> None:
        super().__init__()
        self.method = method
        self.targets = skip_coefficients(method, num_skips, kappa)
        self.coefficients = self.targets
        # Compiled code reads this tensor: a Python float would be burnt into the graph.
        self.register_buffer(
            "_coefficient_tensor", torch.tensor(self.coefficients, dtype=torch.float32), persistent=False
        )

    def set_kappa(self, kappa: float | Sequence[float]) -> None:
        """Changes the constants; invalid values raise as in `skip_coefficients` and change nothing."""
        self.targets = skip_coefficients(self.method, len(self.targets), kappa)
        self.warm_up(1.0)

    def warm_up(self, progress: float) -> None:
        """Puts 1 + progress · (κ_i - 1) in force, exact at both ends: 1 at progress 0, κ_i at progress 1."""
        self.coefficients = tuple((1 - progress) + progress * target for target in self.targets)
        self._coefficient_tensor.copy_(torch.tensor(self.coefficients))

    def forward(self, skip: torch.Tensor, index: int) -> torch.Tensor:
        """Scales skip `index` (0 = the shallowest), a tensor of any shape, in its own dtype."""
        if torch.compiler.is_compiling():
            if self.method == "cs" and index == 0:
                return skip  # κ^0, whatever κ becomes
            return skip * self._coefficient_tensor[index]
        coefficient = self.coefficients[index]
        return skip if coefficient == 1 else skip * coefficient

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # .to(), .half(), .to_empty() …: follow the device, but keep float32 and the exact values.
        super()._apply(fn, recurse)
        device = self._coefficient_tensor.device
        self._coefficient_tensor = torch.tensor(self.coefficients, dtype=torch.float32, device=device)
        return self


class SkipGate(nn.Module):
    """κ = σ(W₂ · ReLU(W₁ · pool(skip))), the scaling network of LS (paper, section 4.2).

    Args:
        num_features: n, the size of axis 1: the gate lives there, the axes after it are averaged.
        reduction: W₁ maps n → max(n // reduction, 1), W₂ maps back.
        initial_gate: `None` keeps PyTorch's default initialisation, as the reference code does. With p in (0, 1)
            every gate starts exactly at p (W₂ = 0, b₂ = logit p).
    """

    def __init__(self, num_features: int, reduction: int = 16, initial_gate: float | None = None) -> None:
        super().__init__()
        hidden_features = max(num_features // reduction, 1)
        self.linear_1 = nn.Linear(num_features, hidden_features)
        self.act = nn.ReLU()
        self.linear_2 = nn.Linear(hidden_features, num_features)
        self.initial_gate = initial_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.linear_1.reset_parameters()
        self.linear_2.reset_parameters()
        if self.initial_gate is not None:
            nn.init.zeros_(self.linear_2.weight)
            nn.init.constant_(self.linear_2.bias, math.log(self.initial_gate / (1 - self.initial_gate)))

    def forward(self, skip: torch.Tensor) -> torch.Tensor:
        """(batch, n, …) → the gate, (batch, n, 1, …), each entry in (0, 1)."""
        pooled_axes = tuple(range(2, skip.ndim))
        gate = self.linear_2(self.act(self.linear_1(skip.mean(dim=pooled_axes))))
        return gate.sigmoid().reshape(gate.shape + (1,) * len(pooled_axes))


class LearnableSkipScaling(nn.Module):
    """Multiplies each skip by a gate computed from it (methods `"ls"` and `"ls_unshared"`).

    Args:
        widths: for each skip, shallowest first, the size of the gated axis: channels in a convolutional UNet, tokens
            in a U-ViT.
        shared: one network for all skips of one width (`"ls"`), or one per skip (`"ls_unshared"`).
        reduction, initial_gate: as in `SkipGate`.

    Raises:
        ValueError: `reduction` below 1 or `initial_gate` outside (0, 1).
        TypeError: either is of the wrong type.
    """

    def __init__(
        self, widths: Sequence[int], shared: bool, reduction: int = 16, initial_gate: float | None = None
    ) -> None:
        super().__init__()
        if isinstance(reduction, bool) or not isinstance(reduction, int):
            raise TypeError(f"`ls_reduction` must be an integer, but is {reduction!r}.")
        if reduction < 1:
            raise ValueError(f"`ls_reduction` must be at least 1, but is {reduction}.")
        if initial_gate is not None:
            if isinstance(initial_gate, bool) or not isinstance(initial_gate, Real):
                raise TypeError(f"`ls_initial_gate` must be a number or None, but is {initial_gate!r}.")
            if not 0 < initial_gate < 1:
                raise ValueError(f"`ls_initial_gate` must lie between 0 and 1, both excluded, but is {initial_gate}.")
        # Named apart, so that a checkpoint of the one method is never taken for the other's.
        self.names = [f"width_{width}" if shared else f"skip_{i + 1}" for i, width in enumerate(widths)]
        self.gates = nn.ModuleDict(
            {
                name: SkipGate(width, reduction, initial_gate)
                for name, width in dict(zip(self.names, widths, strict=True)).items()
            }
        )

    def forward(self, skip: torch.Tensor, index: int) -> torch.Tensor:
        """Scales skip `index` (0 = the shallowest), (batch, width, …)."""
        return skip * self.gates[self.names[index]](skip)


def make_skip_scaling(
    method: str,
    widths: Sequence[int],
    kappa: float | Sequence[float] | None = None,
    ls_reduction: int = 16,
    ls_initial_gate: float | None = None,
) -> ConstantSkipScaling | LearnableSkipScaling | None:
    """The module for a method, called as `module(skip, index)`; `None` for `"none"`, which needs no operation.

    Args:
        method: one of `SKIP_SCALING_METHODS`.
        widths: for each skip, shallowest first, the size of the axis that a gate would live on.
        kappa: as in `skip_coefficients`.
        ls_reduction, ls_initial_gate: as in `LearnableSkipScaling`.

    Raises:
        ValueError, TypeError: as in `skip_coefficients` and `LearnableSkipScaling`; also `ls_initial_gate` given
            with a method that has no gates.
    """
    check_method(method)
    if method in ("ls", "ls_unshared"):
        if kappa is not None:
            raise ValueError(f"`kappa` is for the constant methods: leave it out with skip_scaling={method!r}.")
        return LearnableSkipScaling(widths, method == "ls", ls_reduction, ls_initial_gate)
    if ls_initial_gate is not None:
        raise ValueError(f"`ls_initial_gate` is for 'ls' and 'ls_unshared', but skip_scaling is {method!r}.")
    if method == "none":
        skip_coefficients(method, len(widths), kappa)  # refuses a kappa that would be ignored
        return None
    return ConstantSkipScaling(method, len(widths), kappa)
