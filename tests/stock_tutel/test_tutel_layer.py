"""The registered layer, packed and padded, against the native layer and the oracle; every argument of Tutel's."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import FP32, FP64, assert_gradients, make_case, relative_rms
from tutel_twin import LAYOUTS, D, H, draw, run, tutel_twin

from dynmoe_tutel import MoELayer

tutel = pytest.importorskip("tutel", reason="stock Tutel is not installed: its README says how")
pytestmark = pytest.mark.usefixtures("registered")


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

    Batch priority is tested only with a positive factor: otherwise Tutel 0.3 takes the last token's place in the
    sorted order for an expert's load, and drops rows that it should keep.
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
    draw(layers[0].experts)
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
    """A top-any routing with k experts for every token, against Tutel's function on the same scores."""
    from tutel import moe

    from dynmoe_tutel import Routing
    from dynmoe_tutel.capacity import drop_beyond_capacity

    score_TE = torch.rand(50, 6, generator=torch.Generator().manual_seed(k))
    assigned_TE = torch.zeros(50, 6, dtype=torch.bool).scatter(1, score_TE.topk(k, dim=1).indices, True)
    (_, experts, places, _, capacity, _), _ = moe.top_k_routing(score_TE, k, capacity_factor=factor)
    expected_TE = torch.zeros_like(assigned_TE)
    for expert_T, place_T in zip(experts, places, strict=True):
        expected_TE[torch.arange(50), expert_T.long()] |= place_T < capacity
    kept = drop_beyond_capacity(Routing.from_assignments(assigned_TE, score_TE), capacity)
    assert torch.equal(kept.assigned, expected_TE)
    assert 0 < int(kept.dropped) < 50 * k


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
