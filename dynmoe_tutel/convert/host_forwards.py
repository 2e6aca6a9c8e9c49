"""Finds the forward of a host module that a call inside it belongs to, also where a backward repeats the call.

Autograd numbers its nodes in the order in which a thread makes them, and a forward knows the first and the last of its
own. Gradient checkpointing of either kind repeats a call while the backward is at a node of the original forward, whose
number says which forward that was.

A backward inside a repeated region (checkpointing within reentrant checkpointing) is at nodes that the recompute made.
It belongs to the forward that the outer backward was repeating.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

NO_TASK = -1  # torch's number of "no backward is running"


class Forward:
    """One forward of a host: its mask [B, L] bool or None, and the numbers of its autograd nodes, first <= n < end.

    `task` is the backward in which it ran. Its graph's nodes hold it, so that it is freed with them. Where the host is
    compiled, nobody reads numbers when it starts and ends: `end` is 0.
    """

    def __init__(self, mask_BL: Tensor | None) -> None:
        self.mask_BL = mask_BL
        self.task = NO_TASK
        self.first: int | None = None
        self.end = 0

    def holds(self, number: int) -> bool:
        """Whether this forward made the node of that number."""
        return self.first is not None and self.first <= number < self.end

    def live_with(self, tensor: object) -> None:
        """Stay alive as long as the graph of `tensor`, if this forward made it."""
        node = tensor.grad_fn if isinstance(tensor, Tensor) else None
        if node is not None and node._sequence_nr() >= (self.first or 0):
            node.metadata[self] = True  # type: ignore[index]


class HostForwards:
    """The forwards of one host whose graphs are alive. `begin` and `end` are called around each."""

    def __init__(self) -> None:
        self._running: Forward | None = None
        self._newest: Forward | None = None  # held here: its output may be of a kind that cannot be read
        self._alive: WeakSet[Forward] = WeakSet()
        self._last_number = 0  # of the forwards so far: their last node,
        self._masked = False  # and whether one had a mask
        self._repeated: dict[int, Forward | None] = {}  # by running backward: the forward that it last repeated

    def __reduce__(self) -> Any:
        return HostForwards, ()  # a copy of the host has run no forward

    def begin(self, mask_BL: Tensor | None) -> None:
        """A forward of the host starts."""
        forward = self._running = Forward(mask_BL)
        if torch.compiler.is_compiling():
            return
        forward.task, forward.first = torch._C._current_graph_task_id(), torch.autograd._get_sequence_nr()
        forward.end = sys.maxsize
        self._alive.add(forward)
        if forward.task == NO_TASK:
            self._repeated.clear()  # a backward that failed leaves its entry

    def end(self, output: object) -> None:
        """The forward ends, with `output` or by an exception (None)."""
        forward, self._running = self._running, None
        if forward is None:
            return
        if torch.is_grad_enabled():
            self._newest = forward
        if torch.compiler.is_compiling() or forward.end == 0:
            return
        forward.end = torch.autograd._get_sequence_nr()
        if torch.is_grad_enabled():
            self._note(forward, forward.end)
            for leaf in _leaves(output):
                forward.live_with(leaf)

    def of_this_call(self) -> Forward | None:
        """The forward that the calling module's forward belongs to; None outside of all.

        RuntimeError in a recompute of a forward that was forgotten, because nothing of its output was held.
        """
        running = self._running
        if torch.compiler.is_compiling():
            return running
        task = torch._C._current_graph_task_id()
        if running is not None and running.task == task:
            if running.end == 0:  # it made no node before the last call of the forward before
                running.first = self._last_number if running.first is None else running.first
                self._note(running, torch.autograd._get_sequence_nr())
            found: Forward | None = running
        else:
            found = None if task == NO_TASK else self._of_recompute(task)
        if task != NO_TASK:
            if task not in self._repeated:
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._over(task))
            self._repeated[task] = found
        return found

    def _over(self, task: int) -> None:
        """That backward is over."""
        self._repeated.pop(task, None)

    def _note(self, forward: Forward, number: int) -> None:
        """The forward made nodes below `number`."""
        self._last_number = number
        self._masked = self._masked or forward.mask_BL is not None

    def _of_recompute(self, task: int) -> Forward | None:
        """The forward that made the node at which the backward `task` is."""
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        number = node._sequence_nr()
        outer = max((other for other in self._repeated if other < task), default=NO_TASK)
        for forward in self._alive:  # numbers are a thread's own: compare those of one backward, or of none
            if forward.task == outer and forward.holds(number):
                return forward
        if outer != NO_TASK:
            return self._repeated[outer]
        newest = self._newest
        if newest is not None and newest.end == 0 and number >= (newest.first or 0):
            return newest
        if self._masked and number < self._last_number:
            raise RuntimeError(
                "gradient checkpointing repeats a forward whose attention mask is gone: hold an output of it until "
                "the backward (tensors in tuples, lists, dicts and dataclasses count), or run the backward before the "
                "next forward, as a model under torch.compile needs it"
            )
        return None


def _leaves(output: object) -> Iterator[object]:
    """What an output holds; dataclasses too, which pytree does not open."""
    for leaf in tree_leaves(output):
        if dataclasses.is_dataclass(leaf):
            for field in dataclasses.fields(leaf):
                yield from _leaves(getattr(leaf, field.name))
        else:
            yield leaf
