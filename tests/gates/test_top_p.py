"""The top-p gate and its form with a target (DTop-p) against the oracle, the controller by hand, the target held."""

from __future__ import annotations

from typing import Any

import pytest
import router_oracles
import torch
from router_case import Against, D, check, make_layer, tokens, train, worst_window

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive import Budgets


def against(layer: MoELayer, max_k: int | None = None) -> Against:
    gate = layer.gates[0]
    scale = None if gate.target_k is None else gate.logit_scale.item()
    return Against(lambda z: router_oracles.top_p(z, float(gate.p), max_k), scale)


@pytest.mark.parametrize("aux", [None, {"entropy": 1.0}])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keys", [{"p": 0.4}, {"p": 0.9}, {"p": 0.9, "max_k": 2}, {"p": 0.7, "target_k": 2.0}])
def test_output_and_every_gradient(keys: dict[str, Any], training: bool, aux: Any) -> None:
    layer = make_layer({"type": "top_p", **keys}, aux_losses=aux).double().train(training)
    if "target_k" in keys:
        with torch.no_grad():
            layer.gates[0].logit_scale.fill_(1.3)
    check(layer, tokens(), against(layer, keys.get("max_k")))
    check(layer, tokens(), against(layer, keys.get("max_k")), torch.arange(24) % 3 > 0)


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_k_is_bounded(p: float) -> None:
    """At least one expert, at most all, or `max_k`; p = 1 takes all."""
    x = tokens(40, dtype=torch.float32)
    k_T = make_layer({"type": "top_p", "p": p}).route(x).k_per_token
    assert int(k_T.min()) >= 1
    if p == 1:
        assert (k_T == 5).all()
    assert int(make_layer({"type": "top_p", "p": p, "max_k": 2}).route(x).k_per_token.max()) <= 2


@pytest.mark.parametrize("training", [True, False])
def test_a_token_has_an_expert_where_the_controller_has_gone_to_zero(training: bool) -> None:
    """From k = 16 at a target of 1, a step takes p to 0."""
    layer = make_layer({"type": "top_p", "target_k": 1.0, "p": 1.0}, E=16)
    with torch.no_grad():
        layer.gates[0].logit_scale.zero_()  # all probabilities 1 / 16
    x = tokens(dtype=torch.float32)
    layer(x)
    Budgets(layer).step()
    assert float(layer.gates[0].p) == 0
    assert (layer.train(training).route(x).k_per_token == 1).all()


def test_the_controller_by_hand() -> None:
    """p by 0.05 times the change of the error and 0.05 times the error; as it is without a token; within 0 and 1."""
    layer = make_layer({"type": "top_p", "target_k": 2.0, "p": 0.95}, E=4)
    gate, budgets = layer.gates[0], Budgets(layer)
    with torch.no_grad():
        gate.wg.weight.zero_()  # all probabilities 1 / 4: k = ceil(4 p) = 4
    x = torch.ones(3, D)
    layer(x)
    budgets.step()
    assert float(gate.p) == pytest.approx(0.95 + 0.05 * -1 + 0.05 * -1)
    layer(torch.zeros(0, D))
    budgets.step()
    assert float(gate.p) == pytest.approx(0.85)
    layer(x)
    budgets.step()
    assert float(gate.p) == pytest.approx(0.85 + 0.05 * -1)
    for _ in range(60):
        layer(x)
        budgets.step()
    assert int(layer.route(x).k_per_token[0]) == 2
    assert 0 < float(gate.p) <= 1


def test_mean_k_is_the_target() -> None:
    layer = make_layer({"type": "top_p", "target_k": 2.0, "p": 0.9}, E=8)
    means = train(layer, 200, aux=0.01)
    assert means[0] > 3
    assert worst_window(means, 2.0) < 0.05


def test_without_a_target_p_is_a_setting() -> None:
    layer = make_layer({"type": "top_p", "p": 0.3})
    layer(tokens(dtype=torch.float32))
    Budgets(layer).step()
    assert layer.gates[0].p == 0.3
    assert set(dict(layer.gates[0].named_buffers())) == set()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"p": 0}, "p'.* = 0: .*above 0"),
        ({"p": 1.1}, "p'.* = 1.1: .*at most 1"),
        ({"target_k": 0.5}, "target_k.* = 0.5: .*at least 1"),
        ({"target_k": 3, "max_k": 2}, "target_k.* = 3: .*at most 2"),
        ({"max_k": 0}, "max_k.* = 0"),
        ({"scope": 1}, "scope.* = 1"),
    ],
)
def test_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer({"type": "top_p", **keys})
