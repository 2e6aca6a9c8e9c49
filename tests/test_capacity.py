"""Tutel's capacity factor on ragged assignments: the dropped rows, and the resulting y and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import FP32, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmoe_tutel import MoELayer, Routing, moe
from dynmoe_tutel.capacity import drop_beyond_capacity, expert_capacity, picks
from dynmoe_tutel.moe import critical_data

T, D, H = 48, 12, 20
quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """A ragged assignment with distinct scores."""
    tokens, experts = draw(st.integers(0, 30)), draw(st.sampled_from([1, 2, 5, 65]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    score_TE = torch.rand(tokens, experts, generator=generator)
    assigned_TE = torch.rand(tokens, experts, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    return Routing.from_assignments(assigned_TE, score_TE)


def kept_by_loops(routing: Routing, capacity: int, prioritized: bool) -> Tensor:
    """Tutel's rule, literally: all first picks, then all second picks, ..., each while its expert has room."""
    assigned_TE, score_TE = routing.assigned, routing.scores.detach()
    tokens = list(range(routing.num_tokens))
    queues = [
        sorted((e for e in range(routing.num_experts) if assigned_TE[t, e]), key=lambda e: -float(score_TE[t, e]))
        for t in tokens
    ]
    if prioritized:
        tokens.sort(key=lambda t: -max((float(score_TE[t, e]) for e in queues[t]), default=-math.inf))
    load, kept_TE = [0] * routing.num_experts, torch.zeros_like(assigned_TE)
    for j in range(routing.num_experts):
        for t in tokens:
            if j < len(queues[t]):
                expert = queues[t][j]
                kept_TE[t, expert] = load[expert] < capacity
                load[expert] += 1
    return kept_TE


@quick
@given(routings(), st.integers(1, 12), st.booleans())
def test_the_rows_that_are_kept(routing: Routing, capacity: int, prioritized: bool) -> None:
    kept = drop_beyond_capacity(routing, capacity, batch_prioritized=prioritized)
    expected_TE = kept_by_loops(routing, capacity, prioritized)
    assert torch.equal(kept.assigned, expected_TE)
    assert int(kept.dropped) == int((routing.assigned & ~expected_TE).sum())
    k_T1 = routing.assigned.sum(dim=1, keepdim=True).clamp(min=1)
    assert torch.equal(kept.weights * kept.assigned, expected_TE / k_T1)


@quick
@given(routings())
def test_picks_and_critical_data(routing: Routing) -> None:
    expert_TK = picks(routing)
    for t, row in enumerate(expert_TK.tolist()):
        k = int(routing.k_per_token[t])
        assert row[k:] == [-1] * (len(row) - k)
        assert sorted(row[:k]) == routing.assigned[t].nonzero().squeeze(1).tolist()
        assert row[:k] == sorted(row[:k], key=lambda e: -float(routing.scores[t, e]))
    E, indices, places, gates, capacity, loads = critical_data(routing)
    taken = set()
    for expert_T, place_T, gate_T in zip(indices, places, gates, strict=True):
        assert (expert_T.dtype, place_T.dtype) == (torch.int32, torch.int32)
        for t in range(routing.num_tokens):
            if expert_T[t] < 0:
                assert gate_T[t] == 0
                continue
            place = (int(expert_T[t]), int(place_T[t]))
            assert place not in taken
            assert place[1] < capacity
            taken.add(place)
    assert len(taken) == int(routing.num_assignments)
    assert torch.equal(loads, routing.counts)
    assert routing.num_experts == E


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(0.0, 9), (1.0, 3 * 4), (1.3, 3 * 5), (0.01, 1), (-1.0, 9), (-0.5, 3 * 2), (100.0, 3 * 400)],
)
def test_the_capacity(factor: float, expected: int) -> None:
    """13 tokens, 4 experts: a fair share is 4 tokens."""
    assert expert_capacity(factor, 13, 4, 3, 9) == expected
    assert expert_capacity(factor, 13, 4, 3, 9, alignment=8) == -(-expected // 8) * 8


@pytest.mark.parametrize("postscore", [True, False])
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("capacity", [None, 7])
def test_tutels_lists_and_the_routing_carry_the_same(
    capacity: int | None, combine_gradient: str, postscore: bool
) -> None:
    """`fast_encode` and `fast_decode` of the tuple against those of the routing, with gradients of data and router."""
    generator = torch.Generator().manual_seed(0)
    results = []

    def experts(rows_ECD: Tensor) -> Tensor:
        return rows_ECD.tanh() * torch.arange(1.0, 6.0).view(5, 1, 1)

    for as_lists in (True, False):
        generator.manual_seed(0)
        x, w, g = torch.randn(T, D, generator=generator), torch.randn(D, 5, generator=generator), torch.zeros(5)
        x, w, g = (t.double().requires_grad_() for t in (x, w, g))
        routing = moe.top_any_routing(x, w, g, fallback=True)
        if as_lists:
            data = critical_data(routing, capacity, combine_gradient)
            rows = moe.fast_encode(x, data, postscore)
            y = moe.fast_decode(experts(rows), data, postscore)
        else:
            if capacity is not None:
                routing = drop_beyond_capacity(routing, capacity, combine_gradient)
            dispatcher = moe.fast_dispatcher(5, capacity or 0, D, x.dtype)
            dispatcher.update(routing, is_postscore=postscore, combine_gradient=combine_gradient)
            y = dispatcher.decode(experts(dispatcher.encode(x).view(5, -1, D)).flatten(0, 1))
        (y * torch.linspace(-1, 1, D)).sum().backward()
        results.append([y.detach(), x.grad, w.grad, g.grad])
    for found, expected in zip(*results, strict=True):
        assert relative_rms(found, expected) < 1e-12
        assert expected.abs().sum() > 0


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("factor", [0.6, -0.6])
def test_a_layer_that_drops(factor: float, combine_gradient: str, training: bool, prioritized: bool) -> None:
    """Output and every gradient against a dense computation that zeroes the dropped pairs, in float64."""
    torch.manual_seed(1)
    layer = moe.moe_layer(
        gate_type={"type": "top_any", "max_expert_num": 6, "capacity_factor": factor},
        experts={"num_experts_per_device": 5, "hidden_size_per_expert": H, "activation_fn": torch.tanh},
        model_dim=D,
        combine_gradient=combine_gradient,
        batch_prioritized_routing=prioritized,
    )
    layer = layer.double().train(training)
    torch.nn.init.uniform_(layer.gates[0].gates, -0.2, 0.3)
    x, d_y = torch.randn(T, D).double().requires_grad_(), torch.randn(T, D).double()
    y = layer(x)
    y.backward(d_y)
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]

    whole = layer.route(x)
    k, load = int(whole.k_per_token.max()), int(whole.counts.max())
    room = k * int(abs(factor) * -(-T // 6))
    kept_TE = kept_by_loops(whole, room if factor > 0 else min(room, load), prioritized)
    assert int(layer.dropped_assignments) == int((whole.assigned & ~kept_TE).sum()) > 0
    layer.zero_grad()
    x = x.detach().requires_grad_()
    whole = layer.route(x)
    gate_TE = whole.straight_through() + (whole.assigned & whole.unrouted.unsqueeze(1))
    k_T1 = gate_TE.sum(dim=1, keepdim=True).clamp(min=1)
    share_TE = gate_TE / (k_T1 if combine_gradient == "normalized" else k_T1.detach())
    p = layer.experts
    h = torch.tanh(torch.einsum("td,ehd->teh", x, p.batched_fc1_w) + p.batched_fc1_bias)
    rows = torch.einsum("teh,ehd->ted", h, p.batched_fc2_w) + p.batched_fc2_bias
    expected_y = torch.einsum("te,ted->td", share_TE * kept_TE, rows)
    expected_y.backward(d_y)
    for value, expected in zip(
        found, [expected_y.detach(), x.grad, *(p.grad for p in layer.parameters())], strict=True
    ):
        assert relative_rms(value, expected) < 1e-11


@pytest.mark.parametrize("name", ["top", "cosine_top"])
@pytest.mark.parametrize("factor", [0.5, 1.0, -0.7])
def test_fixed_k_gates_drop_too(name: str, factor: float) -> None:
    torch.manual_seed(0)
    layer = moe.moe_layer(
        gate_type={"type": name, "k": 2},
        experts={"num_experts_per_device": 4, "hidden_size_per_expert": H},
        model_dim=D,
    )
    x = torch.randn(T, D)
    whole = layer.route(x)
    room = 2 * int(abs(factor) * T // 4)
    kept_TE = kept_by_loops(whole, room if factor > 0 else min(room, int(whole.counts.max())), False)
    p = layer.experts
    h = torch.relu(torch.einsum("td,ehd->teh", x, p.batched_fc1_w) + p.batched_fc1_bias)
    rows = torch.einsum("teh,ehd->ted", h, p.batched_fc2_w) + p.batched_fc2_bias
    expected = torch.einsum("te,ted->td", whole.weights * kept_TE, rows)
    assert relative_rms(layer(x, capacity_factor=factor), expected) < FP32


def test_where_the_factor_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the call, else the gate, else CAP_FACTOR; upstream's gates drop only if the call says so."""

    def dropped(gate: dict, factor: float | None = None) -> int:
        torch.manual_seed(0)
        layer = MoELayer({"max_expert_num": 4, **gate}, D, {"num_experts_per_device": 4, "hidden_size_per_expert": H})
        layer(torch.randn(T, D), capacity_factor=factor)
        return int(layer.dropped_assignments)

    few = dropped({"type": "top_any", "capacity_factor": 0.4})
    assert dropped({"type": "top_any"}) == 0
    assert dropped({"type": "top_any"}, 0.4) == few > 0
    assert dropped({"type": "top_any", "capacity_factor": 100.0}, 0.4) == few
    monkeypatch.setenv("CAP_FACTOR", "0.4")
    assert dropped({"type": "top_any"}) == few
    assert dropped({"type": "top_any", "capacity_factor": 0.0}) == 0
    assert dropped({"type": "gated_multi_gate", "capacity_factor": 0.4}) == 0
    assert dropped({"type": "gated_multi_gate"}, 0.4) > 0
    monkeypatch.setenv("CAP_FACTOR", "much")
    with pytest.raises(ValueError, match="CAP_FACTOR = 'much'"):
        dropped({"type": "top_any"})


@pytest.mark.parametrize("capacity", ["full", 1.5])
def test_two_bounds_are_one_too_many(capacity: str | float) -> None:
    layer = MoELayer("top_any", D, {"num_experts_per_device": 4, "hidden_size_per_expert": H}, capacity=capacity)
    with pytest.raises(ValueError, match=r"capacity_factor = 1\.25 and capacity"):
        layer(torch.randn(T, D), capacity_factor=1.25)


class TestRaggedTopK:
    def test_a_k_of_each_token(self) -> None:
        scores = torch.rand(9, 5, generator=torch.Generator().manual_seed(0))
        k_T = torch.tensor([0, 1, 2, 5, 3, 0, 4, 1, 2])
        crit, l_aux = moe.top_k_routing(scores, k_T, capacity_factor=0.0)
        E, indices, _, gates, capacity, loads = crit
        assert (E, len(indices), int(loads.sum())) == (5, 5, int(k_T.sum()))
        assert torch.equal(torch.stack(indices).ge(0).sum(dim=0), k_T)
        ordered = scores.sort(dim=1, descending=True)
        for t, k in enumerate(k_T.tolist()):
            assert [int(column[t]) for column in indices[:k]] == ordered.indices[t, :k].tolist()
            total = ordered.values[t, :k].sum()
            assert [float(c[t]) for c in gates[:k]] == pytest.approx((ordered.values[t, :k] / total).tolist())
        assert capacity == int(loads.max())
        first_E = torch.bincount(ordered.indices[k_T > 0, 0], minlength=5)
        assert float(l_aux) == pytest.approx(float((scores.sum(dim=0) * first_E).sum() * 5 / 81))
        data = torch.randn(9, 4)
        back = moe.fast_decode(moe.fast_encode(data, crit), crit)
        assert torch.allclose(back, data * (k_T > 0).unsqueeze(1), atol=1e-6)

    @pytest.mark.parametrize(
        ("top_k", "said"),
        [
            (0, "top_k = 0"),
            (2.0, "top_k = 2.0"),
            (None, "top_k = None"),
            (torch.ones(9), "integers"),
            (torch.ones(8, dtype=torch.int64), r"\[9\]"),
            (torch.full((9,), 6), "6: allowed are 0 to 5"),
            (torch.full((9,), -1), "-1"),
        ],
    )
    def test_bad_k(self, top_k: object, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            moe.top_k_routing(torch.rand(9, 5), top_k)  # type: ignore[arg-type]
