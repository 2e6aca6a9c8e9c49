"""Growing and pruning by the layer's methods, against the oracle's adaptive process."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from helpers import FFN, FP32, LLAMA, MARGIN, Case, make_case, margin, oracle_gate, relative_rms
from torch import Tensor

from dynmoe_tutel import moe

ACTIVE = ([0, 1, 3, 4], [0, 1, 2, 3, 4, 5], [2], [1, 5])
SEEDS = range(10)


def update_case(seed: int, kind: str = "ffn", batches: int = 3, T: int = 5) -> tuple[Case, list[Tensor]]:
    """A layer of six slots and a window of a few small batches: some experts silent, some tokens unrouted."""
    case = make_case(E=6, active=ACTIVE[seed % len(ACTIVE)], G=(0.1, 0.5), kind=kind, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    T = 40 if seed == 9 else T  # no silent expert, no free slot
    window = [torch.randn(T, case.x.shape[1], generator=generator) for _ in range(batches)]
    assert margin(torch.cat(window).double(), case.gate) >= MARGIN
    return case, window


@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_update_is_the_oracle_s(seed: int, kind: str) -> None:
    """Mask, routing vectors, thresholds, copied expert, counts and report match; everything else stays bitwise."""
    case, batches = update_case(seed, kind)
    layer, names = case.layer, LLAMA if kind == "llama_ffn" else FFN
    before = copy.deepcopy(layer.state_dict())
    layer.train().begin_record_routing()
    for x_TD in batches:
        layer(x_TD)
    gate, pruned, slot, parent = oracle.adapt([x_TD.double() for x_TD in batches], case.gate)
    changes = layer.adaptive_update_experts()
    assert [(change.slot, change.action) for change in changes] == [
        *((e, "pruned") for e in pruned),
        *([] if slot is None else [(slot, "grown")]),
    ]
    found = oracle_gate(layer.gates[0])
    assert list(found.active) == list(gate.active)
    assert layer.num_global_experts == len(gate.active)
    assert torch.equal(found.G_E, gate.G_E)
    for e in range(6):
        if e == slot:
            assert relative_rms(found.w_DE[:, e], gate.w_DE[:, e]) < FP32
        else:
            assert torch.equal(found.w_DE[:, e], case.gate.w_DE[:, e])
        for name in names:
            origin = parent if e == slot else e
            assert torch.equal(getattr(layer.experts, name)[e], before[f"experts.{name}"][origin])
    assert layer.record_routing, "recording goes on, as upstream"


def test_the_updates_above_are_of_every_kind() -> None:
    """The updates above cover every combination of (pruned, grew, grew into a slot that it pruned)."""
    seen = set()
    for seed in SEEDS:
        case, batches = update_case(seed)
        _, pruned, slot, _ = oracle.adapt([x_TD.double() for x_TD in batches], case.gate)
        seen.add((bool(pruned), slot is not None, slot in pruned))
    assert seen == {(True, True, False), (True, True, True), (False, True, False), (False, False, False)}


def test_the_record_is_the_oracle_s_count() -> None:
    case, batches = update_case(0, batches=4, T=11)
    case.layer.train().begin_record_routing()
    for x_TD in batches:
        case.layer(x_TD)
    x_TD = torch.cat(batches).double()
    a_TE = oracle.assignments(x_TD, case.gate)
    k_T, record = a_TE.sum(dim=1), case.layer.record
    assert record.counts.dtype == torch.int64
    assert torch.equal(record.counts, a_TE.sum(dim=0))
    assert torch.equal(case.layer.get_routing_records(), a_TE.sum(dim=0))
    assert (int(record.tokens), int(record.unrouted_tokens)) == (44, int((k_T == 0).sum()))
    assert torch.equal(record.k_histogram, torch.bincount(k_T, minlength=7))
    assert record.mean_k == pytest.approx(float(k_T.double().mean()))
    assert record.unrouted_sum.dtype == torch.float32
    assert relative_rms(record.unrouted_sum, x_TD[k_T == 0].sum(dim=0)) < FP32
    assert relative_rms(case.layer.get_sample_records(), x_TD[k_T == 0].sum(dim=0)) < FP32
    assert relative_rms(record.unrouted_norm, x_TD[k_T == 0].norm(dim=1).sum()) < FP32


def test_update_needs_an_open_window_and_thresholds() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="no record window is open: call begin_record_routing"):
        case.layer.adaptive_update_experts()
    with pytest.raises(ValueError, match="gate_index = 1: this layer has gates 0 to 0"):
        case.layer.adaptive_update_experts(gate_index=1)
    fixed = moe.moe_layer("top", 4, {"hidden_size_per_expert": 4})
    fixed.begin_record_routing()
    with pytest.raises(ValueError, match="gate 0 is a TopKGate, whose number of experts is fixed"):
        fixed.adaptive_update_experts()
