"""`OverflowRepair`: repeats in "exact" a step whose bounded capacity dropped assignments, with the results of "exact".

So the memory of a step is bounded, nothing waits in its forwards, and no assignment is lost: the host reads one number
a step, which tells it whether to repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adaptive.recording import RecordsRouting
from .gates import Gate
from .layer import MoELayer
from .parallel.collectives import wire_device
from .temporary_hooks import TemporaryHook

R = TypeVar("R")


class OverflowRepair:
    """Calls a step, and calls it again with all capacities "exact" if assignments were dropped.

    ``repair = OverflowRepair(model)``, then in each step ``loss = repair(step)`` and ``optimizer.step()``. `step` takes
    no argument: it runs the forwards and backwards of a batch. Before the repetition all that the step changed is as it
    was: gradients, records, what gates count, buffers and torch's random state. What it returns, and all that it leaves
    behind, is then that of a model with ``capacity="exact"``. `step` must not step the optimizer, and must do the same
    if called twice: it fetches no new batch, and draws from torch's random state alone.

    Layers drop where their `capacity` is a factor. Other layers, and Tutel's `capacity_factor`, do as they always do.

    `group`: the ranks that repeat together, if one of them dropped something; None: all ranks of the job. Each of them
    must make the same calls.
    """

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        self.model, self.group = model, group
        self.steps = 0
        self.repeated = 0  # of `steps`, those that were called twice
        self.repeating = False  # now
        self._before: Tensor | None = None  # the layers' counts of dropped assignments when the step began, [layers]
        self._overflow: Tensor | None = None  # [] int32: above 0 if a rank dropped something; on its way to the host
        self._seen: list[int] = []  # versions of the counts that `_overflow` is of
        self._copied: torch.cuda.Event | None = None  # recorded behind the copy

    def __call__(self, step: Callable[[], R]) -> R:
        """What `step` returns, of its last call. Waits once for the device, or never if no layer has a factor.

        A call within a step of the same object is a part of that step, and repeated with it.
        """
        if self._before is not None:
            return step()
        layers = self._bounded()
        self.steps += 1
        if not layers:
            return step()
        try:
            return self._repaired(step, layers)
        finally:
            self._before = self._overflow = None

    def forwards_done(self) -> None:
        """Start to copy the flag to the host: call it in `step`, between the last forward and its backward.

        The host then waits for the forwards, not for the backward, which keeps the device busy meanwhile. Optional.
        """
        if not self.repeating and self._before is not None:
            self._look(self._bounded())

    def _repaired(self, step: Callable[[], R], layers: list[MoELayer]) -> R:
        """As a call, with the layers that may drop."""
        before = _Before(self.model)
        self._before = _dropped(layers)
        with _quiet(layers):
            result = step()
            if not self._overflowed(layers):
                return result
        del result
        before.restore()
        self._overflow = None
        self.repeated += 1
        with _exact(layers):
            self.repeating = True
            try:
                result = step()
            finally:
                self.repeating = False
            if self._overflowed(layers):
                raise RuntimeError(
                    "a step that was repeated in 'exact' dropped assignments again: it replays a CUDA graph, or a copy "
                    "of the layer. Call the layer itself where repair.repeating is True"
                )
        return result

    def _bounded(self) -> list[MoELayer]:
        """The layers that may drop assignments."""
        layers = [module for module in self.model.modules() if isinstance(module, MoELayer)]
        return [layer for layer in layers if not isinstance(layer.capacity, str)]

    def _look(self, layers: list[MoELayer]) -> None:
        """Make the flag and start its copy to the host."""
        assert self._before is not None
        now = _dropped(layers)
        self._seen = _versions(layers)
        flag = (now != self._before).any().int()
        if dist.is_available() and dist.is_initialized():
            flag = flag.to(wire_device(self.group))
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        if flag.device.type == "cuda":
            with torch.cuda.device(flag.device):
                flag = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()
        self._overflow = flag

    def _overflowed(self, layers: list[MoELayer]) -> bool:
        """Whether a rank has dropped something in this step. Waits for the flag."""
        if self._overflow is None or self._seen != _versions(layers):  # forwards came after `forwards_done`
            self._look(layers)
        return self._read()

    def _read(self) -> bool:
        """The flag, as soon as it is on the host: the one wait of a step."""
        assert self._overflow is not None
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._overflow)


class _Before:
    """What a step changes in a model, as it was before; `restore` writes it back in place, as CUDA graphs need it.

    What a forward only overwrites (losses, a budget's sample) is not in it, nor what only says when a warning comes.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        self._gradients = [(p, p.grad, p.grad.clone()) for p in parameters if p.grad is not None]
        self._without = [p for p in parameters if p.grad is None]
        self._tensors = [(tensor, tensor.clone()) for tensor in _written(model)]
        self._devices = {p.device for p in parameters if p.device.type == "cuda"}
        self._random = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._devices]

    @torch.no_grad()
    def restore(self) -> None:
        """Set all as it was."""
        for parameter, gradient, value in self._gradients:
            parameter.grad = gradient.copy_(value)
        for parameter in self._without:
            parameter.grad = None
        for tensor, value in self._tensors:
            tensor.copy_(value)
        torch.set_rng_state(self._random[0])
        for device, state in zip(self._devices, self._random[1], strict=True):
            torch.cuda.set_rng_state(state, device)


def _written(model: nn.Module) -> Iterator[Tensor]:
    """What forwards write in place: counts of layers, gates and meters, open records, buffers of all other modules."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, TemporaryHook):
                yield from hook.counts()
        if isinstance(module, RecordsRouting) and module.record_routing:  # a layer of Tutel's kind too
            for record in module.records:
                yield from record.tensors()
        if isinstance(module, MoELayer):
            yield module.dropped_assignments
        elif isinstance(module, Gate):
            if (counts := module.step_counts()) is not None:
                yield counts
        else:
            yield from (buffer for buffer in module.buffers(recurse=False) if not _is_expanded(buffer))


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several entries share memory, so that nothing writes them in place."""
    strided = tensor.layout == torch.strided
    return strided and any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _dropped(layers: list[MoELayer]) -> Tensor:
    """The layers' counts of dropped assignments, [layers] int64, on the device of the first."""
    counts = [layer.dropped_assignments for layer in layers]
    return torch.stack([count.to(counts[0].device) for count in counts])


def _versions(layers: list[MoELayer]) -> list[int]:
    """How often torch has written to the counts: it changes with each forward that runs in Python."""
    return [layer.dropped_assignments._version for layer in layers]


@contextmanager
def _quiet(layers: list[MoELayer]) -> Iterator[None]:
    """Let the layers not warn of assignments that they drop."""
    for layer in layers:
        layer.drops_are_repaired = True
    try:
        yield
    finally:
        for layer in layers:
            layer.drops_are_repaired = False


@contextmanager
def _exact(layers: list[MoELayer]) -> Iterator[None]:
    """Let the layers drop nothing."""
    capacities = [layer.capacity for layer in layers]
    for layer in layers:
        layer.capacity = "exact"
    try:
        yield
    finally:
        for layer, capacity in zip(layers, capacities, strict=True):
            layer.capacity = capacity
