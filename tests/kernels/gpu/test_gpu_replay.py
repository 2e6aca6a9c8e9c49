"""Tests without a GPU that a bounded or full capacity works in a CUDA graph: a tape of one step replaces the graph.

The tape holds every torch operation and Triton launch of a step with its buffers, as a graph holds addresses, and
refuses calls that would wait for a device. A replay on other data in the same buffers must be right; it would not be if
a size, a grid or a branch came from the first batch. `tests/gpu` tests the same with real CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers import FP32, HAS_GPU, make_case, relative_rms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor
from waiting import look_at_no_value, refuse_reads, refuse_waiting

from dynmoe_tutel.kernels.operation import OPERATIONS

pytestmark = pytest.mark.skipif(HAS_GPU, reason="a GPU has graphs")
aten = torch.ops.aten


@lru_cache
def implementation(name: str) -> Callable[..., Any]:
    """The operation's GPU implementation: its Triton kernels, or else torch operations."""
    declared = OPERATIONS[name]
    triton = declared.engines.get("triton")
    return declared.run if triton is None else lambda *args: triton(*declared.grouped(args))


class Tape(TorchDispatchMode):
    """Records the tensor operations inside, to repeat them in the same buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "dynmoe_tutel":
            with self:
                return implementation(func.name().split("::")[1])(*args, **kwargs)
        refuse_waiting(func, args)
        made = func(*args, **kwargs)
        self.steps.append(lambda: _refill(made, func(*args, **kwargs)))
        return made

    def launch(self, run: Callable[[], None]) -> None:
        """Run a Triton launch and keep it."""
        with _disable_current_modes():
            run()
        self.steps.append(run)

    def replay(self) -> None:
        with torch.no_grad():
            for step in self.steps:
                step()


def _refill(made: Any, again: Any) -> None:
    """Copy an operation's new results to its old buffers; views and in-place results are already there."""
    for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
        if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
            old.copy_(new)


@contextmanager
def taped(tape: Tape) -> Iterator[None]:
    """Record what runs inside on `tape`."""
    run = GridExecutor.__call__
    with pytest.MonkeyPatch.context() as patch, tape:
        patch.setattr(GridExecutor, "__call__", lambda *args, **given: tape.launch(lambda: run(*args, **given)))
        look_at_no_value(patch)
        refuse_reads(patch)
        yield


def on_tape(call: Callable[[], Any]) -> tuple[Tape, Any]:
    """A tape of the call, and its result."""
    tape = Tape()
    with taped(tape):
        return tape, call()


def step(layer: Any, x: Tensor, dy: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Output, auxiliary loss and every gradient."""
    y = layer(x, token_mask=mask)
    grads = torch.autograd.grad((y, y.l_aux), [x, *layer.parameters()], (dy, torch.ones_like(y.l_aux)))
    return [y.detach(), y.l_aux.detach(), *grads]


@pytest.mark.parametrize(
    ("capacity", "training", "kind"), [(0.7, True, "ffn"), (0.7, False, "llama_ffn"), ("full", True, "ffn")]
)
def test_replays_on_other_data_are_right(capacity: float | str, training: bool, kind: str, poisoned: None) -> None:
    """Batches of very different A: random ones, none routed, all along one routing vector, nearly all of it padding."""
    T, D, E = 20, 16, 5
    case = make_case(T, D, 12, E, kind=kind, activation=torch.nn.functional.silu, capacity=capacity, G=(0.0, 0.2))
    layer = case.layer.train(training)
    # to warn, a CPU reads the counts; a GPU reads copies of them at later steps
    layer._count_dropped = layer.dropped_assignments.add_
    layer._silence.see = lambda routing: None
    x, dy, mask = case.x.clone().requires_grad_(), case.dy.clone(), torch.arange(T) % 7 > 0
    layer.begin_record_routing()
    tape, static = on_tape(lambda: step(layer, x, dy, mask))
    w = layer.gates[0].sim_matrix.detach()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(T, D, generator=generator), mask.clone()),
        (-w.sum(dim=1).expand(T, -1), mask.clone()),
        (w[:, :1].t() + 0.1 * torch.randn(T, D, generator=generator), torch.ones(T, dtype=torch.bool)),
        (30 * torch.randn(T, D, generator=generator), torch.arange(T) == T - 1),
        (torch.randn(T, D, generator=generator), torch.zeros(T, dtype=torch.bool)),
    ]
    dropped = []
    for tokens, real in batches:
        with torch.no_grad():
            x.copy_(tokens), dy.normal_(generator=generator), mask.copy_(real)
        for tensor in static:
            tensor.fill_(torch.nan)
        layer.dropped_assignments.zero_(), layer.begin_record_routing()
        tape.replay()
        found = [tensor.clone() for tensor in static], int(layer.dropped_assignments)
        layer.dropped_assignments.zero_()
        expected = step(layer, x, dy, mask), int(layer.dropped_assignments)
        dropped.append(expected[1])
        assert found[1] == expected[1]
        for a, b in zip(found[0], expected[0], strict=True):
            assert relative_rms(a, b, 1e-3) < 10 * FP32
    assert any(dropped) == (capacity == 0.7)


def test_the_tape_sees_waiting() -> None:
    for waits in (lambda t: t.item(), bool, int, lambda t: t.tolist(), lambda t: t.nonzero(), lambda t: t[t > 0]):
        with pytest.raises(AssertionError, match="waits"):
            on_tape(lambda waits=waits: waits(torch.ones(1)))
    layer = make_case(capacity="exact").layer
    with pytest.raises(AssertionError, match="waits"):
        on_tape(lambda: layer(torch.randn(3, 16)))
