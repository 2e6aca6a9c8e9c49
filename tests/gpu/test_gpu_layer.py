"""The whole layer on a GPU: against the oracle, its invariants bit by bit, and its indices against the CPU's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import FP32, HALF, Case, assert_gradients, make_case, relative_rms
from test_layer import CASES, FEW, named_case
from torch import Tensor

from dynmoe_tutel import kernels

TF32 = 4e-3  # tensor cores truncate fp32 operands to 10 bits instead of rounding: emulated, the error is 2.3e-3
# dtype, "highest" or "high" (tf32), tolerance, tolerance for the few numbers of thresholds and temperature
PRECISIONS = {
    "bf16": (torch.bfloat16, "highest", HALF, FEW),
    "fp16": (torch.float16, "highest", HALF, FEW),
    "fp32": (torch.float32, "highest", FP32, None),
    "tf32": (torch.float32, "high", TF32, FEW),
}
ACTIVATIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, F.gelu),
    "gelu_tanh": (torch.nn.GELU("tanh"), lambda h: F.gelu(h, approximate="tanh")),
    "relu": (F.relu, F.relu),
    "silu": (F.silu, F.silu),
    "squared_relu": ("squared_relu", lambda h: torch.relu(h).square()),
    "identity": (torch.nn.Identity(), lambda h: h),
    "tanh, by stages": (torch.tanh, torch.tanh),
}


def run(case: Case, device: str, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and every gradient of a copy of the case's layer on `device`, moved to the CPU."""
    layer = copy.deepcopy(case.layer).to(device).train(training)
    x = case.x.clone().to(device).requires_grad_()
    y = layer(x)
    assert y.device.type == torch.device(device).type
    y.backward(case.dy.to(device))
    return y.detach().cpu(), {name: grad.cpu() for name, grad in helpers.gradients(layer, x).items()}


def check(
    case: Case,
    device: str,
    tolerance: float,
    few: float | None = None,
    *,
    training: bool = True,
    combine_gradient: str = "mean",
) -> None:
    """Output and every gradient on `device` against the oracle's.

    In half precision, where sums of few rows cancel, the error may be 1.5 times that of the CPU's loop over experts.
    """
    expected_y = case.expected_output(training)
    expected = case.expected_gradients(training, combine_gradient)
    if case.x.dtype in (torch.bfloat16, torch.float16):
        y, grads = run(case, "cpu", training)
        off = {name: relative_rms(grad, expected[name]) for name, grad in grads.items() if "temperature" not in name}
        few = max(few or tolerance, 1.5 * off.pop("gates.0.gates"))
        tolerance = max([tolerance, *(1.5 * error for error in (relative_rms(y, expected_y), *off.values()))])
        assert tolerance < 2e-2, off
    y, grads = run(case, device, training)
    assert y.dtype == case.x.dtype
    assert relative_rms(y, expected_y) < tolerance
    assert_gradients(grads, expected, case.gate, tolerance, few)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
def test_both_kinds_in_every_precision(kind: str, precision: str, training: bool, device: str) -> None:
    dtype, products, tolerance, few = PRECISIONS[precision]
    torch.set_float32_matmul_precision(products)
    activation = F.silu if kind == "llama_ffn" else F.gelu
    case = make_case(
        150, 64, 96, 6, kind=kind, activation=activation, G=(-0.1, 0.2), temperature=1.3, dtype=dtype, seed=1
    )
    check(case, device, tolerance, few, training=training)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_of_the_cpu(name: str, combine_gradient: str, precision: str, device: str) -> None:
    """No tokens, no rows, every expert, masked slots, E beyond 64, odd sizes."""
    dtype, _, tolerance, few = PRECISIONS[precision]
    case = named_case(name, combine_gradient=combine_gradient, dtype=dtype)
    check(case, device, tolerance, few, combine_gradient=combine_gradient)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str, kind: str, precision: str, device: str) -> None:
    dtype, _, tolerance, few = PRECISIONS[precision]
    given, function = ACTIVATIONS[name]
    case = make_case(100, 40, 72, 5, kind=kind, activation=F.silu, G=(-0.1, 0.2), dtype=dtype, seed=3)
    experts = case.layer.experts
    case.experts = (_gated if kind == "llama_ffn" else _plain)(experts, function)
    experts.activation_fn = kernels.ACTIVATIONS[given].value if isinstance(given, str) else given
    check(case, device, tolerance, few)


def _plain(experts: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return helpers.oracle_experts(experts, "ffn", function)


def _gated(experts: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The oracle's view of gated experts with an activation other than silu."""
    view = helpers.oracle_experts(experts, "llama_ffn", function)
    return type(view)(lambda x, w1, w2, w3: (function(x @ w1) * (x @ w2)) @ w3, view.parameters)


@pytest.mark.parametrize("engine", ["triton", "grouped_mm", "torch"])
@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
def test_engines_agree(kind: str, engine: str, device: str) -> None:
    """All are within tolerance of the oracle; sizes are multiples of 16 bytes, as grouped_mm requires."""
    if engine == "triton" and device == "cpu":
        pytest.skip("Triton has no kernels for a CPU")
    activation = F.silu if kind == "llama_ffn" else F.gelu
    case = make_case(120, 64, 96, 6, kind=kind, activation=activation, G=(-0.1, 0.2), dtype=torch.bfloat16, seed=2)
    case.layer.experts.engine = engine
    check(case, device, HALF, FEW)


def test_recompute_gives_the_same_bits(device: str) -> None:
    results = []
    for recompute in ("none", "up"):
        case = make_case(120, 64, 96, 6, dtype=torch.bfloat16, seed=2)
        case.layer.experts.recompute = recompute
        results.append(_step(case.layer.to(device), case.x.to(device), case.dy.to(device)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("capacity", [6.0, "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_capacity_changes_no_bit_where_nothing_is_dropped(
    capacity: float | str, dtype: torch.dtype, device: str, poisoned: None
) -> None:
    """Unused rows are NaN here; a result that read one would show it.

    The gradients of weights may differ: their split into sums depends on the length of the row arrays.
    """
    results = []
    for mode in ("exact", capacity):
        case = make_case(400, 64, 96, 6, dtype=dtype, seed=5, capacity=mode)
        results.append(_step(case.layer.to(device), case.x.to(device), case.dy.to(device)))
    assert all(a.isfinite().all() for a in results[0])
    weights = {
        3 + i for i, (name, _) in enumerate(case.layer.named_parameters()) if "fc" in name and "bias" not in name
    }
    assert len(weights) == 2
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if i in weights:
            assert relative_rms(a.cpu(), b.cpu()) < (HALF if dtype == torch.bfloat16 else FP32)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("capacity", ["exact", 1.0])
def test_two_runs_are_bitwise_equal(capacity: float | str, combine_gradient: str, device: str) -> None:
    case = make_case(700, 96, 160, 8, dtype=torch.bfloat16, capacity=capacity, combine_gradient=combine_gradient)
    layer, x, dy = case.layer.to(device), case.x.to(device), case.dy.to(device)
    first = _step(layer, x, dy)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, _step(layer, x, dy), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_a_token_does_not_depend_on_the_others(training: bool, device: str) -> None:
    """The same bits in another order and among other tokens, with arrays of the same length."""
    case = make_case(512, 96, 160, 8, dtype=torch.bfloat16, seed=1, capacity="full")
    layer, x = case.layer.to(device).train(training), case.x.to(device)
    with torch.no_grad():
        y = layer(x)
        order = torch.randperm(512, generator=torch.Generator().manual_seed(0)).to(device)
        assert torch.equal(layer(x[order]), y[order])
        other = x.clone()
        other[100:] = other[100:].flip(1) * 3
        assert torch.equal(layer(other)[:100], y[:100])


def test_a_token_alone(device: str) -> None:
    """A batch of one gets smaller tiles: the same decisions, and values equal up to rounding."""
    case = make_case(64, 96, 160, 8, dtype=torch.bfloat16, seed=1)
    layer, x = case.layer.to(device), case.x.to(device)
    with torch.no_grad():
        together, alone = layer(x), torch.cat([layer(x[t : t + 1]) for t in range(64)])
        bits = torch.cat([layer.route(x[t : t + 1]).bits for t in range(64)])
        assert torch.equal(bits, layer.route(x).bits)
    assert relative_rms(alone.cpu(), together.cpu()) < HALF


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("E", [1, 63, 64, 65, 200, 512])
@pytest.mark.parametrize("T", [0, 1, 97, 3000])
def test_indices_are_those_of_the_cpu(T: int, E: int, density: float, device: str, poisoned: None) -> None:
    generator = torch.Generator().manual_seed(T + E)
    assigned_TE = torch.rand(T, E, generator=generator) < density
    bits_TW = kernels.pack_bits(assigned_TE)
    A = int(assigned_TE.sum())
    for capacity in (-1, A, A + 37, T * E):
        expected = kernels.ragged_index(bits_TW, E, capacity)
        found = kernels.ragged_index(bits_TW.to(device), E, capacity)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)), capacity


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("E", [5, 64, 130])
def test_what_a_bound_drops_is_what_the_cpu_drops(E: int, distinct: bool, device: str) -> None:
    """Also if margins are equal, when later assignments go first."""
    generator = torch.Generator().manual_seed(E)
    T = 1000
    assigned_TE = torch.rand(T, E, generator=generator) < 0.4
    margin_TE = torch.rand(T, E, generator=generator)
    if not distinct:
        margin_TE = (margin_TE * 4).floor() / 4
    bits_TW, A = kernels.pack_bits(assigned_TE), int(assigned_TE.sum())
    for capacity in (0, 1, A // 2, A - 1, A, A + 1):
        kept, dropped = kernels.bound_assignments(bits_TW, margin_TE, capacity)
        found, count = kernels.bound_assignments(bits_TW.to(device), margin_TE.to(device), capacity)
        assert torch.equal(found.cpu(), kept), capacity
        assert int(count) == int(dropped)


@pytest.mark.parametrize(("T", "E"), [(70_001, 8), (40_000, 200)])
def test_indices_of_many_tokens(T: int, E: int, device: str, poisoned: None) -> None:
    """More than 1,024 blocks: prefixes take several steps, and selection takes several tiles per program."""
    generator = torch.Generator().manual_seed(T)
    assigned_TE = torch.rand(T, E, generator=generator) < 0.2
    margin_TE = torch.randint(-500, 500, (T, E), generator=generator) / 500
    bits_TW, A = kernels.pack_bits(assigned_TE), int(assigned_TE.sum())
    for capacity in (-1, A + 5000):
        expected = kernels.ragged_index(bits_TW, E, capacity)
        found = kernels.ragged_index(bits_TW.to(device), E, capacity)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)), capacity
    kept, dropped = kernels.bound_assignments(bits_TW, margin_TE, A // 2)
    found, count = kernels.bound_assignments(bits_TW.to(device), margin_TE.to(device), A // 2)
    assert torch.equal(found.cpu(), kept)
    assert int(count) == int(dropped) == A - A // 2


@pytest.mark.parametrize("E", [1, 8, 65, 200])
def test_decisions_of_the_gate_are_those_of_the_cpu(E: int, device: str) -> None:
    """In fp32 arithmetic for any dtype, except closer to a threshold than the margin."""
    case = make_case(500, 96, 8, E, dtype=torch.bfloat16, G=(-0.05, 0.2), seed=4) if E < 60 else make_case(
        60, 96, 8, E, dtype=torch.bfloat16, G=(0.1, 0.3), seed=4
    )  # fmt: skip
    expected = case.layer.route(case.x)
    found = copy.deepcopy(case.layer).to(device).route(case.x.to(device))
    for name in ("bits", "expert_offsets", "token_offsets", "token_of_row", "row_of_assignment", "unrouted"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert relative_rms(found.scores.cpu(), expected.scores) < FP32


def test_autocast(device: str) -> None:
    """Experts compute in half precision, the gate in fp32."""
    case = make_case(100, 64, 96, 6, temperature=1.3, dtype=torch.bfloat16)
    layer = case.layer.float().to(device)
    x = case.x.float().to(device).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    assert relative_rms(y.cpu(), case.expected_output(True)) < HALF
    y.backward(case.dy.float().to(device))
    found = {name: grad.cpu() for name, grad in helpers.gradients(layer, x).items()}
    assert_gradients(found, case.expected_gradients(True, "mean"), case.gate, HALF, FEW)


def _step(layer: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, auxiliary loss and every gradient of one step."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    wanted = [x, *layer.parameters()]
    grads = torch.autograd.grad((y, y.l_aux), wanted, (dy, torch.ones_like(y.l_aux)))
    return [y.detach(), y.l_aux.detach(), *grads]
