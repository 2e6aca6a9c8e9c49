"""The quantile-balanced top-k gate against its oracle, its biases by hand, and the balance that they bring."""

from __future__ import annotations

from typing import Any

import pytest
import router_oracles
import torch
from router_case import Against, check, make_layer, tokens

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive import Budgets


def against(layer: MoELayer) -> Against:
    gate = layer.gates[0]
    return Against(lambda z: router_oracles.quantile_top_k(z, gate.k, gate.score_bias.tolist(), gate.normalize_gate))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalize_gate", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_output_and_every_gradient(k: int, normalize_gate: bool, training: bool) -> None:
    layer = make_layer({"type": "quantile_top_k", "k": k}, normalize_gate=normalize_gate).double().train(training)
    layer.gates[0].score_bias.copy_(torch.tensor([-0.2, 0.1, 0.0, 0.3, -0.2]))
    check(layer, tokens(), against(layer))
    check(layer, tokens(), against(layer), torch.arange(24) % 3 > 0)


def test_the_biases_by_hand() -> None:
    """b = the quantile k / E of cut-off - score, of mean 0; without a token it stays."""
    layer = make_layer({"type": "quantile_top_k", "k": 2}, E=6)
    gate, budgets, x = layer.gates[0], Budgets(layer), tokens(2000, dtype=torch.float32)
    gate.score_bias.copy_(torch.tensor([0.1, -0.1, 0.05, -0.05, 0.0, 0.0]))
    score_TE = torch.sigmoid(x @ gate.wg.weight.detach().t())
    cut_off_T1 = (score_TE + gate.score_bias).sort(dim=1, descending=True).values[:, 2:3]
    wanted_E = (cut_off_T1 - score_TE).quantile(2 / 6, dim=0)
    layer(x)
    budgets.step()
    assert torch.allclose(gate.score_bias, wanted_E - wanted_E.mean(), atol=0.003)
    before = gate.score_bias.clone()
    layer(x[:0])
    budgets.step()
    assert torch.equal(gate.score_bias, before)


@pytest.mark.parametrize(("k", "E"), [(1, 8), (2, 8), (4, 16)])
def test_the_load_is_even_after_few_steps(k: int, E: int) -> None:
    layer = make_layer({"type": "quantile_top_k", "k": k}, E=E)
    budgets, x = Budgets(layer), 0.7 + tokens(3000, dtype=torch.float32)
    even = 3000 * k / E
    assert float((layer.route(x).counts / even - 1).abs().max()) > 0.5
    for _ in range(10):
        layer(x)
        budgets.step()
    routing = layer.route(x)
    assert (routing.k_per_token == k).all()
    assert float((routing.counts / even - 1).abs().max()) < 0.1
    assert torch.equal(layer.eval().route(x).assigned, routing.assigned)


def test_with_all_experts_there_is_nothing_to_balance() -> None:
    layer = make_layer({"type": "quantile_top_k", "k": 5})
    layer(tokens(dtype=torch.float32))
    assert layer.gates[0].step_counts() is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"k": 6}, "k'.* = 6 is more than there are to choose from: give at most 5"),
        ({"k": True}, "k'.* = True"),
        ({"target_k": 2}, "unknown key 'target_k'"),
    ],
)
def test_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer({"type": "quantile_top_k", **keys})


def test_refuses_max_k_of_a_call() -> None:
    with pytest.raises(ValueError, match="max_k = 1 does not change the k = 1 of a QuantileTopKGate: set 'k'"):
        make_layer({"type": "quantile_top_k"})(tokens(dtype=torch.float32), max_k=1)
