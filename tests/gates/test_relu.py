"""The ReLU gate (ReMoE) against its oracle, its coefficient by hand, and its target in training."""

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
    return Against(lambda z: router_oracles.relu(z, float(gate.coefficient), gate.target_k, max_k))


@pytest.mark.parametrize("aux", [None, {"l1": 2.0}, {"l1": 1.0, "balanced_l1": 0.5}])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("max_k", [None, 1, 2])
def test_output_and_every_gradient(max_k: int | None, training: bool, aux: Any) -> None:
    gate = {"type": "relu", "target_k": 0.75, "coefficient": 0.25, "max_k": max_k}
    layer = make_layer(gate, aux_losses=aux).double().train(training)
    check(layer, tokens(), against(layer, max_k))
    check(layer, tokens(), against(layer, max_k), torch.arange(24) % 3 > 0)


def test_the_coefficient_by_hand() -> None:
    """Times 1.2 above the target, by 1.2 below, as it is on it and without a token."""
    layer = make_layer({"type": "relu", "target_k": 2.0, "coefficient": 0.5}, E=4)
    gate, budgets = layer.gates[0], Budgets(layer)
    with torch.no_grad():
        gate.wg.weight.zero_()[:, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0])
    plus, minus, zero = torch.eye(D)[0], -torch.eye(D)[0], torch.zeros(D)
    for batch, expected in (
        ([plus, plus], 0.6),  # k 3, 3
        ([minus, minus], 0.5),  # k 1, 1
        ([plus, minus], 0.5),  # k 3, 1
        ([zero, zero], 0.5 / 1.2),  # k 0, 0
        ([], 0.5 / 1.2),
    ):
        layer(torch.stack(batch) if batch else torch.zeros(0, D))
        budgets.step()
        assert float(gate.coefficient) == pytest.approx(expected)


def test_the_coefficient_comes_back_from_its_ends() -> None:
    layer = make_layer({"type": "relu", "coefficient": 1e-12})
    budgets, x = Budgets(layer), tokens(8, dtype=torch.float32)
    with torch.no_grad():
        layer.gates[0].wg.weight.zero_()
    layer(x)
    budgets.step()
    assert float(layer.gates[0].coefficient) == pytest.approx(1e-12)
    with torch.no_grad():
        layer.gates[0].wg.weight.copy_(x[:1].expand(5, D))
    layer(x[:1])
    budgets.step()
    assert float(layer.gates[0].coefficient) == pytest.approx(1.2e-12)


def test_mean_k_is_the_target() -> None:
    """The coefficient starts near its end, and its rate fits a learning rate that ends a training in 400 steps."""
    layer = make_layer({"type": "relu", "target_k": 2.0, "coefficient": 0.05, "rate": 0.05}, E=8)
    means = train(layer, 400, lr=3e-3, count=128)
    assert means[0] > 3
    assert worst_window(means, 2.0, after=200) < 0.05


def test_a_token_without_an_expert_gives_0_in_eval_too() -> None:
    """Weights fall to 0 at the border: an expert of weight 1 beyond it would be a jump."""
    layer = make_layer({"type": "relu"})
    with torch.no_grad():
        layer.gates[0].wg.weight.abs_()
    x = -tokens(6, dtype=torch.float32).abs()
    for mode in (True, False):
        assert not layer.train(mode)(x).any()
        assert layer.route(x).unrouted.all()


def test_a_token_with_nan_shows_it() -> None:
    layer, x = make_layer({"type": "relu", "max_k": 2}), tokens(6, dtype=torch.float32)
    x[3, 1] = float("nan")
    y = layer(x)
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5]].isfinite().all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_k": 0}, "target_k.* = 0: .*above 0"),
        ({"target_k": 6}, "target_k.* = 6: .*at most 5"),
        ({"target_k": 3, "max_k": 2}, "target_k.* = 3: .*at most 2"),
        ({"coefficient": 0}, "coefficient.* = 0"),
        ({"rate": -1}, "rate.* = -1"),
        ({"scope": "all"}, "scope.* = 'all': allowed are 'layer' and 'model'"),
        ({"k": 2}, r"unknown key 'k' .*\(a relu gate has no k: every token chooses its own\)"),
    ],
)
def test_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer({"type": "relu", **keys})


def test_refuses_the_loss_of_another_gate() -> None:
    with pytest.raises(ValueError, match="'gshard' is no term of ReLUGate: allowed are balanced_l1, l1"):
        make_layer({"type": "relu"}, is_gshard_loss=True)
