"""Swapping experts between ranks: weights, optimizer rows, gate columns and records, with a report.

`placement` plans the swaps, from numbers that are equal on every rank; this module carries them out. The layer computes
the same function afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.collectives import check_alike
from ..parallel.placement import Placement, imbalance, plan_swaps, slot_order
from .gate_history import GateHistory
from .optimizer_state import OptimizerRows
from .slots import AdaptiveExperts


@dataclass(frozen=True)
class ExpertMove:
    """One active expert that moved to another slot and rank (of the layer's group)."""

    slot: int
    rank: int
    to_slot: int
    to_rank: int

    def __str__(self) -> str:
        return f"expert {self.slot} to slot {self.to_slot} (rank {self.rank} to {self.to_rank})"


@dataclass(frozen=True)
class LayerBalance:
    """One layer: max / mean of the ranks' loads in the last window, the same as expected after it, and the moves."""

    layer: str
    ranks: int
    before: float
    expected: float
    moves: tuple[ExpertMove, ...] = ()

    def __str__(self) -> str:
        name = self.layer or "the layer"
        if not self.moves:
            return f"{name}: nothing moved, load max/mean over {self.ranks} ranks is {self.before:.2f}"
        moved = ", ".join(map(str, self.moves))
        return (
            f"{name}: moved {moved}; load max/mean over {self.ranks} ranks was {self.before:.2f}, "
            f"expected is {self.expected:.2f}"
        )


@dataclass(frozen=True)
class RebalanceReport:
    """The result of `ExpertController.rebalance` after an optimizer step; `str` gives one line a layer."""

    step: int
    layers: tuple[LayerBalance, ...]

    @property
    def moves(self) -> int:
        """Number of experts moved, over all layers."""
        return sum(len(layer.moves) for layer in self.layers)

    def __str__(self) -> str:
        return "\n".join(f"step {self.step}: {layer}" for layer in self.layers)


@torch.no_grad()
def rebalance_layer(histories: Sequence[GateHistory], rows: OptimizerRows, threshold: float) -> LayerBalance:
    """Swap experts of one layer; `histories` are all its adaptive gates. Every rank of its group must call it."""
    layer, name = histories[0].layer, histories[0].name
    place = layer.placement
    load = [sum(counts) for counts in zip(*(history.load for history in histories), strict=True)]
    before = imbalance(load, place.blocks)
    # a fixed-k gate cannot permute its columns, so its experts must stay
    swaps = plan_swaps(load, place.blocks, threshold) if len(histories) == len(layer.gates) else []
    if not swaps:
        return LayerBalance(name, place.blocks, before, before)
    order = slot_order(swaps, layer.slots)
    used = torch.stack([history.active for history in histories]).any(dim=0).tolist()
    averages = layer.lineage.follow(layer)
    rows.drop_histories()
    _exchange_experts(layer, place, rows, averages, order)
    for history in histories:
        _permute_gate(layer.held_gates[history.gate], rows, order)
        history.permute_slots(order)
        for average in averages:
            average.held_gates[history.gate].permute_slots(order)
    swapped = [slot for slot, source in enumerate(order) if slot != source]
    layer.lineage.miss(((history.gate, slot) for history in histories for slot in swapped), besides=averages)
    moves = [
        ExpertMove(source, source // place.local, slot, slot // place.local)
        for slot, source in sorted(enumerate(order), key=lambda pair: pair[1])
        if source != slot and used[source]
    ]
    return LayerBalance(
        name, place.blocks, before, imbalance([load[slot] for slot in order], place.blocks), tuple(moves)
    )


def _permute_gate(gate: Any, rows: OptimizerRows, order: list[int]) -> None:
    """Move column order[i] of the gate and of its optimizer state to column i."""
    order_E = torch.tensor(order, device=gate.experts_mask.device)
    for parameter, first in ((gate.sim_matrix, (slice(None), 0)), (gate.gates, (0,))):
        for tensor, index in ((parameter.detach(), first), *rows.of(parameter, first)):
            tensor.copy_(tensor.index_select(len(index) - 1, order_E))
    gate.experts_mask.copy_(gate.experts_mask[order_E])


def _exchange_experts(
    layer: AdaptiveExperts, place: Placement, rows: OptimizerRows, averages: Sequence[AdaptiveExperts], order: list[int]
) -> None:
    """Move the expert of slot order[i], with its optimizer rows and its averages, to slot i, across ranks.

    One message of raw bytes an expert. Raises ValueError on every rank if ranks hold different tensors.
    """

    def tensors(slot: int) -> list[Tensor]:
        """Views of a slot's state, of its optimizer rows and of its averages on this rank."""
        slots = layer.expert_slots
        of_rows = [
            row[own] for parameter, index in slots.slot_parameters(slot) for row, own in rows.of(parameter, index)
        ]
        layers = (slots, *(average.expert_slots for average in averages))
        return [tensor[index] for each in layers for tensor, index in each.slot_tensors(slot)] + of_rows

    first = tensors(place.first)
    alike = {"an expert with its optimizer state and averages": [(str(t.dtype), tuple(t.shape)) for t in first]}
    hint = "give every rank the same optimizer and averages, and take their first step on all"
    check_alike("rebalance", alike, place.group, hint)
    moved = [(slot, source) for slot, source in enumerate(order) if slot != source]
    leaving = {source: _bytes(tensors(source)) for _, source in moved if source // place.local == place.rank}
    arriving: dict[int, Tensor] = {}
    transfers = []
    for slot, source in moved:
        here, there = slot // place.local, source // place.local
        if place.rank == here:
            arriving[slot] = leaving[source] if here == there else torch.empty_like(_bytes(first))
            if here != there:
                transfers.append(dist.P2POp(dist.irecv, arriving[slot], place.global_rank(there), place.group, slot))
        elif place.rank == there:
            transfers.append(dist.P2POp(dist.isend, leaving[source], place.global_rank(here), place.group, slot))
    for request in dist.batch_isend_irecv(transfers) if transfers else []:
        request.wait()
    for slot, packed in arriving.items():
        views = tensors(slot)
        for view, part in zip(views, packed.split([t.numel() * t.element_size() for t in views]), strict=True):
            view.copy_(part.clone().view(view.dtype).view(view.shape))  # clone: a view as another dtype needs alignment


def _bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenated as uint8, on the device of the first."""
    return torch.cat([t.contiguous().reshape(-1).view(torch.uint8).to(tensors[0].device) for t in tensors])
