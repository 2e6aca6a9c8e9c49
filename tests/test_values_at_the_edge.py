"""Tokens and routers that are not finite, and tokens of any length: what a layer computes, learns and records."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from dynmoe_tutel import moe

D, E, T, BROKEN = 8, 5, 24, 3
GATES: dict[str, dict[str, Any]] = {
    "top_any": {"type": "top_any", "max_expert_num": E, "init_t": 0.7},
    "gated_multi_gate": {"type": "gated_multi_gate", "max_expert_num": E},
    "top": {"type": "top", "k": 2},
    "cosine_top": {"type": "cosine_top", "k": 2, "proj_dim": 7},
}
TOP_ANY = ("top_any", "gated_multi_gate")
EXPERTS: dict[str, dict[str, Any]] = {
    "ffn": {"hidden_size_per_expert": 6},
    "ffn in stages": {"hidden_size_per_expert": 6, "activation_fn": lambda h: h * torch.sigmoid(h)},
    "llama_ffn": {"type": "llama_ffn", "hidden_size_per_expert": 6},
    "custom": {"type": "custom", "module": torch.nn.Linear, "in_features": D, "out_features": D},
}


def layer_with(gate: str, experts: str = "ffn", **given: Any) -> Any:
    """Slot 3 of a top-any gate is inactive, and some tokens are unrouted."""
    options = {"num_experts_per_device": E, **EXPERTS[experts]}
    if experts == "custom":
        options.pop("num_experts_per_device")
        options = {**options, "count_per_node": E}
    layer = moe.moe_layer(GATES[gate], D, options, seeds=(1, 2), **given)
    if gate in TOP_ANY:
        with torch.no_grad():
            layer.gates[0].gates.copy_(torch.tensor([0.3, 0.4, 0.3, 0.1, 0.25]))
            layer.gates[0].experts_mask[3] = 0
    return layer


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(0)).to(dtype)


def router_gradients(layer: Any) -> list[Tensor]:
    return [p.grad for p in layer.gates.parameters() if p.grad is not None]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("capacity", ["exact", 2.0, "full"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("gate", GATES)
def test_the_output_of_a_broken_token_shows_it(
    gate: str, experts: str, training: bool, capacity: Any, value: float
) -> None:
    """Regression: a top-any layer in training gave it output 0, and NaN to the gradient of every routing vector."""
    layer = layer_with(gate, experts, capacity=capacity).train(training)
    x, others = tokens(), torch.arange(T) != BROKEN
    clean = layer(x)
    x[BROKEN, 1] = value
    x.requires_grad_()
    y = layer(x)
    assert not y[BROKEN].isfinite().all()
    assert torch.allclose(y[others], clean[others], atol=1e-6)
    y[others].square().sum().backward()
    assert x.grad is not None
    assert x.grad[others].isfinite().all()
    if gate in TOP_ANY:
        assert all(gradient.isfinite().all() for gradient in router_gradients(layer))
        assert layer.l_aux.isfinite()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("break_vector", [False, True])
def test_the_oracle_decides_the_same(break_vector: bool, training: bool) -> None:
    layer, x = layer_with("top_any").train(training), tokens()
    x[BROKEN, 1], x[5, 2], x[7] = float("nan"), float("inf"), 0
    gate = layer.gates[0]
    if break_vector:
        with torch.no_grad():
            gate.sim_matrix[2, 4] = float("nan")
    view = oracle.Gate(gate.sim_matrix.detach().double(), gate.gates.detach().double(), [0, 1, 2, 4])
    assert torch.equal(layer.route(x).assigned, oracle.assignments(x.double(), view, training))


@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
def test_the_loss_and_the_weights_of_its_expert_show_it_as_a_dense_ffn_does(combine_gradient: str) -> None:
    layer, x = layer_with("top_any", combine_gradient=combine_gradient), tokens()
    x[BROKEN] = float("nan")
    loss = layer(x).square().mean()
    loss.backward()
    assert loss.isnan()
    finite_E = layer.experts.batched_fc1_w.grad.isfinite().flatten(1).all(dim=1)
    assert finite_E.tolist() == [False, True, True, True, True]  # the first active expert takes it
    assert all(gradient.isfinite().all() for gradient in router_gradients(layer))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_growth_goes_on(value: float) -> None:
    """A broken token is no unrouted one: sums, count and sample are those without it."""
    layers = [layer_with("top_any"), layer_with("top_any")]
    for layer, broken in zip(layers, (False, True), strict=True):
        layer.begin_record_routing()
        layer.record.keep_tokens = 16
        x = tokens()
        layer(torch.cat([x, torch.full((2, D), value)]) if broken else x)
    clean, dirty = (layer.record for layer in layers)
    assert int(clean.unrouted_tokens) > 0
    for name in ("unrouted_tokens", "unrouted_sum", "unrouted_norm", "unrouted_sample"):
        assert torch.equal(getattr(clean, name), getattr(dirty, name)), name
    assert int(dirty.tokens) == T + 2
    assert int(dirty.k_histogram.sum()) == T + 2
    for layer in layers:
        layer.adaptive_update_experts()
    assert layers[1].gates[0].active().all()
    assert torch.equal(layers[0].gates[0].sim_matrix, layers[1].gates[0].sim_matrix)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-50, 2.0**66, 2.0**100, 2.0**120])
def test_tokens_of_any_length_reach_the_same_experts_and_grow_the_same(size: float) -> None:
    layers = [layer_with("top_any"), layer_with("top_any")]
    for layer, factor in zip(layers, (1.0, size), strict=True):
        layer.begin_record_routing()
        layer(tokens() * factor)
    counts = [layer.record.counts for layer in layers]
    assert torch.equal(*counts)
    assert layers[1].record.unrouted_sum.isfinite().all()
    for layer in layers:
        layer.adaptive_update_experts()
    one, other = (layer.gates[0].sim_matrix for layer in layers)
    assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("what", ["vector", "threshold"])
def test_what_an_inactive_slot_holds_does_nothing(what: str) -> None:
    """Regression: times 0, the NaN reached the losses of the assignment."""
    aux = dict.fromkeys(("diversity", "simplicity", "load_balance", "efficiency", "gshard"), 1.0)
    results = []
    for value in (None, float("nan"), float("inf")):
        layer, x = layer_with("top_any", aux_losses=aux), tokens().requires_grad_()
        with torch.no_grad():
            held = layer.gates[0].sim_matrix[:, 3] if what == "vector" else layer.gates[0].gates[3:4]
            held.fill_(held.mean() if value is None else value)
        y = layer(x)
        (y.square().sum() + layer.l_aux).backward()
        results.append((y, layer.l_aux, x.grad, *router_gradients(layer)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("what", ["vector", "threshold"])
def test_an_active_router_that_is_nan_shows(what: str) -> None:
    layer = layer_with("top_any")
    with torch.no_grad():
        (layer.gates[0].sim_matrix[1, 2:3] if what == "vector" else layer.gates[0].gates[2:3]).fill_(float("nan"))
    layer(tokens()).square().sum().backward()
    gradient = layer.gates[0].sim_matrix.grad[:, 2] if what == "vector" else layer.gates[0].gates.grad[2]
    assert gradient.isnan().all()
    assert layer.l_aux.isnan() if what == "vector" else layer.l_aux.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", GATES)
def test_under_autocast(gate: str, dtype: torch.dtype) -> None:
    layer, x = layer_with(gate), tokens()
    x[BROKEN, 2] = float("nan")
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert (~y.isfinite().all(dim=1)).tolist() == [t == BROKEN for t in range(T)]


def test_padding_may_hold_anything() -> None:
    layer, mask, results = layer_with("top_any"), torch.arange(T) != BROKEN, []
    for value in (0.0, float("nan")):
        x = tokens()
        x[BROKEN] = value
        layer.zero_grad()
        y = layer(x, token_mask=mask)
        y.sum().backward()
        results.append((y, *(p.grad for p in layer.parameters() if p.grad is not None)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [-100, -60, 66, 100])
def test_the_cosine_router_has_no_scale(power: int, dtype: torch.dtype) -> None:
    """Routing vectors and the projection (without its bias) of any length: the picks of length 1, bit by bit."""
    results = []
    for factor in (1.0, 2.0**power):
        layer, x = layer_with("cosine_top").to(dtype), tokens(dtype)
        gate = layer.gates[0]
        with torch.no_grad():
            gate.cosine_projector.bias.zero_()
            gate.sim_matrix.mul_(factor)
        routing = layer.route(x * factor)
        results.append((routing.scores, routing.bits))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_zero_token_of_the_cosine_router_has_finite_gradients(dtype: torch.dtype) -> None:
    layer, x = layer_with("cosine_top").to(dtype), tokens(dtype)
    with torch.no_grad():
        layer.gates[0].cosine_projector.bias.zero_()
        x[2] = 0
    y = layer(x)
    (y.square().sum() + y.l_aux).backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.grad is not None)
