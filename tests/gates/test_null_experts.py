"""The gate with null experts (AdaMoE) against its oracle, its bias by counting, its bound and its target."""

from __future__ import annotations

from typing import Any

import pytest
import router_oracles
import torch
from router_case import Against, check, make_layer, tokens, train, worst_window

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive import Budgets


def against(layer: MoELayer, E: int = 5) -> Against:
    gate = layer.gates[0]
    bias = 0.0 if gate.target_k is None else float(gate.null_bias)
    return Against(lambda z: router_oracles.null_experts(z, E, gate.k, bias, gate.normalize_gate))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalize_gate", [True, False])
@pytest.mark.parametrize("keys", [{}, {"k": 1}, {"k": 4, "null_experts": 2}, {"k": 3, "target_k": 1.0}])
def test_output_and_every_gradient(keys: dict[str, Any], normalize_gate: bool, training: bool) -> None:
    layer = make_layer({"type": "null_experts", **keys}, normalize_gate=normalize_gate).double().train(training)
    if "target_k" in keys:
        layer.gates[0].null_bias.fill_(0.7)
    check(layer, tokens(), against(layer))
    check(layer, tokens(), against(layer), torch.arange(24) % 3 > 0)


@pytest.mark.parametrize("bias", [-50.0, 0.0, 50.0])
def test_null_experts_take_no_rows(bias: float) -> None:
    """k is bounded by the k places: all of experts far below null ones, none far above; rows are of experts alone."""
    layer = make_layer({"type": "null_experts", "k": 3, "target_k": 1.0})
    layer.gates[0].null_bias.fill_(bias)
    routing = layer.route(tokens(40, dtype=torch.float32))
    assert routing.num_experts == 5
    assert int(routing.counts.sum()) == int(routing.k_per_token.sum())
    k_T = routing.k_per_token
    assert (k_T == 3).all() if bias < 0 else int(k_T.max()) <= 3
    if bias > 0:
        assert not k_T.any()
        assert not layer.eval()(tokens(4, dtype=torch.float32)).any()


@pytest.mark.parametrize(("k", "nulls", "target"), [(3, 5, 1.0), (3, 2, 2.0), (2, 8, 1.5)])
def test_the_bias_meets_the_target(k: int, nulls: int, target: float) -> None:
    """On one batch, repeated: mean k comes to the target, from the margins alone."""
    layer = make_layer({"type": "null_experts", "k": k, "null_experts": nulls, "target_k": target})
    budgets, x = Budgets(layer), tokens(600, dtype=torch.float32)
    for _ in range(15):
        layer(x)
        budgets.step()
    assert float(layer.route(x).k_per_token.float().mean()) == pytest.approx(target, rel=0.02)
    before = layer.gates[0].null_bias.clone()
    layer(x[:0])
    budgets.step()
    assert torch.equal(layer.gates[0].null_bias, before)


def test_mean_k_is_the_target() -> None:
    layer = make_layer({"type": "null_experts", "k": 4, "target_k": 1.5}, E=8)
    assert worst_window(train(layer, 200, aux=0.01), 1.5) < 0.05


def test_without_a_target_there_is_no_state() -> None:
    layer = make_layer({"type": "null_experts"})
    assert set(layer.gates[0].state_dict()) == {"wg.weight", "null.weight"}
    assert layer.gates[0].step_counts() is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"k": 0}, "k'.* = 0: give an integer of at least 1"),
        ({"k": 11}, "k'.* = 11 is more than there are to choose from: give at most 10"),
        ({"null_experts": 0}, "null_experts.* = 0"),
        ({"k": 2, "target_k": 2.5}, "target_k.* = 2.5: .*at most 2"),
        ({"max_k": 2}, "unknown key 'max_k'"),
    ],
)
def test_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer({"type": "null_experts", **keys})


def test_refuses_max_k_of_a_call() -> None:
    with pytest.raises(ValueError, match="max_k = 1 does not change the k = 2 of a NullExpertsGate: set 'k'"):
        make_layer({"type": "null_experts"})(tokens(dtype=torch.float32), max_k=1)
