"""Slots of experts that are divided over the ranks of a process group: read, copied and drawn anew across ranks.

Every rank of the group must make the same calls in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..experts.base import Experts, SlotParameter


class ShardedSlots:
    """Slot e is on rank e // `local_slots` of `group`; `rank` is this process's rank in it."""

    def __init__(self, experts: Any, group: Any, rank: int, local_slots: int) -> None:
        self._experts: Experts = experts
        self._group, self._rank, self._local = group, rank, local_slots

    def _owners(self, slot: int) -> list[int]:
        """The ranks that hold parts of the slot, in order."""
        return [slot // self._local]

    def _entries(self, slot: int) -> list[SlotParameter]:
        """The parameters, on any rank, with the index that `slot` has on its own rank."""
        return self._experts.slot_parameters(slot % self._local)

    def slot_parameters(self, slot: int) -> list[SlotParameter]:
        """The parameters of this rank that hold the slot; none where other ranks hold it."""
        return self._entries(slot) if self._rank in self._owners(slot) else []

    @torch.no_grad()
    def copy_slot(self, target: int, sources: list[int]) -> None:
        """Fill slot `target` with the mean of the slots `sources`, wherever they are: one source is an exact copy."""
        for shard, owner in enumerate(self._owners(target)):
            for i, (parameter, index) in enumerate(self._entries(target)):
                values = [self._sent(self._owners(s)[shard], *self._entries(s)[i]) for s in sources]
                if self._rank == owner:
                    parameter[index] = values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)

    def _sent(self, owner: int, parameter: nn.Parameter, index: tuple[Any, ...]) -> Tensor:
        """The owner's value, on every rank."""
        value = parameter.detach()[index].clone()
        if self._group is not None:
            dist.broadcast(value, src=dist.get_global_rank(self._group, owner), group=self._group)
        return value

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator) -> None:
        """Draw the slot anew; every rank draws, so that `generator` goes on alike, and the owner keeps it."""
        before = [(p, index, p.detach()[index].clone()) for p, index in self._entries(slot)]
        self._experts.reset_slot(slot % self._local, generator)
        if self._rank not in self._owners(slot):
            for parameter, index, value in before:
                parameter[index] = value
