"""Tutel's own gates in the registered layer: it has upstream's additions, and without their use it is Tutel's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe_tutel import ExpertController, MoELayer
from dynmoe_tutel import moe as native_moe

tutel = pytest.importorskip("tutel", reason="stock Tutel is not installed: its README says how")
pytest.importorskip("tutel.moe")

D, H, E = 16, 20, 4
GATES: dict[str, dict[str, Any]] = {
    "top-1": {"type": "top", "k": 1, "fp32_gate": True},
    "top-2": {"type": "top", "k": 2, "fp32_gate": True},
    "cosine": {"type": "cosine_top", "k": 2, "proj_dim": 8, "fp32_gate": True},
}
UPSTREAM = {"batch_prioritized_routing": True, "one_score_gate": False, "update_momentum": 0.0}


def experts(kind: str = "ffn") -> dict[str, Any]:
    activation = F.silu if kind == "llama_ffn" else F.gelu
    return {"type": kind, "count_per_node": E, "hidden_size_per_expert": H, "activation_fn": activation}


def made(cls: Any, gate: str | dict[str, Any] = "top-2", kind: str = "ffn", **options: Any) -> Any:
    config = GATES[gate] if isinstance(gate, str) else gate
    return cls(dict(config), D, experts(kind), **options)


def registered_layer(gate: str | dict[str, Any] = "top-2", **options: Any) -> Any:
    return made(tutel.moe.moe_layer, gate, **options)


def tokens(seed: int = 0, T: int = 48) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gate", GATES)
def test_a_layer_that_asks_for_nothing_is_tutels(gate: str, request: pytest.FixtureRequest) -> None:
    """Outputs, gradients, state dict and random state, with gate noise and drops."""

    def run() -> list[Any]:
        torch.manual_seed(3)
        layer = registered_layer({**GATES[gate], "gate_noise": 1.0, "capacity_factor": 0.8})
        x = tokens().requires_grad_()
        y = layer(x)
        (y.square().sum() + y.l_aux).backward()
        gradients = [p.grad for p in layer.parameters()]
        state = layer.state_dict()
        return [list(state), [y, y.l_aux, x.grad, *gradients, *state.values(), torch.get_rng_state()]]

    names, before = run()
    request.getfixturevalue("registered")
    found_names, found = run()
    assert found_names == names
    assert "_max_num_global_experts" not in names
    assert all(torch.equal(a, b) for a, b in zip(before, found, strict=True))


def test_recording_changes_no_result(registered: None) -> None:
    layer = registered_layer({**GATES["top-2"], "gate_noise": 1.0, "capacity_factor": 0.8})
    results = []
    for record in (False, True):
        torch.manual_seed(1)
        if record:
            layer.begin_record_routing()
        y = layer(tokens())
        results.append([y, y.l_aux, torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, -1.2])
@pytest.mark.parametrize("gate", GATES)
def test_records_are_the_native_layers(gate: str, factor: float, registered: None) -> None:
    """Without drops and with them, over several forwards."""
    config = {**GATES[gate], "capacity_factor": factor}
    layer, native = registered_layer(config), made(native_moe.moe_layer, config)
    native.load_state_dict(layer.state_dict())
    assert layer.get_routing_records().tolist() == [0] * E
    for each in (layer, native):
        assert each.get_sample_records() is None
        each.begin_record_routing()
        for seed in (0, 1):
            each(tokens(seed))
        each.eval()
        each(tokens(2))  # not recorded
        each.train()
        each.end_record_routing()
        each(tokens(3))
    for name in ("counts", "k_histogram", "tokens", "unrouted_tokens", "unrouted_sum"):
        assert torch.equal(getattr(layer.record, name), getattr(native.record, name)), name
    k = config["k"]
    if factor == 0:
        assert int(layer.get_routing_records().sum()) == 96 * k
        assert layer.record.mean_k == k
        x, counts = torch.cat([tokens(0), tokens(1)]), torch.zeros(E, dtype=torch.int64)
        logits = layer.gates[0](x)
        for expert in logits.topk(k, dim=1).indices.flatten().tolist():
            counts[expert] += 1
        assert torch.equal(layer.get_routing_records(), counts)
    elif factor == 0.6:
        assert int(layer.get_routing_records().sum()) < 96 * k
    assert layer.get_sample_records() is None


def test_the_window(registered: None) -> None:
    layer = tutel.moe.moe_layer([{**GATES[name], "capacity_factor": 0.0} for name in ("top-1", "cosine")], D, experts())
    x = tokens().requires_grad_()
    assert not layer.record_routing
    layer.begin_record_routing(record_eval=True)
    layer.eval()
    layer(x, gate_index=1)
    assert [int(record.counts.sum()) for record in layer.records] == [0, 96]
    layer.train()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert int(layer.get_routing_records().sum()) == 48  # the recompute is not counted
    layer.reset_record_routing()
    assert layer.record_routing
    assert [int(record.tokens) for record in layer.records] == [0, 0]
    layer(x)
    layer.l_aux = None  # as Tutel leaves it, it holds a graph
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.get_routing_records(), layer.get_routing_records())
    assert layer.to(torch.float64).get_routing_records().device == layer._num_global_experts.device


def test_a_layer_that_outlives_the_registration_says_why_it_cannot_record(registered: None) -> None:
    from dynmoe_tutel import tutel_backend

    layer = registered_layer()
    layer.begin_record_routing()
    tutel_backend.unregister()
    with pytest.raises(RuntimeError, match=r"tutel_backend.register\(\)"):
        layer(tokens())
    layer.end_record_routing()
    layer(tokens())


@pytest.mark.parametrize("gate", GATES)
def test_upstreams_names(gate: str, registered: None) -> None:
    """What its scripts read and call; what the layer refuses has the message of this package's layer."""
    layer = registered_layer(gate, **UPSTREAM, normalize_one_score_gate=False, value_norm_weighted=True)
    native = made(native_moe.moe_layer, gate)
    for name in ("max_num_local_experts", "max_num_global_experts", "num_local_experts", "num_global_experts"):
        assert getattr(layer, name) == getattr(native, name) == E
    assert (layer.one_score_gate, layer.update_momentum, layer.value_norm_weighted) == (False, 0.0, True)
    for method in ("adaptive_update_experts", "update_one_score_gate"):
        said = []
        for each in (layer, native):
            with pytest.raises(ValueError, match=r"fixed|one_score_gate = True") as error:
                getattr(each, method)()
            said.append(str(error.value).split("whose")[-1])
        assert said[0] == said[1]
    with pytest.raises(ValueError, match="gate_index = 1"):
        layer.adaptive_update_experts(1)
    assert not isinstance(layer, MoELayer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with pytest.raises(ValueError, match="adaptive gate"):
        ExpertController(layer, optimizer)
    with pytest.raises(ValueError, match="update_momentum"):
        registered_layer(gate, update_momentum=2)


def test_normalised_tokens_are_for_the_linear_gate_alone(registered: None) -> None:
    """Upstream's `top` gate normalises its tokens with `normalize_one_score_gate`; its `cosine_top` does so always."""
    layer = registered_layer("top-2", normalize_one_score_gate=True)
    assert isinstance(layer, MoELayer)
    x = tokens()
    assert torch.allclose(layer.route(x).scores, layer.route(3 * x).scores)
    assert not isinstance(registered_layer("cosine", normalize_one_score_gate=True), MoELayer)


@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
@pytest.mark.parametrize("gate", GATES)
def test_checkpoints_go_both_ways(gate: str, kind: str, registered: None) -> None:
    """Strict, alone and inside a model; the state dict of the caller stays as it is."""
    layer, native = registered_layer(gate, kind=kind), made(native_moe.moe_layer, gate, kind)
    state = native.state_dict()
    keys = list(state)
    assert "_max_num_global_experts" in keys
    layer.load_state_dict(state)
    assert list(state) == keys
    for (name, p), q in zip(
        sorted(layer.named_parameters()), [p for _, p in sorted(native.named_parameters())], strict=True
    ):
        assert torch.equal(p.flatten(), q.flatten()), name
    again = made(native_moe.moe_layer, gate, kind)
    again.load_state_dict(layer.state_dict())
    x = tokens()
    assert torch.equal(again(x), native(x))
    model, other = nn.Sequential(nn.Linear(D, D), nn.ModuleDict({"mlp": registered_layer(gate, kind=kind)})), None
    other = nn.Sequential(nn.Linear(D, D), nn.ModuleDict({"mlp": native}))
    model.load_state_dict(other.state_dict())
    other.load_state_dict(model.state_dict())


def test_biases_of_upstreams_converters_and_another_number_of_experts(registered: None) -> None:
    layer = registered_layer()
    state = made(native_moe.moe_layer).state_dict()
    for name in ("fc1", "fc2"):
        state[f"experts.batched_{name}_bias"] = state[f"experts.batched_{name}_bias"].unsqueeze(1)
    layer.load_state_dict(state)
    state["_max_num_global_experts"] = torch.tensor(6)
    with pytest.raises(ValueError, match="6 slots at top level and this layer, whose gate is of fixed k, 4 experts"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("seeds", [(1, 5), (1, 5, 7), None])
def test_start_weights_are_tutels(seeds: Any, gate: str, kind: str, request: pytest.FixtureRequest) -> None:
    """The one-line import draws the bits of Tutel's layer, before and after registration."""

    def drawn(cls: Any) -> list[Tensor]:
        torch.manual_seed(11)
        layer = made(cls, gate, kind, **({} if seeds is None else {"seeds": seeds}))
        behind = [torch.rand(4)] if seeds is None else []
        return [p.flatten() for _, p in sorted(layer.named_parameters())] + behind

    stock = drawn(tutel.moe.moe_layer)
    request.getfixturevalue("registered")
    for cls in (tutel.moe.moe_layer, native_moe.moe_layer):
        for a, b in zip(stock, drawn(cls), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
@pytest.mark.parametrize("seeds", [(1, 5), None])
def test_top_any_experts_start_alike_in_every_layout(seeds: Any, kind: str, registered: None) -> None:
    """Packed and padded, registered and not: E slots are drawn as Tutel draws E experts."""
    drawn = []
    for cls, options in (
        (tutel.moe.moe_layer, {"layout": "packed"}),
        (tutel.moe.moe_layer, {"layout": "padded"}),
        (native_moe.moe_layer, {}),
    ):
        torch.manual_seed(11)
        layer = made(cls, {"type": "top_any"}, kind, seeds=seeds, **options)
        drawn.append([p.flatten() for _, p in sorted(layer.named_parameters())])
    for other in drawn[1:]:
        for a, b in zip(drawn[0], other, strict=True):
            assert torch.equal(a, b)
