"""Properties of `Routing` on random ragged assignments: stable order, inverse directions, equal to the oracle's."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from helpers import FP32, FP64, MARGIN, make_case, margin, relative_rms
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmoe_tutel import Routing, moe
from dynmoe_tutel.routing import PaddedRows

EXPERTS = (1, 63, 64, 65, 200)
D = 8
quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def assignment_maps(draw: st.DrawFn) -> Tensor:
    """[T, E] bool: any density, with some tokens without an expert and some experts without a token."""
    T, E = draw(st.integers(0, 40)), draw(st.sampled_from(EXPERTS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.95, 1.0]))
    assigned_TE = torch.rand(T, E, generator=generator) < density
    assigned_TE[torch.rand(T, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = False
    assigned_TE[:, torch.rand(E, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = False
    return assigned_TE


@st.composite
def gates(draw: st.DrawFn) -> tuple[Tensor, oracle.Gate]:
    """Tokens [T, D] and a gate, in the range of fp32: masks, thresholds from all pass to none passes, any tau."""
    T, E = draw(st.integers(0, 12)), draw(st.sampled_from(EXPERTS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x_TD, w_DE = torch.randn(T, D, generator=generator), torch.randn(D, E, generator=generator)
    low = draw(st.sampled_from([-1.2, -0.3, 0.2, 0.6, 1.1]))
    G_E = low + 0.3 * torch.rand(E, generator=generator)
    keep = draw(st.sampled_from([0.1, 0.6, 1.0]))
    active = [e for e in range(E) if torch.rand((), generator=generator) < keep] or [E - 1]
    temperature = draw(st.sampled_from([None, -1.0, 1.5, 9.0]))
    gate = oracle.Gate(w_DE.double(), G_E.double(), active, temperature)
    assume(margin(x_TD.double(), gate) >= MARGIN)
    return x_TD, gate


def check_index(routing: Routing, assigned_TE: Tensor) -> None:
    """Assert that the index arrays of `routing` are the oracle's for `assigned_TE`, int32, and consistent."""
    T, E = assigned_TE.shape
    for field, values in oracle.index(assigned_TE).items():
        assert torch.equal(getattr(routing, field), torch.tensor(values, dtype=torch.int32)), field
    assert torch.equal(routing.assigned, assigned_TE)
    assert torch.equal(routing.k_per_token, assigned_TE.sum(dim=1, dtype=torch.int32))
    assert torch.equal(routing.counts, assigned_TE.sum(dim=0, dtype=torch.int32))
    assert (routing.num_tokens, routing.num_experts, int(routing.num_assignments)) == (T, E, int(assigned_TE.sum()))


@quick
@given(assignment_maps())
def test_index_is_the_oracle_s(assigned_TE: Tensor) -> None:
    routing = Routing.from_assignments(assigned_TE)
    check_index(routing, assigned_TE)
    assert torch.equal(routing.unrouted, ~assigned_TE.any(dim=1))


@quick
@given(assignment_maps())
def test_the_two_directions_are_inverse_and_stable(assigned_TE: Tensor) -> None:
    T, E = assigned_TE.shape
    routing = Routing.from_assignments(assigned_TE)
    A = int(assigned_TE.sum())
    assert torch.equal(routing.row_of_assignment.sort().values, torch.arange(A, dtype=torch.int32))  # a permutation
    token_of_assignment = torch.arange(T, dtype=torch.int32).repeat_interleave(routing.k_per_token)
    assert torch.equal(routing.token_of_row[routing.row_of_assignment], token_of_assignment)
    token_lists = routing.token_of_row.split(routing.counts.tolist())
    assert all((tokens.diff() > 0).all() for tokens in token_lists)  # token order inside an expert
    expert_lists = routing.expert_of_row[routing.row_of_assignment].split(routing.k_per_token.tolist())
    assert all((experts.diff() > 0).all() for experts in expert_lists)  # expert order inside a token
    for offsets, length in ((routing.expert_offsets, E), (routing.token_offsets, T)):
        assert offsets.dtype == torch.int32
        assert offsets.shape == (length + 1,)
        assert int(offsets[0]) == 0
        assert int(offsets[-1]) == A
        assert (offsets.diff() >= 0).all()


@quick
@given(assignment_maps(), st.sampled_from(["full", 0.3, 1.0, 2.5]))
def test_a_bounded_capacity_has_static_rows_and_drops_only_the_excess(
    assigned_TE: Tensor, capacity: float | str
) -> None:
    T, E = assigned_TE.shape
    A, rows = int(assigned_TE.sum()), T * E if capacity == "full" else math.ceil(min(float(capacity), E) * T)
    score_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(A))
    routing = Routing.from_assignments(assigned_TE, score_TE, capacity=capacity)
    kept_TE = routing.assigned
    assert not (kept_TE & ~assigned_TE).any()
    assert int(kept_TE.sum()) == min(A, rows)
    if (dropped_TE := assigned_TE & ~kept_TE).any():
        assert int(routing.dropped) == A - rows
        if rows:
            assert score_TE[dropped_TE].max() <= score_TE[kept_TE].min()
    index = oracle.index(kept_TE)
    for field in ("token_of_row", "row_of_assignment"):
        padded = index[field] + [-1] * (rows - len(index[field]))
        assert torch.equal(getattr(routing, field), torch.tensor(padded, dtype=torch.int32)), field
    for field in ("expert_offsets", "token_offsets"):
        assert torch.equal(getattr(routing, field), torch.tensor(index[field], dtype=torch.int32)), field


@quick
@given(assignment_maps())
def test_what_is_dispatched_and_combined_comes_back(assigned_TE: Tensor) -> None:
    """The mean of a token's own copies is the token; an unrouted one comes back as zero."""
    T = assigned_TE.shape[0]
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(T), dtype=torch.float64)
    routing = Routing.from_assignments(assigned_TE)
    rows_AD = routing.dispatch(x_TD)
    assert torch.equal(rows_AD, x_TD[routing.token_of_row.long()])
    padded_ECD = moe.fast_encode(x_TD, routing)
    assert torch.equal(PaddedRows(routing).unpad(padded_ECD), rows_AD)
    assert torch.equal((padded_ECD != 0).any(dim=2).sum(dim=1).int(), routing.counts)
    assert torch.equal(moe.fast_decode(padded_ECD, routing), routing.combine(rows_AD))
    back_TD = routing.combine(rows_AD)
    assert relative_rms(back_TD, x_TD * assigned_TE.any(dim=1, keepdim=True)) < FP64
    assert not back_TD[~assigned_TE.any(dim=1)].any()


@quick
@given(gates(), st.booleans())
def test_the_gate_decides_as_the_oracle(case: tuple[Tensor, oracle.Gate], fallback: bool) -> None:
    x_TD, gate = case
    mask_E = torch.zeros(len(gate.G_E))
    mask_E[list(gate.active)] = 1
    routing = moe.top_any_routing(x_TD, gate.w_DE.float(), gate.G_E.float(), mask_E, scale=gate.tau, fallback=fallback)
    check_index(routing, oracle.assignments(x_TD.double(), gate, training=not fallback))
    assert torch.equal(routing.unrouted, ~oracle.assignments(x_TD.double(), gate).any(dim=1))
    tolerance = FP32 * max(1.0, gate.tau)  # the cosine's rounding counts tau-fold in a score
    assert relative_rms(routing.scores, oracle.scores(x_TD.double(), gate), scale=0.5) < tolerance
    assert routing.thresholds is not None
    assert relative_rms(routing.thresholds, oracle.thresholds(gate), scale=0.5) < tolerance
    if fallback and len(x_TD):
        assert int(routing.k_per_token.min()) >= 1


@quick
@given(gates(), st.data())
def test_a_token_s_routing_does_not_depend_on_the_others(case: tuple[Tensor, oracle.Gate], data: st.DataObject) -> None:
    x_TD, gate = case
    assume(len(x_TD) > 1)
    fallback, part = data.draw(st.booleans()), data.draw(st.permutations(range(len(x_TD))))[: len(x_TD) // 2]
    mask_E = torch.zeros(len(gate.G_E))
    mask_E[list(gate.active)] = 1
    w_DE, G_E = gate.w_DE.float(), gate.G_E.float()
    whole = moe.top_any_routing(x_TD, w_DE, G_E, mask_E, scale=gate.tau, fallback=fallback)
    some = moe.top_any_routing(x_TD[part], w_DE, G_E, mask_E, scale=gate.tau, fallback=fallback)
    assert torch.equal(some.assigned, whole.assigned[part])
    assert torch.equal(some.unrouted, whole.unrouted[part])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"assigned must be bool \[T, E\], got .*float32 \[2, 3\]"):
        Routing.from_assignments(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"capacity = 0: give"):
        moe.moe_layer("top_any", 4, {"hidden_size_per_expert": 4}, capacity=0)
    with pytest.raises(ValueError, match=r"x must be \[T, D\] and sim_matrix \[D, E\], got \[3, 4\] and \[5, 2\]"):
        moe.top_any_routing(torch.ones(3, 4), torch.ones(5, 2), torch.ones(2))
    with pytest.raises(ValueError, match=r"gates must have shape \[2\], one real number an expert, got float32 \[3\]"):
        moe.top_any_routing(torch.ones(3, 4), torch.ones(4, 2), torch.ones(3))


@pytest.mark.parametrize("value", [None, 3, "a", [1.0], torch.ones(3, device="meta"), torch.ones(3).cfloat()], ids=repr)
def test_what_is_no_tensor_of_this_device_is_refused_by_name(value: object) -> None:
    """As the last argument of each: a ValueError, where there was an AttributeError or the dispatcher's error."""
    x, w, G, assigned = torch.ones(4, 8), torch.ones(8, 3), torch.zeros(3), torch.ones(4, 3).bool()
    routing = Routing.from_assignments(assigned)
    calls = {
        "gates": lambda: moe.top_any_routing(x, w, value),
        "experts_mask": lambda: moe.top_any_routing(x, w, G, value),
        "scores": lambda: Routing.from_assignments(assigned, value),
        "weights": lambda: Routing.from_assignments(assigned, weights=value),
        "x_TD": lambda: routing.dispatch(value),
        "rows_AD": lambda: routing.combine(value),
    }
    for name, call in calls.items():
        if value is None and name in ("experts_mask", "scores", "weights"):
            continue  # the default
        with pytest.raises(ValueError, match=name):
            call()


def test_float8_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="x must be a floating-point matrix of 16, 32 or 64 bits, got float8"):
        moe.top_any_routing(torch.ones(4, 8).to(torch.float8_e4m3fn), torch.ones(8, 3), torch.zeros(3))


def test_thresholds_are_those_of_the_forward_or_refused() -> None:
    """They are made when they are read, from a parameter that an optimizer changes in place."""
    layer = make_case(T=6, D=16, E=4).layer
    x, gate = torch.randn(6, 16), layer.gates[0]
    kept, routing = layer.route(x), gate(x)
    before = torch.sigmoid(gate.gates.detach().clone())
    assert torch.allclose(routing.thresholds, before)
    (gradient,) = torch.autograd.grad(routing.thresholds.sum(), gate.gates)
    assert torch.allclose(gradient, before * (1 - before))
    with torch.no_grad():
        gate.gates.add_(1)
    assert torch.allclose(kept.thresholds, before)
    with pytest.raises(RuntimeError, match="changed in place"):
        _ = routing.thresholds
