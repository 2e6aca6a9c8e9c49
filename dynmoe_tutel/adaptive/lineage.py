"""`Lineage`: the deep copies of a layer. Those that are averages of its weights follow its growth and pruning.

An average (torch's AveragedModel, timm's ModelEmaV3, a loop of one's own) is a deep copy into which somebody else
writes, tensor by tensor. It would mix a grown expert with what the slot held before, and masks of 0 with masks of 1.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..validation import has_no_data

_log = logging.getLogger("dynmoe_tutel")

GateSlot = tuple[int, int]  # the index of a gate, a slot


class Lineage:
    """What a layer knows of its deep copies, and of itself as a copy. In a copy or a pickle of the layer it is empty.

    A copy is an average if its weights have changed since it was copied or loaded and it was not trained: no gradient
    reached it. Other copies (a snapshot, a second model) keep their bits. A copy that is written to only after a change
    follows at the next `follow`.
    """

    def __init__(self) -> None:
        self.trained = False
        self._copies: list[weakref.ref[Any]] = []
        self._chosen = False  # `_copies` are all averages, and no other copy is added
        self._average = False
        self._behind: set[GateSlot] = set()  # what the original has changed since the copy was made or loaded
        self._as_copied: tuple[int, list[Tensor]] | None = None  # None: this layer is no copy

    def __reduce__(self) -> tuple[type[Lineage], tuple[()]]:
        return Lineage, ()

    def add(self, copied: Any) -> None:
        """Know `copied`, a deep copy of this layer that was just made."""
        copied.lineage._as_copied = _present(copied)
        if not self._chosen:
            self._copies = [known for known in self._copies if known() is not None] + [weakref.ref(copied)]

    def choose(self, averages: Iterable[Any]) -> None:
        """Let exactly these layers follow, whether they are copies or not."""
        self._chosen, self._copies = True, []
        for average in averages:
            average.lineage._average = True
            self._copies.append(weakref.ref(average))

    def settle(self, layer: Any) -> None:
        """Take the weights that `layer`, whose lineage this is, has now for those that were copied."""
        if self._as_copied is not None:
            self._as_copied = _present(layer)
            self._behind.clear()

    @property
    def is_copy(self) -> bool:
        """Whether the layer whose lineage this is was made by `copy.deepcopy`."""
        return self._as_copied is not None

    def watch(self, y: Tensor) -> None:
        """Take the layer for trained once a gradient reaches its output `y`; at once where torch compiles."""
        if torch.compiler.is_compiling():
            self.trained = True
        elif not self.trained:
            y.register_hook(self._reached)

    def _reached(self, _: Tensor) -> None:
        self.trained = True

    def rests(self, layer: Any) -> bool:
        """Whether `layer`, whose lineage this is, is a copy into which nobody has written yet."""
        return self._as_copied is not None and not self._written(layer, by_value=True)

    @torch.no_grad()
    def follow(self, layer: Any, changed: Iterable[GateSlot] = (), by_value: bool = True) -> list[Any]:
        """Give the averages of `layer`, whose lineage this is, its masks and grown experts in the slots `changed`.

        They get what its gates hold too (a budget's shift), at each call. Returns the averages. Without `by_value` a
        copy must be known as one, or torch must have counted a write: that waits for no device, but a write to `.data`
        is not counted.
        """
        self.miss(changed)
        averages = []
        for copied in self._living():
            if not copied.lineage._is_average(layer, copied, by_value):
                continue
            for gate, slot in sorted(copied.lineage._behind):
                _take_slot(layer, copied, gate, slot)
            if copied.lineage._behind:
                copied._count_experts()
                copied.lineage._behind.clear()
            for of_layer, of_average in _held(layer, copied):
                of_average.copy_(of_layer)
            averages.append(copied)
        return averages

    def miss(self, changed: Iterable[GateSlot], besides: Iterable[Any] = ()) -> None:
        """Note that all copies but those in `besides` have yet to follow these changes."""
        changed, up_to_date = set(changed), {id(copied) for copied in besides}
        for copied in self._living():
            if id(copied) not in up_to_date:
                copied.lineage._behind |= changed

    def _living(self) -> list[Any]:
        return [copied for known in self._copies if (copied := known()) is not None]

    def _is_average(self, layer: Any, copied: Any, by_value: bool) -> bool:
        if self._average:
            return True
        if not by_value and not self._behind and not _held(layer, copied):
            return False
        self.trained = self.trained or any(parameter.grad is not None for parameter in copied.parameters())
        if self.trained or not self._written(copied, by_value) or not alike(layer, copied):
            return False
        _log.info("a deep copy of a layer with %d slots is an average: it follows growth and pruning", layer.slots)
        self._average = True
        return True

    def _written(self, layer: Any, by_value: bool) -> bool:
        assert self._as_copied is not None
        version, router = self._as_copied
        if any(has_no_data(tensor) for tensor in layer.parameters()):
            return False
        if version != _version(layer):
            return True
        now = zip(_router(layer), router, strict=False)
        return by_value and not all(torch.equal(tensor, as_copied.to(tensor)) for tensor, as_copied in now)


def _held(layer: Any, average: Any) -> list[tuple[Tensor, Tensor]]:
    """The state of both layers' gates: it belongs to the weights, and averages of parameters alone leave it out."""
    pairs = zip(layer.held_gates, average.held_gates, strict=True)
    found = [(getattr(one, name), getattr(other, name, None)) for one, other in pairs for name in one.exact_buffers]
    return [(first, second) for first, second in found if first is not None and second is not None]


def alike(layer: Any, other: Any) -> bool:
    """Whether both have the same tensors by name and shape, for the same slots."""
    first, second = (
        (
            each.placement.first,
            each.placement.local,
            [(name, t.shape) for named in (each.named_parameters(), each.named_buffers()) for name, t in named],
        )
        for each in (layer, other)
    )
    return first == second


def _present(layer: Any) -> tuple[int, list[Tensor]]:
    return _version(layer), [tensor.clone() for tensor in _router(layer)]


def _version(layer: Any) -> int:
    """Torch's count of writes to the parameters; a write to `.data` is not in it."""
    return sum(0 if parameter.is_inference() else parameter._version for parameter in layer.parameters())


def _router(layer: Any) -> list[Tensor]:
    return [parameter.detach() for parameter in layer.gates.parameters()]


def _take_slot(layer: Any, average: Any, gate: int, slot: int) -> None:
    """Give the slot the mask of the gate of `layer`, and where that is active the gate's entries and the expert."""
    of_layer, of_average = layer.held_gates[gate], average.held_gates[gate]
    of_average.experts_mask[slot] = of_layer.experts_mask[slot].to(of_average.experts_mask)
    if not bool(of_layer.active()[slot]):
        return
    router = [
        (of_layer.sim_matrix, of_average.sim_matrix, (slice(None), slot)),
        (of_layer.gates, of_average.gates, (slot,)),
    ]
    experts = zip(layer.expert_slots.slot_tensors(slot), average.expert_slots.slot_tensors(slot), strict=True)
    for source, target, index in [*router, *((old, new, index) for (old, index), (new, _) in experts)]:
        target[index] = source[index].to(target)
