"""The meter's counts equal the routing's, and parameter counts equal a count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import MoELayer, moe
from dynmoe_tutel.metrics import RoutingMeter, layer_scalars, moe_layers, parameter_counts


def model_with(gate: dict[str, object], experts: int) -> nn.Module:
    torch.manual_seed(0)
    ffn = {"type": "ffn", "num_experts_per_device": experts, "hidden_size_per_expert": 6}
    return nn.Sequential(nn.Linear(8, 8), moe.moe_layer(gate_type=gate, experts=ffn, model_dim=8))


@pytest.mark.parametrize("training", [True, False])
def test_meter_counts_what_the_gate_routed(training: bool) -> None:
    model = model_with({"type": "top_any", "max_expert_num": 6}, 3)
    model.train(training)
    layer = moe_layers(model)["1"]
    with torch.no_grad():
        layer.gates[0].gates.fill_(0.3)  # some tokens pass no threshold
    meter = RoutingMeter(model)
    assert meter.read()["1"]["k"] is None
    x = torch.randn(2, 50, 8)
    model(x)
    meter.reset()
    model(x)
    model(x[:1])
    read = meter.read()["1"]
    tokens = torch.cat([model[0](x), model[0](x[:1])])
    routing = layer.route(tokens.view(-1, 8))
    assert 0 < int(routing.unrouted.sum()) < 150
    assert read["experts"] == 3
    assert read["active"] == [0, 1, 2]
    assert read["unrouted"] == pytest.approx(routing.unrouted.float().mean().item())
    assert read["k"] == pytest.approx(routing.k_per_token.float().mean().item())
    assert read["load"] == pytest.approx((routing.counts / 150).tolist())
    assert sum(read["k_histogram"]) == pytest.approx(1)
    assert read["k_histogram"][0] == pytest.approx(read["unrouted"])
    share_of_one = ((routing.k_per_token == 1) & ~routing.unrouted).float().mean().item()
    assert read["k_histogram"][1] == pytest.approx(share_of_one)


def test_meter_continues_from_its_state() -> None:
    model = model_with({"type": "top", "k": 2}, 4)
    meter = RoutingMeter(model)
    model(torch.randn(10, 8))
    state = meter.state_dict()
    model(torch.randn(30, 8))
    both = meter.read()
    assert both["1"]["k"] == 2
    meter.load_state_dict(state)
    model(torch.randn(30, 8, generator=torch.Generator().manual_seed(1)))
    assert int(state["1"]["counts"].sum()) == 20, "the state is a copy"
    assert sum(meter.read()["1"]["load"]) == pytest.approx(2)


def test_meter_counts_neither_padding_nor_recomputes_nor_after_close() -> None:
    model = model_with({"type": "top_any", "max_expert_num": 6}, 3)
    layer, meter = moe_layers(model)["1"], RoutingMeter(model)
    x, real = torch.randn(20, 8), torch.arange(20) < 15
    layer(x, token_mask=real)
    read = meter.read()["1"]
    routing = layer.route(x[:15])
    assert read["load"] == pytest.approx((routing.counts / 15).tolist())
    assert read["k"] == pytest.approx(routing.k_per_token.float().mean().item())
    assert sum(read["k_histogram"]) == pytest.approx(1)
    before = meter.state_dict()
    checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert int((meter.state_dict()["1"]["k_histogram"] - before["1"]["k_histogram"]).sum()) == 20
    meter.close()
    layer(x)
    assert int((meter.state_dict()["1"]["k_histogram"] - before["1"]["k_histogram"]).sum()) == 20


def test_meter_of_training_alone() -> None:
    model = model_with({"type": "top_any", "max_expert_num": 6}, 3)
    meter = RoutingMeter(model, training_only=True)
    model.eval()(torch.randn(5, 8))
    assert meter.read()["1"]["k"] is None
    model.train()(torch.randn(7, 8))
    assert int(meter.state_dict()["1"]["k_histogram"].sum()) == 7


def test_scalars_of_a_reading() -> None:
    layer = {
        "experts": 2,
        "active": [0, 2],
        "k": 1.0,
        "k_histogram": [0.25, 0.5, 0.25, 0.0],
        "unrouted": 0.25,
        "load": [0.75, 0.0, 0.25],
    }
    empty = {"experts": 3, "active": [0, 1, 2], "k": None, "k_histogram": None, "unrouted": None, "load": None}
    assert dict(layer_scalars({"a": layer, "b": empty})) == {
        "a/experts": 2,
        "a/k": 1.0,
        "a/unrouted": 0.25,
        "a/load_max_over_mean": 1.5,
        "a/k_histogram/0": 0.25,
        "a/k_histogram/1": 0.5,
        "a/k_histogram/2": 0.25,
        "b/experts": 3,
    }


def test_parameters_counted_by_hand() -> None:
    """Linear 8*8+8, gate 4*8 weights, expert 2*8*6 weights and 6+8 biases."""
    model = model_with({"type": "top", "k": 2}, 4)
    expert = 2 * 8 * 6 + 6 + 8
    activated, total = parameter_counts(model, {"1": 2.0})
    assert total == 72 + 32 + 4 * expert
    assert activated == 72 + 32 + 2 * expert


def test_free_slots_count_as_no_parameters() -> None:
    """A top-any gate has a direction of 8 and a threshold for each active slot."""
    model = model_with({"type": "top_any", "max_expert_num": 16}, 3)
    expert = 2 * 8 * 6 + 6 + 8
    activated, total = parameter_counts(model, {"1": 1.5})
    assert total == 72 + 3 * (9 + expert)
    assert activated == 72 + 3 * 9 + 1.5 * expert
    assert parameter_counts(nn.Linear(8, 8), {}) == (72, 72)


def test_a_budget_is_read_and_is_worth_a_curve() -> None:
    gate = {"type": "top_any", "budget": {"target_k": 2.0, "max_k": 3}}
    layer = MoELayer(gate, 8, {"num_experts_per_device": 4, "hidden_size_per_expert": 4})
    meter = RoutingMeter(torch.nn.ModuleDict({"a": layer}))
    layer(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    layer.gates[0].budget_shift.fill_(0.25)
    scalars = dict(layer_scalars(meter.read()))
    assert (scalars["a/target_k"], scalars["a/shift"]) == (2.0, 0.25)
    meter.close()


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ({"type": "relu", "target_k": 1.5, "coefficient": 0.25}, {"target_k": 1.5, "coefficient": 0.25}),
        ({"type": "top_p", "target_k": 2.0, "p": 0.25}, {"target_k": 2.0, "p": 0.25, "error": 0.0}),
        ({"type": "top_p"}, {}),
        ({"type": "quantile_top_k", "k": 2}, {"score_bias_min": -0.5, "score_bias_max": 0.25}),
    ],
)
def test_what_a_router_holds_is_read_and_is_worth_a_curve(gate: dict[str, Any], expected: dict[str, float]) -> None:
    layer = MoELayer(gate, 8, {"num_experts_per_device": 3, "hidden_size_per_expert": 4})
    if gate["type"] == "quantile_top_k":
        layer.gates[0].score_bias.copy_(torch.tensor([0.25, 0.25, -0.5]))
    with RoutingMeter(torch.nn.ModuleDict({"a": layer})) as meter:
        layer(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
        scalars = dict(layer_scalars(meter.read()))
    of_all = {"experts", "k", "unrouted", "load_max_over_mean"}
    found = {name[2:]: value for name, value in scalars.items() if "histogram" not in name and name[2:] not in of_all}
    assert found == pytest.approx(expected)
