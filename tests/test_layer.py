"""The whole layer against the oracle: output, routing, every gradient; in train and eval, in every float type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import helpers
import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import FP32, FP64, HALF, Case, assert_gradients, make_case, relative_rms
from torch import Tensor, nn

from dynmoe_tutel.kernels.grouped_ffn import gemm_dtype

FEW = 1e-2  # in half precision, for the router: 8e-3 is the largest of 20 draws

# The arguments of make_case, and a condition on its tokens' k that makes the case fit its name.
CASES: dict[str, tuple[dict[str, Any], Callable[[list[int]], bool]]] = {
    "mixed": ({}, lambda k: {0, 1, 2, 5} <= set(k)),
    "masked slots": ({"E": 7, "active": [1, 2, 5]}, lambda k: {0, 1, 2, 3} == set(k)),
    "one expert": ({"E": 1, "G": 0.05}, lambda k: {0, 1} == set(k)),
    "one of four slots": ({"E": 4, "active": [2], "G": 0.05}, lambda k: {0, 1} == set(k)),
    "every token takes all": ({"G": -1.5}, lambda k: {5} == set(k)),
    "every token is unrouted": ({"G": 1.5}, lambda k: {0} == set(k)),
    "E = 65": ({"T": 12, "E": 65, "G": (0.35, 0.7)}, lambda k: min(k) == 0 and max(k) > 3),
    "E = 200": (
        {"T": 10, "E": 200, "active": [*range(120), *range(130, 200)], "G": (0.5, 0.8)},
        lambda k: {0, 1, 2} == set(k),
    ),
    "T = 0": ({"T": 0}, lambda k: not k),
    "T = 1": ({"T": 1, "D": 5, "H": 3}, lambda k: len(k) == 1 and k[0] > 1),
    "odd sizes": ({"T": 13, "D": 11, "H": 7, "E": 3}, lambda k: {0, 1, 3} <= set(k)),
    "another output size": ({"T": 9, "output_dim": 6}, lambda k: min(k) == 0),
}


def named_case(name: str, **more: Any) -> Case:
    arguments, holds = CASES[name]
    case = make_case(**arguments, **more)
    assert holds(case.k()), case.k()
    return case


def check(case: Case, training: bool, combine_gradient: str, tolerance: float, few: float | None = None) -> None:
    """Output and every gradient of `case` against the oracle's."""
    case.layer.train(training)
    x = case.x.clone().requires_grad_()
    y = case.layer(x)
    assert y.dtype == case.x.dtype
    assert relative_rms(y, case.expected_output(training)) < tolerance
    y.backward(case.dy)
    expected = case.expected_gradients(training, combine_gradient)
    assert_gradients(helpers.gradients(case.layer, x), expected, case.gate, tolerance, few)


@pytest.mark.parametrize("temperature", [None, 1.3])
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient(name: str, training: bool, combine_gradient: str, temperature: float | None) -> None:
    case = named_case(name, temperature=temperature, combine_gradient=combine_gradient)
    check(case, training, combine_gradient, FP32)


@pytest.mark.parametrize("temperature", [None, 1.3])
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("training", [True, False])
def test_float64_is_tight(training: bool, combine_gradient: str, temperature: float | None) -> None:
    case = named_case("mixed", temperature=temperature, combine_gradient=combine_gradient, dtype=torch.float64)
    check(case, training, combine_gradient, FP64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
def test_half_precision(kind: str, training: bool, combine_gradient: str, dtype: torch.dtype) -> None:
    activation = F.silu if kind == "llama_ffn" else F.gelu
    case = make_case(
        48,
        32,
        40,
        6,
        kind=kind,
        activation=activation,
        G=(-0.1, 0.2),
        temperature=1.3,
        dtype=dtype,
        combine_gradient=combine_gradient,
    )
    assert min(case.k()) == 0
    # a processor's half-precision products each round to half; the fp32 products that replace them round once a chain
    native = gemm_dtype(dtype, "cpu") == dtype
    check(case, training, combine_gradient, 5e-3 if native else HALF, FEW)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Experts in half precision (exact for their weights here), the gate in fp32: the same loss bit by bit."""
    case = make_case(48, 32, 40, 6, temperature=1.3, dtype=dtype, aux_losses=dict.fromkeys(helpers.TERMS, 1.0))
    case.layer.float()
    l_aux = case.layer(case.x.float()).l_aux
    x = case.x.float().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = case.layer(x)
    assert torch.equal(y.l_aux, l_aux)
    assert y.dtype == torch.float32
    assert relative_rms(y, case.expected_output(True)) < HALF
    y.backward(case.dy.float())
    assert_gradients(helpers.gradients(case.layer, x), case.expected_gradients(True, "mean"), case.gate, HALF, FEW)


def test_route_under_autocast_is_fp32() -> None:
    case = make_case(48, 32, 40, 6)
    plain = case.layer.route(case.x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = case.layer.route(case.x)
    assert torch.equal(routing.assigned, plain.assigned)
    assert routing.scores.dtype == torch.float32
    assert torch.equal(routing.scores, plain.scores)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("ffn", F.relu),
        ("ffn", F.silu),
        ("ffn", nn.GELU()),
        ("ffn", torch.tanh),  # no fused kernel: the path by stages
        ("llama_ffn", F.silu),
    ],
)
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("training", [True, False])
def test_kinds_of_experts(
    kind: str, activation: Callable[[Tensor], Tensor], training: bool, combine_gradient: str
) -> None:
    case = named_case("mixed", kind=kind, activation=activation, combine_gradient=combine_gradient)
    check(case, training, combine_gradient, FP32)


@pytest.mark.parametrize("temperature", [4.7, 6.0])
def test_a_temperature_over_its_bound(temperature: float) -> None:
    """tau stays 100 = exp(4.605...) and the temperature has no gradient. Rounding errors of the cosine count 100-fold.

    Thresholds are near 0, where scores are not saturated: for a saturated score, 1 - s has no digits in fp32."""
    case = make_case(T=100, G=(-0.02, 0.02), temperature=temperature)
    assert case.gate.tau == pytest.approx(100)
    check(case, True, "mean", 10 * FP32)
    assert not case.layer.gates[0].temperature.grad.any()


def test_a_saturated_score_is_still_over_a_saturated_threshold() -> None:
    """cos = 0.9 against G = 0.4 at tau = 100: in fp32 both sigmoids round to 1, so comparing them would fail."""
    case = make_case(T=3, G=0.4, temperature=6.0)
    w_D = F.normalize(case.layer.gates[0].sim_matrix.detach(), dim=0)[:, 1]
    across_D = F.normalize(case.x[1] - (case.x[1] @ w_D) * w_D, dim=0)
    case.x[1] = 0.9 * w_D + 0.19**0.5 * across_D
    routing = case.layer.route(case.x)
    assert float(routing.scores[1, 1].detach()) == float(routing.thresholds[1].detach()) == 1.0
    assert bool(routing.assigned[1, 1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("temperature", [None, 1.3])
@pytest.mark.parametrize("name", CASES)
def test_routing(name: str, temperature: float | None, training: bool) -> None:
    case = named_case(name, temperature=temperature)
    x_TD, active = case.x.double(), list(case.gate.active)
    routing = case.layer.train(training).route(case.x)
    assert routing.scores.dtype == torch.float32
    assert relative_rms(routing.scores[:, active], oracle.scores(x_TD, case.gate)[:, active]) < FP32
    assert relative_rms(routing.thresholds[active], oracle.thresholds(case.gate)[active]) < FP32
    a_TE = oracle.assignments(x_TD, case.gate, training)
    assert torch.equal(routing.assigned, a_TE)
    assert torch.equal(routing.k_per_token, a_TE.sum(dim=1, dtype=torch.int32))
    assert torch.equal(routing.counts, a_TE.sum(dim=0, dtype=torch.int32))
    assert torch.equal(routing.unrouted, ~oracle.assignments(x_TD, case.gate).any(dim=1))
    for field, values in oracle.index(a_TE).items():
        assert torch.equal(getattr(routing, field), torch.tensor(values, dtype=torch.int32)), field


def test_a_zero_token_has_cosine_zero_and_passes_no_gate_gradient() -> None:
    """0 / 0 in the normalisation would be NaN; with negative thresholds the token is still routed."""
    case = make_case(G=(-0.3, -0.1))
    case.x[3] = 0
    assert case.k()[3] == 5
    check(case, True, "mean", FP32)
    expert_only = oracle.backward(case.x.double(), case.gate, case.experts, case.dy.double(), True, "mean")["x"][3]
    x = case.x.clone().requires_grad_()
    case.layer(x).backward(case.dy)
    assert relative_rms(x.grad[3], expert_only) < FP32


def test_a_score_equal_to_its_threshold_is_no_assignment() -> None:
    """A zero token has cosine exactly 0, and G is 0."""
    case = make_case(G=0.0)
    case.x[3] = 0
    assert int(case.layer.route(case.x).k_per_token[3]) == 0


@pytest.mark.parametrize("shape", [(24, 16), (4, 6, 16), (2, 3, 4, 16), (1, 24, 16), (4, 0, 16)])
def test_leading_dimensions_and_strides(shape: tuple[int, ...]) -> None:
    case = make_case()
    tokens = torch.Size(shape[:-1]).numel()
    x = case.x[:tokens].reshape(shape)
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert tokens == 0 or not strided.is_contiguous()
    for given in (x, strided, x.transpose(0, 1).contiguous().transpose(0, 1)):
        y = case.layer(given)
        assert y.shape == given.shape
        assert torch.equal(y, case.layer(x))
    assert relative_rms(y.reshape(-1, 16), case.expected_output(True)[:tokens]) < FP32


@pytest.mark.parametrize("training", [True, False])
def test_two_runs_are_bitwise_equal(training: bool) -> None:
    case = make_case(T=64, E=9, G=(-0.1, 0.2), aux_losses=dict.fromkeys(helpers.TERMS, 1.0))
    case.layer.train(training)
    results = []
    for layer in (case.layer, copy.deepcopy(case.layer)):
        x = case.x.clone().requires_grad_()
        y = layer(x)
        ((y * case.dy).sum() + y.l_aux).backward()
        results.append({"y": y, "l_aux": y.l_aux, **helpers.gradients(layer, x)})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("capacity", ["full", 5.0, 2.5])
@pytest.mark.parametrize("training", [True, False])
def test_a_capacity_that_holds_all_changes_nothing(capacity: float | str, training: bool) -> None:
    """Row arrays with unused rows give the same output and gradients, whatever these rows hold."""
    exact, bounded = (make_case(capacity=c, temperature=1.3) for c in ("exact", capacity))
    assert sum(exact.k()) <= 2.5 * 24 - exact.k().count(0)
    results = []
    for case in (exact, bounded):
        x = case.x.clone().requires_grad_()
        y = case.layer.train(training)(x)
        y.backward(case.dy)
        results.append({"y": y, **helpers.gradients(case.layer, x)})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert int(bounded.layer.dropped_assignments) == 0


def test_uninitialised_memory_never_reaches_a_result() -> None:
    """Deterministic mode fills every new buffer with NaN or the largest integer before it is used."""
    cases = [
        make_case(E=7, active=[1, 2, 5], capacity=capacity, kind=kind, activation=activation)
        for capacity in ("exact", "full", 3.0)
        for kind, activation in (("ffn", F.gelu), ("ffn", torch.tanh), ("llama_ffn", F.silu))
    ]
    torch.use_deterministic_algorithms(True)
    try:
        for case in cases:
            check(case, True, "mean", FP32)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_mode_and_no_grad(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    expected = case.layer.eval()(case.x)
    with torch.inference_mode():
        assert torch.equal(case.layer(case.x), expected)
    with torch.no_grad():
        assert torch.equal(case.layer(case.x), expected)


def test_frozen_experts_or_gate_change_no_other_gradient() -> None:
    """If fine-tuning freezes one part, the rest learns as before."""
    for frozen in ("experts", "gates", "x"):
        case = make_case()
        x = case.x.clone().requires_grad_(frozen != "x")
        for name, parameter in case.layer.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        case.layer(x).backward(case.dy)
        expected = case.expected_gradients(True, "mean")
        found = {"x": x, **dict(case.layer.named_parameters())}
        for name, tensor in found.items():
            if name.startswith(frozen):
                assert tensor.grad is None
            elif not (frozen == "gates" and name == "x"):
                assert relative_rms(tensor.grad, expected[name]) < FP32, name
