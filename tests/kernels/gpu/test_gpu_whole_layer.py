"""The whole layer on Triton kernels against the oracle: on a GPU, or with the CPU's operations switched to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FP32,
    HAS_GPU,
    TRAINED_MARGIN,
    Case,
    assert_gradients,
    assert_margin,
    gradients,
    make_case,
    relative_rms,
)
from test_layer import CASES, named_case
from torch import nn

from dynmoe_tutel.kernels.operation import LIBRARY, OPERATIONS, Operation, takes_triton

GATE = ("threshold_gate", "ragged_index", "vector_losses")
_counts: Counter[str] | None = None  # calls by name, while the CPU's operations are switched


@lru_cache
def _make_switchable() -> None:
    """Give each operation a CPU kernel that runs its Triton kernel while `_counts` is set, else the original."""
    for declared in OPERATIONS.values():
        if "triton" not in declared.engines:
            continue

        def run(*args: Any, declared: Operation = declared) -> Any:
            if _counts is None or not takes_triton(args):
                return declared.run(*args)
            _counts[declared.name] += 1
            return declared.engines["triton"](*declared.grouped(args))

        LIBRARY.impl(declared.name, run, "CPU")


@pytest.fixture
def calls() -> Iterator[Counter[str]]:
    """How often each operation ran on Triton kernels in this test (on a GPU they are not counted)."""
    global _counts
    counts: Counter[str] = Counter()
    if not HAS_GPU:
        _make_switchable()
        _counts = counts
    try:
        yield counts
    finally:
        _counts = None


def run(case: Case, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and every gradient of the layer on the device."""
    layer, x = case.layer.to(device), case.x.to(device).clone().requires_grad_()
    y = layer(x)
    y.backward(case.dy.to(device))
    return y, {name: grad.cpu() for name, grad in gradients(layer, x).items()}


def check(case: Case, device: str, training: bool = True, combine_gradient: str = "mean") -> None:
    case.layer.train(training)
    y, found = run(case, device)
    assert relative_rms(y, case.expected_output(training)) < FP32
    assert_gradients(found, case.expected_gradients(training, combine_gradient), case.gate, FP32)


@pytest.mark.parametrize(("training", "combine_gradient"), [(True, "normalized"), (False, "mean")])
@pytest.mark.parametrize("name", [name for name in CASES if name != "E = 200"])
def test_output_and_every_gradient(
    name: str, training: bool, combine_gradient: str, device: str, calls: Counter
) -> None:
    check(named_case(name, temperature=1.3, combine_gradient=combine_gradient), device, training, combine_gradient)
    if not HAS_GPU:
        assert {*GATE, "top_any_ffn", "top_any_ffn_backward"} <= calls.keys()


@pytest.mark.parametrize("capacity", [0.6, "full"])
def test_capacities(capacity: float | str, device: str, calls: Counter) -> None:
    """A bounded layer equals the CPU's with the same bound, drops included; a full one equals the oracle."""
    case = make_case(capacity=capacity)
    expected = run(case, "cpu") if HAS_GPU else _on_torch(case)
    found = run(case, device)
    assert int(case.layer.dropped_assignments) > 0 if capacity == 0.6 else capacity == "full"
    assert relative_rms(found[0], expected[0]) < FP32
    for name, gradient in found[1].items():
        assert relative_rms(gradient, expected[1][name]) < 5 * FP32, name
    if capacity == "full":
        assert relative_rms(found[0], case.expected_output(True)) < FP32
    elif not HAS_GPU:
        assert calls["bound_assignments"] == 1


def _on_torch(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The layer on torch operations, in a test that switches them; leaves the switch as it was."""
    global _counts
    counts, _counts = _counts, None
    try:
        found = run(case, "cpu")
    finally:
        _counts = counts
    case.layer.zero_grad()
    case.layer.dropped_assignments.zero_()
    return found


@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
def test_gated_and_plain_experts(kind: str, device: str, calls: Counter) -> None:
    check(make_case(kind=kind, activation=F.silu), device)


def test_an_activation_that_no_kernel_knows(device: str, calls: Counter) -> None:
    check(make_case(activation=torch.tanh), device)
    if not HAS_GPU:
        assert {"dispatch", "grouped_linear", "grouped_linear_backward", "row_gates", "combine"} <= calls.keys()


def test_losses_on_the_scores_join_the_gradient_of_the_experts(device: str, calls: Counter) -> None:
    """A loss on the scores goes through the gate, the experts' gradient through their operation; both must count."""
    terms = {"load_balance": 1.0, "efficiency": 0.5, "diversity": 1.0}
    case = make_case(aux_losses=terms)
    expected = _with_losses(case, "cpu") if HAS_GPU else _on_torch_with_losses(case)
    for name, gradient in _with_losses(case, device).items():
        assert relative_rms(gradient, expected[name]) < 5 * FP32, name


def _with_losses(case: Case, device: str) -> dict[str, torch.Tensor]:
    layer, x = case.layer.to(device), case.x.to(device).clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    ((y * case.dy.to(device)).sum() + y.l_aux).backward()
    return {name: gradient.cpu().clone() for name, gradient in gradients(layer, x).items()}


def _on_torch_with_losses(case: Case) -> dict[str, torch.Tensor]:
    global _counts
    counts, _counts = _counts, None
    try:
        return _with_losses(case, "cpu")
    finally:
        _counts = counts


def test_fixed_k_takes_the_same_kernels(device: str, calls: Counter) -> None:
    from dynmoe_tutel import moe

    layer = moe.moe_layer(
        gate_type={"type": "top", "k": 2},
        experts={"num_experts_per_device": 4, "hidden_size_per_expert": 24},
        model_dim=16,
        seeds=(1, 2),
    )
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    exact = nn.Module.double(_copy(layer))
    expected = exact(x.double())
    found = layer.to(device)(x.to(device))
    assert relative_rms(found, expected) < FP32
    (found * found).sum().backward()
    (expected * expected).sum().backward()
    for one, other in zip(layer.parameters(), exact.parameters(), strict=True):
        assert relative_rms(one.grad, other.grad) < 5 * FP32
    if not HAS_GPU:
        assert {"ragged_index", "row_gates", "grouped_ffn", "grouped_ffn_backward", "combine"} <= calls.keys()


def _copy(layer: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(layer)


def test_training_grows_as_on_the_cpu(device: str, calls: Counter) -> None:
    """Twenty steps with a record window and an update: the same experts, and the same loss up to rounding.

    No decision of any step is in doubt, since one differently routed token would make the trainings diverge."""
    torch_losses, torch_layer = _train("cpu", on_torch=True)
    losses, layer = _train(device, on_torch=False)
    mask = layer.gates[0].experts_mask
    assert torch.equal(mask, torch_layer.gates[0].experts_mask)
    assert int(mask.sum()) != 3
    for (name, one), other in zip(layer.named_parameters(), torch_layer.parameters(), strict=True):
        assert relative_rms(one, other) < 1e-5, name  # the losses do not depend on the thresholds' gradient
    assert torch.allclose(losses, torch_losses, rtol=1e-5)  # 3e-7 between fp32 and float64


def _train(device: str, on_torch: bool) -> tuple[torch.Tensor, nn.Module]:
    global _counts
    from dynmoe_tutel import moe

    counts = _counts
    if on_torch:
        _counts = None
    try:
        layer = moe.moe_layer(
            gate_type={"type": "top_any", "max_expert_num": 6},
            experts={"num_experts_per_device": 3, "hidden_size_per_expert": 16, "activation_fn": F.gelu},
            model_dim=8,
            seeds=(3, 4),
        ).to(device)
        with torch.no_grad():  # at the orthogonal start, rounding decides the direction of diversity's gradient
            layer.gates[0].sim_matrix.copy_(torch.randn(8, 6, generator=torch.Generator().manual_seed(5)))
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(69)).to(device)
        target = torch.randn(32, 8, generator=torch.Generator().manual_seed(70)).to(device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        losses = []
        for step in range(20):
            if step == 5:
                layer.begin_record_routing()
            optimizer.zero_grad()
            assert_margin(layer, x, least=TRAINED_MARGIN)
            y = layer(x)
            loss = F.mse_loss(y, target) + 0.01 * y.l_aux
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().cpu())
            if step == 10:
                layer.adaptive_update_experts()
                layer.end_record_routing()
        return torch.stack(losses), layer.cpu()
    finally:
        _counts = counts


def test_more_slots_than_the_gates_tile_holds(device: str, calls: Counter) -> None:
    """E = 513: gate and index run as torch operations, the experts on Triton kernels."""
    check(make_case(12, 16, 8, 513, G=(0.2, 0.4)), device)


def test_an_inactive_slot_may_hold_nan(device: str, calls: Counter) -> None:
    case = make_case(aux_losses={"diversity": 1.0, "simplicity": 1.0})
    gate = case.layer.gates[0]
    gate.deactivate(1)
    results = []
    for _ in range(2):
        results.append(_with_losses(case, device))
        with torch.no_grad():
            gate.sim_matrix[:, 1] = float("nan")
    for name, gradient in results[0].items():
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, results[1][name]), name
