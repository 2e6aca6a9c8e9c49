"""Where experts live: the load of ranks, the slot that a grown expert takes, and which slots to swap against drift.

Integers that are equal on every rank, and pure functions of them; slot e is on rank e // (slots / ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


def rank_loads(load_E: Sequence[int], ranks: int) -> list[int]:
    """The assignments on each rank, from those of each slot."""
    local = len(load_E) // ranks
    return [sum(load_E[first : first + local]) for first in range(0, ranks * local, local)]


def imbalance(load_E: Sequence[int], ranks: int) -> float:
    """max / mean of the ranks' loads: 1.0 at best, and where there is no load."""
    total = sum(load_E)
    return max(rank_loads(load_E, ranks)) * ranks / total if total else 1.0


def slot_to_grow(free: Sequence[int], load_E: Sequence[int], ranks: int) -> int | None:
    """The free slot of the least loaded rank that has one, of equals the lowest; None where none is free."""
    load_R, local = rank_loads(load_E, ranks), len(load_E) // ranks
    return min(free, key=lambda slot: (load_R[slot // local], slot), default=None)


def plan_swaps(load_E: Sequence[int], ranks: int, threshold: float) -> list[tuple[int, int]]:
    """Pairs of slots to swap, in this order, until the imbalance is at most `threshold` or no swap lowers it.

    Greedy: each swap is between the most loaded rank and another, the one after which the more loaded of the two has
    least (of equals the lowest slots). Each lowers the sum of the squared loads, so the search ends. Swaps at the end
    that did not lower the imbalance are left out, so that nothing moves without a gain.
    """
    load, local = list(load_E), len(load_E) // ranks
    swaps: list[tuple[int, int]] = []
    least, kept = imbalance(load, ranks), 0
    while least > threshold and (swap := _best_swap(load, local)) is not None:
        a, b = swap
        load[a], load[b] = load[b], load[a]
        swaps.append(swap)
        if (now := imbalance(load, ranks)) < least:
            least, kept = now, len(swaps)
    return swaps[:kept]


def _best_swap(load: list[int], local: int) -> tuple[int, int] | None:
    """The slots (of the most loaded rank, of another) whose swap leaves the lower peak; None where none gains."""
    load_R = rank_loads(load, len(load) // local)
    heavy = load_R.index(max(load_R))
    best: tuple[int, int, int] | None = None
    for a in range(heavy * local, (heavy + 1) * local):
        for b, other in enumerate(load):
            less, rank = load[a] - other, b // local
            if rank == heavy or not 0 < less < load_R[heavy] - load_R[rank]:
                continue
            found = (max(load_R[heavy] - less, load_R[rank] + less), a, b)
            best = found if best is None else min(best, found)
    return best and best[1:]


def slot_order(swaps: Sequence[tuple[int, int]], slots: int) -> list[int]:
    """The swaps as one permutation: slot i then holds what slot order[i] held."""
    order = list(range(slots))
    for a, b in swaps:
        order[a], order[b] = order[b], order[a]
    return order


@dataclass(frozen=True)
class ExpertRanks:
    """How the slots of a layer are divided: slot e is on rank e // `local` of `group`, which has `size` ranks."""

    group: Any
    rank: int
    size: int
    local: int

    @classmethod
    def of(cls, layer: Any) -> ExpertRanks:
        """Of a layer whose experts are whole; those that are themselves split over ranks count as one block."""
        size = layer.world_size if layer.sharded_count == 1 else 1
        if size == 1:
            return cls(None, 0, 1, layer.slots)
        group = layer.group or dist.group.WORLD
        return cls(group, dist.get_rank(group), size, layer.slots // size)

    def global_rank(self, rank: int) -> int:
        """The rank in the whole job."""
        return dist.get_global_rank(self.group, rank)
