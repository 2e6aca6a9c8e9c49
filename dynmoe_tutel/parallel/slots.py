"""Reading, copying and resetting expert slots across ranks.

Every rank of the placement's group must make the same calls in the same order.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..experts.base import SlotParameter, SlotTensor, mean_of
from .placement import Placement


class SlotAccess(Protocol):
    """Reads and writes the expert networks slot by slot, on any rank."""

    def slot_parameters(self, slot: int) -> list[SlotParameter]:
        """The parameters of this rank that hold the slot, each with the index of its entries."""

    def slot_tensors(self, slot: int) -> list[SlotTensor]:
        """All state of the slot on this rank, parameters and then buffers, each with the index of its entries."""

    def check_written(self, init: str = "nearest") -> None:
        """ValueError, by name, if a slot cannot be filled as `init` says: writes would be lost or reach others."""

    def copy_slot(self, target: int, sources: list[int]) -> None:
        """Fill slot `target` with the mean of the slots `sources`: one source is an exact copy."""

    def reset_slot(self, slot: int, generator: torch.Generator) -> None:
        """Draw a slot's weights anew from `generator`, as at construction."""


class ShardedSlots:
    """`SlotAccess` across ranks; `experts` hold this rank's block of `placement`."""

    def __init__(self, experts: Any, placement: Placement) -> None:
        self._experts, self._placement = experts, placement

    def _entries(self, slot: int) -> list[SlotParameter]:
        """The parameters (the same on any rank), each with the index of `slot` on its own rank."""
        entries: list[SlotParameter] = self._experts.slot_parameters(slot % self._placement.local)
        return entries

    def _tensors(self, slot: int) -> list[SlotTensor]:
        """The parameters, detached, and then the buffers, each with the index of `slot` on its own rank."""
        tensors: list[SlotTensor] = self._experts.slot_tensors(slot % self._placement.local)
        return tensors

    def _holds(self, slot: int) -> bool:
        return self._placement.rank in self._placement.owners(slot)

    def slot_parameters(self, slot: int) -> list[SlotParameter]:
        """The parameters of this rank that hold the slot; none if another rank holds it."""
        return self._entries(slot) if self._holds(slot) else []

    def slot_tensors(self, slot: int) -> list[SlotTensor]:
        """All state of the slot on this rank; nothing if another rank holds it."""
        return self._tensors(slot) if self._holds(slot) else []

    def check_written(self, init: str = "nearest") -> None:
        """By the experts of this rank."""
        self._experts.check_written(init)

    @torch.no_grad()
    def copy_slot(self, target: int, sources: list[int]) -> None:
        """Fill slot `target` with the mean of the slots `sources`, on any ranks: one source is an exact copy."""
        owners = self._placement.owners
        for shard, owner in enumerate(owners(target)):
            for i, (tensor, index) in enumerate(self._tensors(target)):
                values = [self._sent(owners(s)[shard], *self._tensors(s)[i]) for s in sources]
                if self._placement.rank == owner:
                    tensor[index] = mean_of(values)

    def _sent(self, owner: int, tensor: Tensor, index: tuple[Any, ...]) -> Tensor:
        """Broadcast the owner's value to every rank."""
        value = tensor[index].clone()
        if self._placement.group is not None:
            sent = value.view(torch.uint8) if value.dtype == torch.bool else value
            dist.broadcast(sent, src=self._placement.global_rank(owner), group=self._placement.group)
        return value

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator) -> None:
        """Draw the slot anew. Every rank draws, to keep `generator` in step; only the owner keeps the weights."""
        before = [(tensor, index, tensor[index].clone()) for tensor, index in self._tensors(slot)]
        self._experts.reset_slot(slot % self._placement.local, generator)
        if not self._holds(slot):
            for tensor, index, value in before:
                tensor[index] = value
