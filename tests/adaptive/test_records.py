"""`RoutingRecord`: the sums of a window, sampling, saving, and a layer's windows."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmoe_tutel import Routing, RoutingRecord, moe

D, E = 8, 6
SUMS = ("counts", "k_histogram", "tokens", "unrouted_tokens", "unrouted_sum", "unrouted_norm")


def layer_with(gate: Any = None, **given: Any) -> Any:
    """A layer whose thresholds leave some tokens unrouted."""
    gate = {"type": "top_any", "max_expert_num": E} if gate is None else gate
    layer = moe.moe_layer(gate, D, {"num_experts_per_device": 4, "hidden_size_per_expert": 5}, seeds=(1, 2), **given)
    with torch.no_grad():
        layer.gates[0].gates.fill_(0.3)
    return layer


def tokens(T: int = 30, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routing_of(assigned: list[list[bool]] | Tensor) -> Routing:
    return Routing.from_assignments(torch.as_tensor(assigned, dtype=torch.bool))


def unrouted(T: int) -> Routing:
    return routing_of(torch.zeros(T, E))


class TestSums:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("T", [0, 1, 33])
    def test_one_batch(self, T: int, dtype: torch.dtype) -> None:
        x_TD = tokens(T, dtype=dtype)
        assigned_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(1)) > 0.7
        assigned_TE[:, 2] = False
        record = RoutingRecord(E, D)
        record.add(x_TD, routing_of(assigned_TE))
        lost_T = ~assigned_TE.any(1)
        assert record.counts.tolist() == assigned_TE.sum(0).tolist()
        assert record.k_histogram.tolist() == torch.bincount(assigned_TE.sum(1), minlength=E + 1).tolist()
        assert (int(record.tokens), int(record.unrouted_tokens)) == (T, int(lost_T.sum()))
        assert torch.allclose(record.unrouted_sum, x_TD[lost_T].float().sum(0), atol=1e-5)
        assert float(record.unrouted_norm) == pytest.approx(float(x_TD[lost_T].float().norm(dim=1).sum()), rel=1e-5)
        assert record.mean_k == pytest.approx(float(assigned_TE.sum(1).float().mean()) if T else 0.0)
        for name in ("counts", "k_histogram", "tokens", "unrouted_tokens"):
            assert getattr(record, name).dtype == torch.int64
        for name in ("unrouted_sum", "unrouted_norm", "unrouted_sample"):
            assert getattr(record, name).dtype == torch.float32

    def test_a_window_sums_its_batches(self) -> None:
        parts, whole = RoutingRecord(E, D), RoutingRecord(E, D)
        x_TD, assigned_TE = tokens(), torch.rand(30, E, generator=torch.Generator().manual_seed(1)) > 0.8
        for rows in (slice(0, 7), slice(7, 7), slice(7, 30)):
            parts.add(x_TD[rows], routing_of(assigned_TE[rows]))
        whole.add(x_TD, routing_of(assigned_TE))
        for name in SUMS:
            assert torch.allclose(getattr(parts, name).double(), getattr(whole, name).double(), rtol=1e-5), name

    def test_eval_fallbacks_count_as_assignments_and_as_unrouted(self) -> None:
        """Counts include fallbacks; unrouted tokens and k follow the thresholds alone."""
        layer, x_TD = layer_with().eval(), tokens()
        record = RoutingRecord(E, D)
        routing = layer.route(x_TD)
        record.add(x_TD, routing)
        assert int(record.counts.sum()) == int(routing.num_assignments)
        lost = int(routing.unrouted.sum())
        assert lost > 0
        assert int(record.unrouted_tokens) == lost == int(record.k_histogram[0])

    def test_what_routed_tokens_hold_does_not_reach_the_sum(self) -> None:
        record, x_TD = RoutingRecord(E, D), tokens(3)
        x_TD[0], x_TD[1] = float("inf"), float("nan")
        record.add(x_TD, routing_of([[True] * E, [True] * E, [False] * E]))
        assert torch.equal(record.unrouted_sum, x_TD[2])

    def test_nothing_of_the_graph_is_kept(self) -> None:
        """Regression: a record that held x with its graph kept all activations of the window alive."""
        layer, kept = layer_with(), []
        layer.begin_record_routing()
        layer.record.keep_tokens = 5
        for seed in range(3):
            x = tokens(seed=seed).requires_grad_()
            hidden = x * 2
            kept.append(weakref.ref(hidden))
            layer(hidden)
        del x, hidden
        layer(tokens())  # l_aux of the last forward holds its own graph
        gc.collect()
        assert [ref() for ref in kept] == [None] * 3
        for name in (*SUMS, "unrouted_sample"):
            assert not getattr(layer.record, name).requires_grad

    def test_reset_empties_everything(self) -> None:
        record = RoutingRecord(E, D, keep_tokens=3)
        fresh = record.state_dict()
        record.add(tokens(), unrouted(30))
        record.reset()
        for name, value in record.state_dict().items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(fresh[name])), name
        assert record.keep_tokens == 3


class TestSample:
    @pytest.mark.parametrize("keep", [1, 2, 7, 30, 31, 1000])
    @pytest.mark.parametrize("total", [0, 1, 30, 61, 500])
    def test_even_stride(self, total: int, keep: int) -> None:
        record, x_TD = RoutingRecord(E, D, keep), tokens(total)
        record.add(x_TD, unrouted(total))
        stride = 1
        while -(-total // stride) > keep:
            stride *= 2
        assert torch.equal(record.unrouted_sample, x_TD[::stride])

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 20))
    def test_the_batches_do_not_matter(self, sizes: list[int], keep: int) -> None:
        x_TD = tokens(sum(sizes))
        whole, parts = RoutingRecord(E, D, keep), RoutingRecord(E, D, keep)
        whole.add(x_TD, unrouted(len(x_TD)))
        for part in x_TD.split(sizes) if sizes else ():
            parts.add(part, unrouted(len(part)))
        assert torch.equal(whole.unrouted_sample, parts.unrouted_sample)
        assert len(parts.unrouted_sample) <= keep

    def test_only_unrouted_tokens(self) -> None:
        record, x_TD = RoutingRecord(E, D, 100), tokens()
        assigned_TE = torch.zeros(30, E)
        assigned_TE[::3, 1] = 1
        record.add(x_TD, routing_of(assigned_TE))
        lost = [t for t in range(30) if t % 3]
        assert torch.equal(record.unrouted_sample, x_TD[lost])

    @pytest.mark.parametrize("most", [0, 1, 7, 30, 100])
    def test_another_limit_within_a_window(self, most: int) -> None:
        record, x_TD = RoutingRecord(E, D, 30), tokens()
        record.add(x_TD, unrouted(30))
        record.keep_tokens = most
        stride = 1
        while most and -(-30 // stride) > most:
            stride *= 2
        assert torch.equal(record.unrouted_sample, x_TD[::stride] if most else x_TD[:0])
        record.add(x_TD, unrouted(30))
        assert len(record.unrouted_sample) <= most

    @pytest.mark.parametrize("most", [-1, 1.5, None, "3"])
    def test_a_limit_that_is_none_is_refused(self, most: Any) -> None:
        with pytest.raises(ValueError, match="keep_tokens"):
            RoutingRecord(E, D).keep_tokens = most
        with pytest.raises(ValueError, match="keep_tokens"):
            RoutingRecord(E, D, most)

    def test_none_without_keep_tokens(self) -> None:
        record = RoutingRecord(E, D)
        record.add(tokens(), unrouted(30))
        assert record.unrouted_sample.shape == (0, D)


class TestState:
    @pytest.mark.parametrize("keep", [0, 4])
    def test_a_loaded_window_goes_on_as_the_saved_one(self, keep: int) -> None:
        first, second = RoutingRecord(E, D, keep), RoutingRecord(E, D, keep)
        x_TD, assigned_TE = tokens(90), torch.rand(90, E, generator=torch.Generator().manual_seed(1)) > 0.8
        first.add(x_TD[:50], routing_of(assigned_TE[:50]))
        state = first.state_dict()
        second.load_state_dict(state)
        before = copy.deepcopy(state)
        for record in (first, second):
            record.add(x_TD[50:], routing_of(assigned_TE[50:]))
        for name in (*SUMS, "unrouted_sample"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
            assert torch.equal(state[name], before[name]), "what was saved must not change with the record"

    def test_of_plain_values(self) -> None:
        state = RoutingRecord(E, D).state_dict()
        assert all(isinstance(value, Tensor | int) for value in state.values())

    @pytest.mark.parametrize("name", [*SUMS, "unrouted_sample", "stride", "seen"])
    def test_an_entry_that_is_missing_is_named(self, name: str) -> None:
        state = RoutingRecord(E, D).state_dict()
        del state[name]
        with pytest.raises(ValueError, match=name):
            RoutingRecord(E, D).load_state_dict(state)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"counts": torch.zeros(E + 1)}, ["counts", "[7]", "[6]"]),
            ({"k_histogram": torch.zeros(E)}, ["k_histogram", "[6]", "[7]"]),
            ({"unrouted_sum": torch.zeros(D + 1)}, ["unrouted_sum", "[9]", "[8]"]),
            ({"unrouted_sample": torch.zeros(3, D + 1)}, ["unrouted_sample", "[3, 9]"]),
            ({"tokens": torch.zeros(2)}, ["tokens", "[2]"]),
            ({"counts": [0] * E}, ["counts", "list"]),
            ({"tokens": None}, ["tokens"]),
        ],
    )
    def test_an_entry_that_does_not_fit_is_refused(self, change: dict[str, Any], said: list[str]) -> None:
        record = RoutingRecord(E, D)
        record.add(tokens(), unrouted(30))
        before = record.state_dict()
        with pytest.raises(ValueError) as error:
            record.load_state_dict({**RoutingRecord(E, D).state_dict(), **change})
        for word in said:
            assert word in str(error.value)
        for name in SUMS:
            assert torch.equal(record.state_dict()[name], before[name]), "a failed load must change nothing"

    def test_all_reduce_without_other_ranks_does_nothing(self) -> None:
        record = RoutingRecord(E, D, 4)
        record.add(tokens(), unrouted(30))
        before = record.state_dict()
        record.all_reduce()
        for name in (*SUMS, "unrouted_sample"):
            assert torch.equal(record.state_dict()[name], before[name])


class TestWindowsOfALayer:
    def test_upstreams_methods(self) -> None:
        layer, x_TD = layer_with(), tokens()
        assert not layer.record_routing
        layer(x_TD)
        assert int(layer.record.tokens) == 0
        layer.begin_record_routing()
        assert layer.record_routing
        assert layer.get_sample_records() is None
        routing = layer.route(x_TD)  # the gate alone is not a forward
        layer(x_TD)
        assert int(layer.record.tokens) == 30
        assert torch.equal(layer.get_routing_records(), routing.counts)
        assert layer.get_routing_records().dtype == torch.int64
        assert torch.allclose(layer.get_sample_records(), x_TD[routing.unrouted].sum(0), atol=1e-5)
        layer.end_record_routing()
        layer(x_TD)
        assert int(layer.record.tokens) == 30
        layer.reset_record_routing()
        assert int(layer.record.tokens) == 0
        assert not layer.record_routing

    def test_beginning_again_starts_anew(self) -> None:
        layer = layer_with()
        layer.begin_record_routing()
        layer(tokens())
        layer.begin_record_routing()
        layer(tokens(4))
        assert int(layer.record.tokens) == 4

    def test_what_is_read_does_not_change_with_later_forwards(self) -> None:
        """Experiments keep a window's records while the next window runs."""
        layer = layer_with()
        layer.begin_record_routing()
        layer(tokens())
        counts, sample = layer.get_routing_records(), layer.get_sample_records()
        saved = counts.clone(), sample.clone()
        layer(tokens(seed=1))
        assert torch.equal(counts, saved[0])
        assert torch.equal(sample, saved[1])

    def test_eval_forwards_only_if_asked(self) -> None:
        """Regression for upstream's defect D12: the statistics included test data."""
        layer, x_TD = layer_with(), tokens()
        layer.begin_record_routing()
        layer.eval()(x_TD)
        assert int(layer.record.tokens) == 0
        layer.begin_record_routing(record_eval=True)
        layer(x_TD)
        layer.train()(x_TD)
        assert int(layer.record.tokens) == 60
        layer.begin_record_routing()
        layer.eval()(x_TD)
        assert int(layer.record.tokens) == 0

    def test_the_record_follows_the_layer_in_dtype(self) -> None:
        layer = layer_with().bfloat16()
        layer.begin_record_routing()
        layer(tokens(dtype=torch.bfloat16))
        assert layer.record.unrouted_sum.dtype == torch.float32
        assert layer.get_sample_records().dtype == torch.float32

    @pytest.mark.parametrize("gate", [{"type": "top", "k": 2}, {"type": "cosine_top", "k": 2}])
    def test_fixed_k_is_recorded_too(self, gate: dict[str, Any]) -> None:
        layer = moe.moe_layer(gate, D, {"num_experts_per_device": 4, "hidden_size_per_expert": 5})
        layer.begin_record_routing()
        layer(tokens())
        assert int(layer.get_routing_records().sum()) == 60
        assert layer.record.mean_k == 2.0
        assert layer.get_sample_records() is None
