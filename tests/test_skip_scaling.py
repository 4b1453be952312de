"""The method by itself: coefficients, constants, gates."""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_scalelong import skip_coefficients
from diffusers_scalelong.skip_scaling import ConstantSkipScaling, LearnableSkipScaling, SkipGate, make_skip_scaling

kappas = st.floats(min_value=1e-3, max_value=1.0)
depths = st.integers(min_value=1, max_value=40)


@given(depths)
def test_none_is_one_everywhere(n):
    assert skip_coefficients("none", n) == (1.0,) * n


@given(depths, kappas)
def test_uniform_is_kappa_everywhere(n, kappa):
    assert skip_coefficients("uniform", n, kappa) == (kappa,) * n


@given(depths)
def test_uniform_defaults_to_one_over_root_two(n):
    assert all(abs(c**2 - 0.5) < 1e-15 for c in skip_coefficients("uniform", n))


@given(depths, kappas)
def test_cs_leaves_the_shallowest_skip_alone_and_decays_geometrically(n, kappa):
    coefficients = skip_coefficients("cs", n, kappa)
    assert len(coefficients) == n
    assert coefficients[0] == 1
    exact = [Fraction(kappa) ** i for i in range(n)]
    assert all(math.isclose(c, e, rel_tol=1e-12) for c, e in zip(coefficients, exact, strict=True))
    assert all(deeper <= shallower for shallower, deeper in itertools.pairwise(coefficients))


@given(st.lists(kappas, min_size=1, max_size=20))
def test_a_list_is_a_schedule_in_its_own_order(schedule):
    assert skip_coefficients("uniform", len(schedule), schedule) == tuple(schedule)
    assert skip_coefficients("uniform", len(schedule), tuple(schedule)) == tuple(schedule)


def test_the_table_of_the_paper():
    assert skip_coefficients("cs", 4, 0.5) == (1, 0.5, 0.25, 0.125)
    assert skip_coefficients("uniform", 2, np.float64(0.25)) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("scale", 3), ValueError, "none, uniform, cs, ls, ls_unshared"),
        (("cs", 0), ValueError, "at least 1"),
        (("cs", 2.0), TypeError, "integer"),
        (("cs", 3, "0.7"), TypeError, "number"),
        (("cs", 3, True), TypeError, "number"),
        (("cs", 3, torch.tensor(0.7)), TypeError, "number"),
        (("cs", 3, math.nan), ValueError, "finite"),
        (("cs", 3, math.inf), ValueError, "finite"),
        (("cs", 3, 0), ValueError, "greater than 0"),
        (("cs", 3, -0.5), ValueError, "greater than 0"),
        (("cs", 3, [0.5, 0.5, 0.5]), ValueError, "skip_scaling='uniform'"),
        (("uniform", 3, [0.5, 0.5]), ValueError, "2 constants.*3 long skip connections"),
        (("uniform", 3, []), ValueError, "0 constants"),
        (("uniform", 3, [0.5, None, 0.5]), TypeError, "number"),
        (("uniform", 3, [0.5, -1, 0.5]), ValueError, "greater than 0"),
        (("none", 3, 0.5), ValueError, "no meaning"),
        (("ls", 3, 0.5), ValueError, "no meaning"),
        (("ls_unshared", 3), ValueError, "no constants"),
        (("cs", 3, 1e300), ValueError, "too large"),
    ],
)
@pytest.mark.filterwarnings("ignore:kappa")
def test_bad_input_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        skip_coefficients(*arguments)


def test_kappa_above_one_is_allowed_with_a_warning():
    with pytest.warns(UserWarning, match="above 1"):
        assert skip_coefficients("cs", 3, 2) == (1, 2, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_constants_scale_in_the_dtype_of_the_skip(dtype):
    skip = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    scaled = ConstantSkipScaling("uniform", 2, [0.3, 0.6])(skip, 1)
    assert scaled.dtype == dtype
    assert torch.equal(scaled, (skip.double() * 0.6).to(dtype)) or dtype == torch.float32
    torch.testing.assert_close(scaled.double(), skip.double() * 0.6, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_coefficient_of_one_returns_the_very_tensor():
    skip = torch.randn(1, 2, 2, 2)
    assert ConstantSkipScaling("cs", 2, 0.5)(skip, 0) is skip
    assert ConstantSkipScaling("uniform", 2, [0.5, 1])(skip, 1) is skip


@pytest.mark.parametrize("method", ["uniform", "cs"])
def test_constants_survive_half_precision_and_stay_out_of_the_state_dict(method):
    scaling = ConstantSkipScaling(method, 5, 0.7)
    before = scaling.coefficients, scaling._coefficient_tensor.clone()
    assert not scaling.state_dict()
    scaling.half().bfloat16().float()
    assert scaling.coefficients == before[0]
    assert torch.equal(scaling._coefficient_tensor, before[1])
    assert scaling.half()._coefficient_tensor.dtype == torch.float32
    meta = copy.deepcopy(scaling).to("meta")
    assert torch.equal(meta.to_empty(device="cpu")._coefficient_tensor, before[1])


def test_an_invalid_kappa_changes_nothing():
    scaling = ConstantSkipScaling("uniform", 3, 0.7)
    with pytest.raises(ValueError, match="finite"):
        scaling.set_kappa(math.nan)
    with pytest.raises(ValueError, match="constants"):
        scaling.set_kappa([0.1, 0.2])
    assert scaling.coefficients == (0.7, 0.7, 0.7)


@pytest.mark.parametrize("shape", [(3, 32, 4, 4), (3, 32, 10)], ids=["channels", "tokens"])
def test_the_gate_is_the_papers_formula(shape):
    torch.manual_seed(0)
    gate = SkipGate(32, reduction=4)
    skip = torch.randn(shape)
    state = {key: value.numpy() for key, value in gate.state_dict().items()}
    expected = np.empty(shape[:2])
    for row, image in enumerate(skip.numpy()):
        pooled = image.reshape(32, -1).mean(axis=1)
        hidden = np.maximum(state["linear_1.weight"] @ pooled + state["linear_1.bias"], 0)
        expected[row] = 1 / (1 + np.exp(-(state["linear_2.weight"] @ hidden + state["linear_2.bias"])))
    value = gate(skip)
    assert value.shape == (*shape[:2], *(1 for _ in shape[2:]))
    np.testing.assert_allclose(value.detach().numpy().reshape(shape[:2]), expected, rtol=1e-5)


@pytest.mark.parametrize(("width", "reduction", "hidden"), [(64, 16, 4), (8, 16, 1), (33, 16, 2), (64, 1, 64)])
def test_the_gates_hidden_width(width, reduction, hidden):
    gate = SkipGate(width, reduction)
    assert sum(p.numel() for p in gate.parameters()) == width * hidden + hidden + hidden * width + width


def test_gates_keep_pytorchs_default_initialisation():
    torch.manual_seed(3)
    gate = SkipGate(32, 4)
    torch.manual_seed(3)
    linear_1, linear_2 = torch.nn.Linear(32, 8), torch.nn.Linear(8, 32)
    # The default draws differ only in being drawn twice: at construction and by `reset_parameters`.
    linear_1.reset_parameters(), linear_2.reset_parameters()
    assert torch.equal(gate.linear_1.weight, linear_1.weight)
    assert torch.equal(gate.linear_2.bias, linear_2.bias)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.99])
def test_an_initial_gate_is_met_and_can_move(p):
    torch.manual_seed(0)
    scaling = LearnableSkipScaling([16, 16], shared=False, reduction=2, initial_gate=p)
    skip = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(scaling.gates["skip_1"](skip), torch.full((2, 16, 1, 1), p), rtol=1e-6, atol=0)
    optimizer = torch.optim.SGD(scaling.parameters(), lr=1.0)
    for _ in range(2):  # W₁ receives a gradient as soon as W₂ has left zero
        optimizer.zero_grad()
        scaling(skip, 0).square().mean().backward()
        optimizer.step()
    assert scaling.gates["skip_1"].linear_1.weight.grad.abs().max() > 0


def test_shared_gates_are_one_per_width():
    shared = LearnableSkipScaling([8, 8, 16], shared=True)
    unshared = LearnableSkipScaling([8, 8, 16], shared=False)
    assert list(shared.gates) == ["width_8", "width_16"]
    assert list(unshared.gates) == ["skip_1", "skip_2", "skip_3"]
    assert not shared.state_dict().keys() & unshared.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "ls", "ls_reduction": 0}, ValueError, "ls_reduction.*at least 1"),
        ({"method": "ls", "ls_reduction": 2.5}, TypeError, "integer"),
        ({"method": "ls", "ls_initial_gate": 0}, ValueError, "between 0 and 1"),
        ({"method": "ls_unshared", "ls_initial_gate": 1.0}, ValueError, "between 0 and 1"),
        ({"method": "ls", "ls_initial_gate": math.nan}, ValueError, "between 0 and 1"),
        ({"method": "ls", "ls_initial_gate": "0.9"}, TypeError, "number"),
        ({"method": "ls", "kappa": 0.7}, ValueError, "leave it out"),
        ({"method": "cs", "ls_initial_gate": 0.9}, ValueError, "'ls' and 'ls_unshared'"),
        ({"method": "none", "kappa": 0.7}, ValueError, "no meaning"),
        ({"method": "mean"}, ValueError, "must be one of"),
    ],
)
def test_bad_arguments_of_a_scaling(arguments, error, message):
    with pytest.raises(error, match=message):
        make_skip_scaling(widths=[8, 8], **arguments)
