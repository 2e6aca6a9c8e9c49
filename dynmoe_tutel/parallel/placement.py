"""`Placement` says which rank holds which slot; the functions plan growth and swaps from the load of ranks.

Only `Placement` divides slots over ranks. The functions are pure and take integers that are equal on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Placement:
    """`slots` expert slots divided in order over the `ranks` ranks of `group`; `rank` is this process's rank in it.

    A rank holds `local` whole slots in a row from `first`; or, with more ranks than slots, `shards` ranks share a slot.
    Raises ValueError if neither number divides the other.
    """

    slots: int
    group: Any = None
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if max(self.slots, self.ranks) % min(self.slots, self.ranks):
            raise ValueError(
                f"gate_type['max_expert_num'] = {self.slots} slots cannot be divided over the {self.ranks} ranks of "
                f"group: give a multiple of {self.ranks} (or, inside Tutel, a divisor), or a group of fewer ranks. "
                "Without a group, moe_layer takes all ranks of the job, and dynmoe_tutel.MoELayer holds all slots in "
                "each process"
            )

    @classmethod
    def over(cls, slots: int, group: Any) -> Placement:
        """Divide slots over the ranks of `group`; with None, all are in this process."""
        if group is None:
            return cls(slots)
        return cls(slots, group, dist.get_rank(group), dist.get_world_size(group))

    @property
    def local(self) -> int:
        """Number of slots that this rank holds, whole or in part."""
        return max(1, self.slots // self.ranks)

    @property
    def shards(self) -> int:
        """Number of ranks that share one slot."""
        return max(1, self.ranks // self.slots)

    @property
    def first(self) -> int:
        """The first of this rank's slots."""
        return self.rank // self.shards * self.local

    @property
    def blocks(self) -> int:
        """Number of slot blocks between which experts can move: one a rank, or 1 if ranks share slots."""
        return self.ranks if self.shards == 1 else 1

    def owners(self, slot: int) -> list[int]:
        """The ranks of `group` that hold the slot: one, or its shards in order."""
        first = slot // self.local * self.shards
        return list(range(first, first + self.shards))

    def global_rank(self, rank: int) -> int:
        """The global rank of a rank of `group`."""
        return dist.get_global_rank(self.group, rank)

    def at_start(self, experts: int) -> list[bool]:
        """For each slot, whether it is active at start: equally many and the first ones in every block."""
        return [slot % (self.slots // self.blocks) < experts // self.blocks for slot in range(self.slots)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Placement:
        """Itself: it never changes, and a process group cannot be copied."""
        return self

    def __reduce__(self) -> Any:
        """The group of all ranks is pickled by name; TypeError for a group of some, which another process lacks."""
        if self.ranks == 1:
            return Placement, (self.slots,)
        if not dist.is_initialized() or self.group is not dist.group.WORLD:
            raise TypeError(
                "a layer over the group of some ranks cannot be pickled: save its state_dict(), or use "
                "dynmoe_tutel.checkpoint.distributed"
            )
        return _over_all_ranks, (self.slots, self.rank, self.ranks)


def _over_all_ranks(slots: int, rank: int, ranks: int) -> Placement:
    """The placement of a pickled layer; RuntimeError in a process that cannot have it."""
    here = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else None
    if here != (rank, ranks):
        found = "torch.distributed is not initialised" if here is None else f"this is rank {here[0]} of {here[1]}"
        raise RuntimeError(
            f"the pickled layer has one block of its experts, that of rank {rank} of {ranks}, and {found}: load it "
            "there, or save with dynmoe_tutel.checkpoint.distributed, which any number of ranks can load"
        )
    return Placement(slots, dist.group.WORLD, rank, ranks)


def rank_loads(load_E: Sequence[int], ranks: int) -> list[int]:
    """The assignments of each rank, from those of each slot."""
    local = len(load_E) // ranks
    return [sum(load_E[first : first + local]) for first in range(0, ranks * local, local)]


def imbalance(load_E: Sequence[int], ranks: int) -> float:
    """max / mean of the ranks' loads: 1.0 at best, or without load."""
    total = sum(load_E)
    return max(rank_loads(load_E, ranks)) * ranks / total if total else 1.0


def slot_to_grow(free: Sequence[int], load_E: Sequence[int], ranks: int) -> int | None:
    """The free slot of the least loaded rank that has one (lowest slot on ties); None if no slot is free."""
    load_R, local = rank_loads(load_E, ranks), len(load_E) // ranks
    return min(free, key=lambda slot: (load_R[slot // local], slot), default=None)


def plan_swaps(load_E: Sequence[int], ranks: int, threshold: float) -> list[tuple[int, int]]:
    """Pairs of slots to swap, in order, until the imbalance is at most `threshold` or no swap lowers it.

    Greedy: each swap is between the most loaded rank and another, chosen to minimise the larger load of the two (ties:
    lowest slots). Each swap lowers the sum of squared loads, so the search ends. Final swaps that do not lower the
    imbalance are left out.
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
    """The best swap: (slot of the most loaded rank, slot of another); None if no swap lowers the peak."""
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
    """The swaps as one permutation: slot i takes the expert of slot order[i]."""
    order = list(range(slots))
    for a, b in swaps:
        order[a], order[b] = order[b], order[a]
    return order


def spread_swaps(active: Sequence[bool], ranks: int) -> list[tuple[int, int]]:
    """Pairs of slots to swap, in order, until the ranks' numbers of active slots differ by at most one.

    Each swaps the last active slot of the fullest rank with the first inactive slot of the emptiest.
    """
    held, local = list(active), len(active) // ranks
    swaps: list[tuple[int, int]] = []
    while True:
        count_R = rank_loads([int(a) for a in held], ranks)
        full, empty = count_R.index(max(count_R)), count_R.index(min(count_R))
        if count_R[full] - count_R[empty] <= 1:
            return swaps
        a = max(slot for slot in range(full * local, (full + 1) * local) if held[slot])
        b = min(slot for slot in range(empty * local, (empty + 1) * local) if not held[slot])
        held[a], held[b] = held[b], held[a]
        swaps.append((a, b))
