"""A gate's budget: shift and cap against the oracle, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from helpers import FP32, FP64, Case, assert_gradients, gradients, make_case, relative_rms

from dynmoe_tutel import MoELayer, moe
from dynmoe_tutel.capacity import bounded_pairs

BUDGETS = {
    "shift up": {"shift": 0.15},
    "far up": {"shift": 0.9},
    "shift down": {"shift": -0.3},
    "cap": {"max_k": 2},
    "cap of one": {"max_k": 1},
    "shift up, cap": {"shift": 0.05, "max_k": 2},
    "shift down, cap": {"shift": -0.4, "max_k": 3},
}
EXPERTS = {"num_experts_per_device": 4, "hidden_size_per_expert": 8}


def check(case: Case, training: bool, combine_gradient: str, tolerance: float) -> None:
    x = case.x.clone().requires_grad_()
    y = case.layer.train(training)(x)
    assert relative_rms(y, case.expected_output(training)) < tolerance
    y.backward(case.dy)
    expected = case.expected_gradients(training, combine_gradient)
    assert_gradients(gradients(case.layer, x), expected, case.gate, tolerance)


@pytest.mark.parametrize("temperature", [None, 1.3])
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BUDGETS)
def test_output_and_every_gradient(name: str, training: bool, combine_gradient: str, temperature: float | None) -> None:
    case = make_case(**BUDGETS[name], temperature=temperature, combine_gradient=combine_gradient)
    check(case, training, combine_gradient, FP32)


@pytest.mark.parametrize("name", BUDGETS)
def test_float64_is_tight(name: str) -> None:
    case = make_case(T=40, E=7, active=[0, 2, 3, 5, 6], **BUDGETS[name], temperature=1.3, dtype=torch.float64)
    check(case, True, "mean", FP64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BUDGETS)
def test_routing(name: str, training: bool) -> None:
    """By its numbers: a shift up never unroutes, a cap is never passed, an unrouted token passed no threshold."""
    case = make_case(T=60, E=9, G=(-0.1, 0.2), **BUDGETS[name])
    routing = case.layer.train(training).route(case.x)
    a_TE = oracle.assignments(case.x.double(), case.gate, training)
    assert torch.equal(routing.assigned, a_TE)
    passes_own_T = (oracle.cosines(case.x.double(), case.gate) > case.gate.G_E).any(dim=1)
    k_T = a_TE.sum(dim=1)
    assert bool((k_T[passes_own_T] >= 1).all())
    if case.gate.max_k is not None:
        assert int(k_T.max()) == case.gate.max_k
    if case.gate.shift >= 0:
        assert torch.equal(routing.unrouted, ~passes_own_T)
        assert 0 < int(routing.unrouted.sum()) < 60
    else:
        assert int(routing.unrouted.sum()) < int((~passes_own_T).sum())
    assert relative_rms(routing.thresholds, oracle.thresholds(case.gate)) < FP32


def test_far_up_leaves_one_expert_to_each_token_that_passes_a_threshold() -> None:
    case = make_case(T=60, shift=1.9)
    plain = make_case(T=60)
    k_T = torch.tensor(plain.k())
    assert int(k_T.max()) > 2
    assert torch.equal(case.layer.route(case.x).k_per_token, k_T.clamp(max=1).int())


@pytest.mark.parametrize("training", [True, False])
def test_no_shift_and_no_cap_are_bitwise_the_layer_without_a_budget(training: bool) -> None:
    results = []
    for budget in ({}, {"shift": 0.0}, {"max_k": 5}, {"shift": 0.0, "max_k": 5}):
        case = make_case(T=64, temperature=1.3, aux_losses={"diversity": 1.0, "efficiency": 1.0}, **budget)
        x = case.x.clone().requires_grad_()
        y = case.layer.train(training)(x)
        ((y * case.dy).sum() + y.l_aux).backward()
        results.append({"y": y, "l_aux": y.l_aux, **gradients(case.layer, x)})
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_equal_margins_stay_by_slot() -> None:
    layer = MoELayer({"type": "top_any", "budget": {"max_k": 2}}, 4, EXPERTS)
    with torch.no_grad():
        layer.gates[0].sim_matrix.copy_(torch.ones(4, 4))
    routing = layer.route(torch.ones(3, 4))
    assert routing.assigned.tolist() == [[True, True, False, False]] * 3


def test_a_layer_without_a_budget_keeps_its_state_dict() -> None:
    plain = MoELayer({"type": "top_any", "max_expert_num": 8}, 4, EXPERTS)
    capped = MoELayer({"type": "top_any", "max_expert_num": 8, "budget": {"max_k": 2}}, 4, EXPERTS)
    held = MoELayer({"type": "top_any", "max_expert_num": 8, "budget": {"target_k": 2}}, 4, EXPERTS)
    assert plain.state_dict().keys() == capped.state_dict().keys()
    assert held.state_dict().keys() - plain.state_dict().keys() == {"gates.0.budget_shift"}


def test_the_shift_stays_fp32() -> None:
    layer = make_case(shift=0.123456789).layer.bfloat16()
    assert layer.gates[0].budget_shift.tolist() == torch.tensor([0.123456789]).tolist()


@pytest.mark.parametrize("max_k", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_call_may_bound_k(max_k: int, training: bool) -> None:
    """`layer(x, max_k=)` gives what a layer with this cap gives; the smaller of both holds."""
    capped, plain = make_case(T=40, max_k=max_k), make_case(T=40)
    expected = capped.layer.train(training)(capped.x)
    assert torch.equal(plain.layer.train(training)(plain.x, max_k=max_k), expected)
    assert torch.equal(capped.layer(capped.x, max_k=5), expected)
    assert int(plain.layer.train().route(plain.x, max_k=max_k).k_per_token.max()) == max_k


def test_a_cap_makes_memory_static() -> None:
    """Rows: max_k a token, whatever is routed, and nothing is dropped; a capacity that the user gives stays."""
    layer = MoELayer({"type": "top_any", "budget": {"max_k": 2}}, 4, EXPERTS)
    x = torch.randn(10, 4)
    assert layer.route(x).token_of_row.shape == (20,)
    assert layer.route(x, max_k=1).token_of_row.shape == (10,)
    layer(x)
    assert int(layer.dropped_assignments) == 0
    exact = MoELayer({"type": "top_any", "budget": {"max_k": 2}}, 4, EXPERTS, capacity="exact")
    assert exact.route(x).token_of_row.shape == (int(exact.route(x).num_assignments),)
    layer.capacity = 0.5
    assert layer.route(x).token_of_row.shape == layer.route(x, max_k=1).token_of_row.shape == (5,)


def test_a_cap_composes_with_a_bounded_capacity() -> None:
    case = make_case(T=40, max_k=2, G=-1.5, capacity=1.0)
    case.layer(case.x)
    assert int(case.layer.dropped_assignments) == 40


@pytest.mark.parametrize(("capacity", "ranks"), [(1.3, None), (0.6, None), (1.2, 2), (0.5, 2)])
@pytest.mark.parametrize("shift", [0.3, 0.0, -0.1])
def test_a_bounded_capacity_leaves_the_best_experts_last(shift: float, capacity: float, ranks: int | None) -> None:
    """By a sort of all assignments: where thresholds are raised, no token loses its best expert, which may be below the
    raised threshold, while another has a second; else the smallest margins go, as without a budget."""
    layer, x = (case := make_case(T=60, E=6, G=-0.2, shift=shift)).layer, case.x
    routing = layer.route(x)
    margin_TE = (routing.scores - routing.thresholds).detach()
    best_T1 = margin_TE.masked_fill(~routing.assigned, -1).amax(dim=1, keepdim=True)
    assert (best_T1 < 0).any() == (shift > 0), "some tokens have what is below the raised threshold"
    rank_TE = margin_TE + (2.0 * (margin_TE == best_T1) if shift > 0 else 0)
    if ranks is None:
        layer.capacity, blocks, room = capacity, [slice(0, 6)], math.ceil(60 * capacity)
        kept = layer.route(x)
    else:
        blocks, room = [slice(0, 3), slice(3, 6)], math.ceil(60 * capacity / ranks)
        kept = bounded_pairs(routing, ranks, capacity)
    for block in blocks:
        of_block_TE, kept_TE = routing.assigned[:, block], kept.assigned[:, block]
        assert int(kept_TE.sum()) == room < int(of_block_TE.sum())
        assert rank_TE[:, block][kept_TE].min() > rank_TE[:, block][of_block_TE & ~kept_TE].max()
    assert int(kept.dropped) == int(routing.num_assignments) - int(kept.num_assignments)
    if shift > 0 and ranks is None and capacity > 1:
        assert bool((kept.k_per_token > 0).eq(routing.k_per_token > 0).all())


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"target_k": 0.5}, "target_k.* = 0.5: give a number from 1 .* to 4"),
        ({"target_k": 4.5}, "target_k.* = 4.5: give a number from 1 .* to 4"),
        ({"target_k": 3, "max_k": 2}, "target_k.* = 3: give a number from 1 .* to 2"),
        ({"target_k": float("nan")}, "target_k.* = nan"),
        ({"target_k": float("inf")}, "target_k.* = inf"),
        ({"target_k": True}, "target_k.* = True"),
        ({"target_k": "2"}, "target_k.* = '2'"),
        ({"max_k": 0}, "max_k.* = 0: give an integer of at least 1"),
        ({"max_k": 1.5}, "max_k.* = 1.5"),
        ({"max_k": 2, "scope": "all"}, "scope.* = 'all': allowed are 'layer' and 'model'"),
        ({"k": 2}, "unknown key 'k'.*max_k"),
        ({}, "neither 'target_k' nor 'max_k'"),
        (2, "budget.* = 2: give a dict"),
    ],
)
def test_refuses(budget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe.moe_layer({"type": "top_any", "max_expert_num": 8, "budget": budget}, 4, EXPERTS)


@pytest.mark.parametrize("kind", ["top_any", "relu", "top_p", "expert_threshold"])
def test_a_cap_of_any_size_beyond_the_slots_changes_nothing(kind: str) -> None:
    layer = MoELayer({"type": kind}, 8, {"num_experts_per_device": 4, "hidden_size_per_expert": 8}, seeds=(1, 1))
    x_TD = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x_TD, max_k=2**64), layer(x_TD))


@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_a_call_refuses_a_wrong_max_k(value: Any) -> None:
    layer = moe.moe_layer({"type": "top_any"}, 4, EXPERTS)
    with pytest.raises(ValueError, match=r"max_k = .*: give an integer of at least 1"):
        layer(torch.randn(2, 4), max_k=value)


def test_a_fixed_k_gate_has_no_budget() -> None:
    with pytest.raises(ValueError, match="unknown key 'budget'"):
        moe.moe_layer({"type": "top", "k": 2, "budget": {"max_k": 1}}, 4, EXPERTS)
    with pytest.raises(ValueError, match=r"max_k = 1 is for top-any gates.*top_k"):
        moe.moe_layer({"type": "top", "k": 2}, 4, EXPERTS)(torch.randn(2, 4), max_k=1)
