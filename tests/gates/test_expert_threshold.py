"""The expert threshold gate against its oracle, its thresholds by hand, causality, target and balance."""

from __future__ import annotations

from typing import Any

import pytest
import router_oracles
import torch
from router_case import Against, check, make_layer, tokens, train, worst_window

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive import Budgets


def against(layer: MoELayer, max_k: int | None = None) -> Against:
    gate = layer.gates[0]
    return Against(lambda z: router_oracles.expert_threshold(z, gate.thresholds.tolist(), layer.training, max_k))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("max_k", [None, 2])
@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.99])
def test_output_and_every_gradient(threshold: float, max_k: int | None, training: bool) -> None:
    layer = make_layer({"type": "expert_threshold", "max_k": max_k}).double().train(training)
    layer.gates[0].thresholds.copy_(threshold + 0.01 * torch.arange(5) / 5)
    check(layer, tokens(), against(layer, max_k))
    check(layer, tokens(), against(layer, max_k), torch.arange(24) % 3 > 0)


def test_the_thresholds_by_hand() -> None:
    """A share target_k / E of the scores is above it after one step; it moves by 1 / n, at least by 1 - decay."""
    layer = make_layer({"type": "expert_threshold", "target_k": 1.0, "decay": 0.6}, E=4)
    gate, budgets, x = layer.gates[0], Budgets(layer), tokens(4000, dtype=torch.float32)
    expected = None
    for n, way in ((1, 1.0), (2, 0.5), (3, 0.4), (4, 0.4)):
        batch = x[1000 * (n - 1) : 1000 * n]
        layer(batch)
        budgets.step()
        wanted_E = torch.sigmoid(batch @ gate.wg.weight.detach().t()).quantile(0.75, dim=0)
        expected = wanted_E if expected is None else expected + way * (wanted_E - expected)
        assert torch.allclose(gate.thresholds, expected, atol=0.002)
    before = gate.thresholds.clone()
    layer(x[:0])
    budgets.step()
    assert torch.equal(gate.thresholds, before)
    assert float(gate.steps) == 4


def test_a_token_does_not_depend_on_its_batch() -> None:
    layer, x = make_layer({"type": "expert_threshold"}), tokens(30, dtype=torch.float32)
    layer.gates[0].thresholds.fill_(0.7)
    for mode in (True, False):
        whole = layer.train(mode).route(x).assigned
        for t in range(30):
            assert torch.equal(layer.route(x[t : t + 1]).assigned[0], whole[t])
        other = torch.cat([x[:10], 5 * tokens(50, seed=3, dtype=torch.float32)])
        assert torch.equal(layer.route(other).assigned[:10], whole[:10])


def test_mean_k_is_the_target_and_the_load_is_even() -> None:
    layer = make_layer({"type": "expert_threshold", "target_k": 2.0, "decay": 0.9}, E=8)
    means = train(layer, 200)
    assert means[0] > 3
    assert worst_window(means, 2.0) < 0.05
    counts: list[torch.Tensor] = []
    hook = layer.gates[0].register_forward_hook(lambda *args: counts.append(args[2].counts))
    train(layer, 20)
    hook.remove()
    load_E = torch.stack(counts).sum(dim=0).double()
    assert float((load_E / load_E.mean() - 1).abs().max()) < 0.15


def test_in_eval_a_token_below_all_thresholds_takes_its_best_expert() -> None:
    layer, x = make_layer({"type": "expert_threshold"}).eval(), tokens(20, dtype=torch.float32)
    layer.gates[0].thresholds.fill_(1.0)
    routing = layer.route(x)
    assert routing.unrouted.all()
    assert torch.equal(routing.assigned.int().argmax(dim=1), routing.scores.argmax(dim=1))
    assert (routing.k_per_token == 1).all()
    assert not layer.train()(x).any()


def test_a_token_with_nan_shows_it() -> None:
    layer, x = make_layer({"type": "expert_threshold"}), tokens(6, dtype=torch.float32)
    x[3, 1] = float("nan")
    layer.gates[0].thresholds.fill_(0.9)
    y = layer(x)
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5]].isfinite().all()
    Budgets(layer).step()
    assert layer.gates[0].thresholds.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_k": 0}, "target_k.* = 0: .*above 0"),
        ({"target_k": 5.5}, "target_k.* = 5.5: .*at most 5"),
        ({"decay": 1.5}, "decay.* = 1.5: .*at most 1"),
        ({"threshold": 1}, "unknown key 'threshold'"),
    ],
)
def test_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer({"type": "expert_threshold", **keys})
