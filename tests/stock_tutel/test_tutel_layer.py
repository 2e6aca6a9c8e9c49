"""The registered layer, packed and padded, against the native layer and the oracle; every argument of Tutel's."""

from __future__ import annotations

import copy
import logging
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import FP32, FP64, Case, assert_gradients, make_case, relative_rms
from torch import Tensor, nn

from dynmoe_tutel import ExpertController, MoELayer

tutel = pytest.importorskip("tutel", reason="stock Tutel is not installed: its README says how")
pytestmark = pytest.mark.usefixtures("registered")

D, H, E = 16, 20, 5
LAYOUTS = ["packed", "padded"]


def tutel_twin(native: MoELayer, **options: Any) -> Any:
    """A layer of `tutel.moe` with the configuration and the weights of `native`, made by `make_case`."""
    from tutel import moe

    experts, gate = native.experts, native.gates[0]
    kind = "llama_ffn" if hasattr(experts, "W_fc1") else "ffn"
    config: dict[str, Any] = {
        "type": kind,
        "num_experts_per_device": native.num_global_experts,
        "hidden_size_per_expert": experts.hidden_size_per_expert,
        "activation_fn": experts.activation_fn,
    }
    if experts.output_dim != native.model_dim:
        config["output_dim"] = experts.output_dim
    gate_type: dict[str, Any] = {"type": "top_any", "max_expert_num": native.slots}
    if gate.temperature is not None:
        gate_type["init_t"] = 1.0
    options = {"combine_gradient": native.combine_gradients[0], "capacity": native.capacity, **options}
    layer = moe.moe_layer(gate_type=gate_type, experts=config, model_dim=native.model_dim, **options)
    layer.to(next(native.parameters()).dtype)
    layer.load_state_dict(native.state_dict())
    return layer


def run(layer: nn.Module, case: Case, **call: Any) -> dict[str, Tensor]:
    """Output, loss and gradients by name, llama_ffn's as this package shapes them."""
    x = case.x.clone().requires_grad_()
    y = layer(x, **call)
    assert torch.equal(y.l_aux, layer.l_aux)
    layer.zero_grad()
    (y.double() * case.dy.double()).sum().backward()
    own = dict(case.layer.named_parameters())
    found = {name: g.reshape(own[name].shape) if name in own else g for name, g in helpers.gradients(layer, x).items()}
    return {"y": y.detach(), "l_aux": layer.l_aux.detach(), **found}


@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.3},
        {"E": 7, "active": [1, 2, 5]},
        {"G": 1.5},
        {"G": -1.5},
        {"kind": "llama_ffn", "activation": F.silu},
        {"output_dim": 6},
        {"T": 1, "D": 6, "H": 4},
        {"activation": torch.tanh},
    ],
    ids=["mixed", "temperature", "masked", "unrouted", "all", "llama", "output", "one token", "tanh"],
)
def test_native_and_oracle(options: dict, layout: str, training: bool, combine_gradient: str) -> None:
    case = make_case(**options, combine_gradient=combine_gradient)
    layer = tutel_twin(case.layer, layout=layout).train(training)
    assert layer.layout == layout
    assert isinstance(layer, tutel.impls.moe_layer.MOELayer)
    assert isinstance(layer, MoELayer)
    found, native = run(layer, case), run(case.layer.train(training), case)
    assert relative_rms(found["y"], case.expected_output(training)) < FP32
    gradients = {name: found[name] for name in found if name not in ("y", "l_aux")}
    assert_gradients(gradients, case.expected_gradients(training, combine_gradient), case.gate, FP32)
    assert torch.equal(found["l_aux"], native["l_aux"])
    if layout == "packed":
        for name, value in native.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_padded_in_other_dtypes(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    found, native = run(tutel_twin(case.layer, layout="padded"), case), run(case.layer, case)
    for name, value in native.items():
        assert relative_rms(found[name].double(), value.double()) < (FP64 if dtype == torch.float64 else 1e-2), name


PARALLEL = ["adaptive:0", "adaptive:1", "adaptive:4", "data", "model", "auto"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {"a2a_ffn_overlap_degree": 2}),
        ({"a2a_ffn_overlap_degree": 3}, {}),
        *(({"parallel_type": kind}, {}) for kind in PARALLEL),
        ({}, {"adaptive_r": 0}),
        ({}, {"adaptive_r": 1}),
        ({"use_2dh": True}, {}),
        ({}, {"inequivalent_tokens": True}),
        ({}, {"megablocks_size": 4}),
        ({}, {"top_k": 2}),
        ({"batch_prioritized_routing": True}, {}),
        ({"normalize_gate": False}, {}),
        ({"pad_samples": False}, {}),
        ({"group": None}, {}),
        ({"capacity": "full"}, {}),
        ({"capacity": 6.0}, {}),
        ({"check_finite": True}, {}),
    ],
    ids=str,
)
def test_arguments_that_change_no_number(options: dict, call: dict, layout: str) -> None:
    case = make_case()
    layer = tutel_twin(case.layer, layout=layout, **options)
    expected = run(tutel_twin(case.layer, layout=layout), case)
    for name, value in run(layer, case, **call).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1.0, -0.4, 3.0])
def test_drops_of_both_layouts(factor: float, training: bool, combine_gradient: str, prioritized: bool) -> None:
    case = make_case(T=40, combine_gradient=combine_gradient)
    options = {"batch_prioritized_routing": prioritized, "a2a_ffn_overlap_degree": 2}
    packed, padded = (tutel_twin(case.layer, layout=layout, **options).train(training) for layout in LAYOUTS)
    one, other = run(packed, case, capacity_factor=factor), run(padded, case, capacity_factor=factor)
    for name, value in one.items():
        assert relative_rms(other[name], value) < 3 * FP32, name
    assert torch.equal(packed.dropped_assignments, padded.dropped_assignments)
    if abs(factor) < 1:
        assert int(packed.dropped_assignments) > 0


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.25, -0.7, -5.0])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_drops_are_tutels(k: int, factor: float, prioritized: bool, normalize: bool) -> None:
    """Tutel's own layer with its own `top` gate against this package's layer with the same weights.

    Not batch-prioritised without a positive factor: there Tutel 0.3 takes the last token's place in the sorted order
    for the load of an expert, and drops rows where none were to be dropped.
    """
    if prioritized and factor <= 0:
        pytest.skip("Tutel 0.3 drops rows that it was not asked to drop")
    from tutel import moe

    from dynmoe_tutel import moe as ours

    torch.manual_seed(0)
    layers = [
        module.moe_layer(
            gate_type={"type": "top", "k": k, "capacity_factor": factor, "fp32_gate": True},
            experts={"type": "ffn", "num_experts_per_device": 4, "hidden_size_per_expert": H, "activation_fn": F.gelu},
            model_dim=D,
            batch_prioritized_routing=prioritized,
            normalize_gate=normalize,
            is_gshard_loss=True,
        )
        for module in (moe, ours)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(37, D)
    found = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y.square().sum() + y.l_aux).backward()
        found.append({"y": y.detach(), "l_aux": y.l_aux.detach(), **helpers.gradients(layer, leaf)})
        leaf.grad = None
    for name, value in found[0].items():
        assert relative_rms(found[1][name], value, scale=1e-3) < 2e-6, name


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("factor", [0.5, -0.5])
def test_the_dropped_pairs_are_those_of_extract_critical(factor: float, k: int) -> None:
    """A top-any routing in which every token has k experts, against Tutel's function on the same scores."""
    from tutel import moe

    from dynmoe_tutel import Routing
    from dynmoe_tutel.expert_capacity import drop_beyond_capacity

    score_TE = torch.rand(50, 6, generator=torch.Generator().manual_seed(k))
    assigned_TE = torch.zeros(50, 6, dtype=torch.bool).scatter(1, score_TE.topk(k, dim=1).indices, True)
    (_, experts, places, _, capacity, _), _ = moe.top_k_routing(score_TE, k, capacity_factor=factor)
    expected_TE = torch.zeros_like(assigned_TE)
    for expert_T, place_T in zip(experts, places, strict=True):
        expected_TE[torch.arange(50), expert_T.long()] |= place_T < capacity
    kept = drop_beyond_capacity(Routing.from_assignments(assigned_TE, score_TE), capacity)
    assert torch.equal(kept.assigned, expected_TE)
    assert 0 < int(kept.dropped) < 50 * k


@pytest.mark.parametrize("layout", LAYOUTS)
class TestFeatures:
    def test_result_and_scan_functions(self, layout: str) -> None:
        case, seen = make_case(), []

        def scan(name: str, parameter: nn.Parameter) -> None:
            seen.append(name)
            parameter.skip_allreduce = True  # type: ignore[attr-defined]

        def result(y: Tensor) -> tuple[Tensor, Tensor]:
            return y * 2, y.l_aux  # type: ignore[attr-defined]

        layer = tutel_twin(case.layer, layout=layout, scan_expert_func=scan, result_func=result)
        y, l_aux = layer(case.x)
        assert torch.equal(y, tutel_twin(case.layer, layout=layout)(case.x) * 2)
        assert torch.equal(l_aux, layer.l_aux)
        assert sorted(seen) == sorted(name for name, _ in layer.experts.named_parameters())
        assert all(p.skip_allreduce and p._tutel_expert for p in layer.experts.parameters())

    def test_reserve_dims(self, layout: str) -> None:
        case = make_case()
        layer = tutel_twin(case.layer, layout=layout)
        x = case.x.view(4, 6, 2, D // 2)
        expected = layer(case.x).view(4, 6, 2, D // 2)
        if layout == "packed":
            assert torch.equal(layer(x, reserve_dims=2), expected)
            return
        inner = layer.experts
        layer.experts = _Flat(inner)
        assert torch.equal(layer(x, reserve_dims=2), expected)

    def test_autocast(self, layout: str) -> None:
        case = make_case()
        layer = tutel_twin(case.layer, layout=layout)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(case.x)
            routing = layer.route(case.x)
        assert y.dtype == torch.float32
        assert torch.equal(routing.bits, layer.route(case.x).bits)
        assert 1e-4 < relative_rms(y, case.expected_output(True)) < 1e-2

    def test_environment(self, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case = make_case(T=40)
        monkeypatch.setenv("CAP_FACTOR", "0.5")
        layer = tutel_twin(case.layer, layout=layout)
        layer(case.x)
        assert int(layer.dropped_assignments) > 0
        monkeypatch.delenv("CAP_FACTOR")
        monkeypatch.setenv("SKIP_EXPERT", "1")
        layer = tutel_twin(case.layer, layout=layout)
        routed_T1 = (layer.route(case.x).k_per_token > 0).unsqueeze(1)
        assert torch.allclose(layer(case.x), case.x * routed_T1, atol=1e-6)
        monkeypatch.delenv("SKIP_EXPERT")
        monkeypatch.setenv("SKIP_MOE", "1")
        y = tutel_twin(case.layer, layout=layout)(case.x)
        assert torch.equal(y, case.x)
        assert y.l_aux is None

    def test_parameters_and_counts(self, layout: str) -> None:
        layer = tutel_twin(make_case(E=7, active=[0, 1, 2]).layer, layout=layout)
        gate = dict(layer.get_parameter_iterator("gate"))
        experts = dict(layer.get_parameter_iterator("local_experts"))
        assert set(gate) == {"0.sim_matrix", "0.gates"}
        assert set(experts) == set(helpers.FFN)
        assert (layer.num_global_experts, layer.max_num_global_experts) == (3, 7)
        assert (layer.num_local_experts, layer.max_num_local_experts, layer.world_size) == (3, 7, 1)
        cls = tutel.moe.moe_layer
        assert [cls.global_expert_count(n) for n in (3, 1, -1)] == [3, 1, 1]

    def test_seeds(self, layout: str) -> None:
        """Gates and experts by their seeds, whatever the global state, which only the third seed sets."""
        from tutel import moe

        def build(seeds: Any) -> Any:
            return moe.moe_layer(
                gate_type={"type": "top_any", "max_expert_num": 4},
                experts={"num_experts_per_device": 2, "hidden_size_per_expert": H, "type": "ffn"},
                model_dim=D,
                seeds=seeds,
                layout=layout,
            )

        torch.manual_seed(0)
        first = build((1, 2))
        state = torch.get_rng_state()
        torch.manual_seed(99)
        second, third = build((1, 2)), build((1, 3, 7))
        after = torch.randn(3)
        torch.manual_seed(7)
        assert torch.equal(after, torch.randn(3))
        torch.manual_seed(0)
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), name
        assert torch.equal(first.gates[0].sim_matrix, third.gates[0].sim_matrix)
        assert not torch.equal(first.experts.batched_fc1_w, third.experts.batched_fc1_w)

    def test_growing_and_pruning(self, layout: str) -> None:
        """The same record and the same events as the native layer, and a grown slot is the same copy."""
        case = make_case(T=60, E=6, active=[0, 1, 3], G=0.2)
        with torch.no_grad():
            case.layer.gates[0].gates[3] = 5.0  # never activated
        layers = [case.layer, tutel_twin(case.layer, layout=layout)]
        for layer in layers:
            layer.begin_record_routing()
            layer(case.x)
        assert torch.equal(layers[0].get_routing_records(), layers[1].get_routing_records())
        events = [[str(change) for change in layer.adaptive_update_experts()] for layer in layers]
        assert events[0] == events[1]
        assert [text.split()[-1] for text in events[0]] != []
        native = layers[0].state_dict()
        for name, value in layers[1].state_dict().items():
            assert torch.equal(value.reshape(native[name].shape), native[name]), name
        assert layers[1].num_global_experts == layers[0].num_global_experts

    @pytest.mark.parametrize("init", ["nearest", "mean", "fresh", "keep"])
    def test_the_controller(self, layout: str, init: str) -> None:
        case = make_case(T=60, E=4, active=[0, 1], G=0.2)
        layer = tutel_twin(case.layer, layout=layout)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        controller = ExpertController(layer, optimizer, 2, init=init)
        events = []
        for _ in range(4):
            optimizer.zero_grad()
            (layer(case.x) * case.dy).sum().backward()
            optimizer.step()
            moments = optimizer.state[layer.experts.batched_fc1_w]["exp_avg"]
            for event in controller.step():
                assert not moments[event.slot].any()
                assert moments[0].any()
                events.append(event.action)
        assert "grown" in events

    def test_twenty_steps_follow_the_native_layer(self, layout: str) -> None:
        case = make_case(T=60)
        losses = []
        for layer in (copy.deepcopy(case.layer), tutel_twin(case.layer, layout=layout)):
            optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
            curve = []
            for _ in range(20):
                optimizer.zero_grad()
                y = layer(case.x)
                loss = (y - case.dy).square().mean() + 0.01 * y.l_aux
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
            losses.append(curve)
        assert losses[0][-1] < 0.9 * losses[0][0]
        assert losses[1] == pytest.approx(losses[0], rel=2e-5)

    def test_deepcopy_and_state_dict(self, layout: str) -> None:
        case = make_case()
        layer = tutel_twin(case.layer, layout=layout)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(case.x), layer(case.x))
        assert list(layer.state_dict()) == [
            "_num_global_experts",
            "_max_num_global_experts",
            "gates.0.sim_matrix",
            "gates.0.gates",
            "gates.0.experts_mask",
            *(f"experts.{name}" for name in ("batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias")),
        ]


class _Flat(nn.Module):
    """Experts that see the reserved dimensions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        assert x.shape[2:] == (2, D // 2)
        return self.inner(x.flatten(2), ctx).view(x.shape)


class OptionsExpert(nn.Module):
    """Tutel's custom expert with any options, as its example has it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        assert set(options) == {"model_dim", "num_experts_per_device", "sharded_count", "scale"}
        self.W = nn.Parameter(torch.randn(options["num_experts_per_device"], D, D) * options["scale"])

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        assert (ctx.sharded_count, ctx.megablocks_size, ctx.num_global_experts) == (1, 0, E)
        return torch.relu(x @ self.W)


class OldExpert(nn.Module):
    """With the argument's old name, and a flat parameter as Tutel's sharded example."""

    def __init__(self, model_dim: int, local_experts: int, sharded_count: int, my_config: str) -> None:
        super().__init__()
        assert my_config == "mine"
        self.shape = (local_experts, model_dim, model_dim)
        self.W = nn.Parameter(torch.randn(local_experts * model_dim * model_dim // sharded_count) * 0.3)

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        return torch.relu(x @ self.W.view(self.shape))


@pytest.mark.parametrize(
    ("module", "extra"), [(OptionsExpert, {"scale": 0.3}), (OldExpert, {"my_config": "mine"})], ids=["options", "old"]
)
def test_custom_experts(module: Any, extra: dict) -> None:
    from tutel import moe

    torch.manual_seed(0)
    case = make_case()
    layer = moe.moe_layer(
        gate_type={"type": "top_any", "max_expert_num": E},
        experts={"type": "custom", "module": module, "num_experts_per_device": 3, **extra},
        model_dim=D,
    )
    assert layer.layout == "padded"
    assert "experts.W" in layer.state_dict()
    layer.gates[0].load_state_dict(case.layer.gates[0].state_dict())
    W = layer.experts.W.view(E, D, D)
    routing = layer.route(case.x)
    share_TE = routing.assigned / routing.k_per_token.clamp(min=1).unsqueeze(1)
    expected = torch.einsum("te,ted->td", share_TE, torch.relu(torch.einsum("td,edf->tef", case.x, W)))
    assert relative_rms(layer(case.x), expected) < FP32
    layer.gates[0].experts_mask[4] = 0
    layer.begin_record_routing()
    layer(-10 * case.x[:2].sum(0, keepdim=True).repeat(8, 1))
    changes = layer.adaptive_update_experts()
    if [change.action for change in changes].count("grown"):
        slot = next(change.slot for change in changes if change.action == "grown")
        assert any(torch.equal(W[slot], W[e]) for e in range(E) if e != slot)


@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("training", [True, False])
def test_scores_before_the_experts(training: bool, combine_gradient: str) -> None:
    """is_postscore = False: expert_e(a / k * x), summed."""
    case = make_case(dtype=torch.float64, combine_gradient=combine_gradient)
    layer = tutel_twin(case.layer, is_postscore=False).train(training)
    found = run(layer, case)
    x = case.x.clone().requires_grad_()
    layer.zero_grad()
    routing = layer.route(x)
    gate_TE = routing.straight_through() + (routing.assigned & routing.unrouted.unsqueeze(1))
    k_T1 = gate_TE.sum(dim=1, keepdim=True).clamp(min=1)
    share_TE = gate_TE / (k_T1 if combine_gradient == "normalized" else k_T1.detach())
    p = layer.experts
    h = torch.einsum("te,td,ehd->teh", share_TE, x, p.batched_fc1_w) + p.batched_fc1_bias
    rows = torch.einsum("teh,ehd->ted", F.gelu(h), p.batched_fc2_w) + p.batched_fc2_bias
    y = torch.einsum("te,ted->td", routing.assigned.double(), rows)
    (y * case.dy).sum().backward()
    expected = {"y": y.detach(), **helpers.gradients(layer, x)}
    for name, value in expected.items():
        assert relative_rms(found[name], value) < 1e-12, name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "ragged"}, "layout = 'ragged'"),
        ({"layout": "packed", "is_postscore": False}, "is_postscore = False"),
        ({"parallel_type": "adaptive:two"}, "parallel_type = 'adaptive:two'"),
        ({"parallel_type": "tensor"}, "allowed are 'adaptive:<r>'"),
        ({"surprise": 1}, "surprise"),
        ({"layout": "padded", "experts": {"recompute": "up"}}, "recompute"),
        ({"layout": "padded", "experts": {"engine": "torch"}}, "engine"),
        ({"layout": "padded", "experts": {"hidden_size": 3}}, "hidden_size"),
        ({"experts": {"num_experts_per_device": 0.5}}, "an expert on 2 devices"),
        ({"experts": {"num_experts_per_device": -3}}, "an expert on 3 devices"),
        ({"experts": {"num_experts_per_device": 2.5}}, "2.5"),
        ({"experts": {"type": "bert_ffn"}}, "bert_ffn"),
        ({"gate_type": {"type": "top_any", "max_experts": 3}}, "max_experts"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict, said: str) -> None:
    from tutel import moe

    experts = {"num_experts_per_device": 3, "hidden_size_per_expert": H, "type": "ffn", **options.pop("experts", {})}
    before = copy.deepcopy(experts)
    with pytest.raises(ValueError, match=said):
        moe.moe_layer(**{"gate_type": {"type": "top_any"}, "experts": experts, "model_dim": D, **options})
    assert experts == before


def test_bad_calls() -> None:
    layer = tutel_twin(make_case().layer, layout="padded")
    with pytest.raises(ValueError, match="adaptive_r"):
        layer(torch.randn(3, D), adaptive_r=5)
    layer = tutel_twin(make_case(capacity=2.0).layer, layout="padded")
    with pytest.raises(ValueError, match=r"capacity_factor = 1\.0 and capacity = 2\.0"):
        layer(torch.randn(3, D), capacity_factor=1.0)


def test_nothing_is_printed(capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for layout in LAYOUTS:
        layer = tutel_twin(make_case(T=60, E=6, active=[0, 1, 3], G=0.2).layer, layout=layout)
        layer.begin_record_routing()
        layer(torch.randn(9, D))
        layer.adaptive_update_experts()
    assert capsys.readouterr().out == ""
