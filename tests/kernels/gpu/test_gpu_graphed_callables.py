"""`torch.cuda.make_graphed_callables` on a layer, without a GPU: torch's own function, with tapes for its graphs.

What it does with parameters, outputs and gradients is real; `test_gpu_replay` says what a tape proves and what not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import FP32, HAS_GPU, make_case, relative_rms
from test_gpu_replay import Tape, taped
from torch import Tensor

from dynmoe_tutel import OverflowRepair
from dynmoe_tutel.adaptive.policy import Decision

pytestmark = pytest.mark.skipif(HAS_GPU, reason="a GPU has graphs")


@pytest.fixture
def tapes_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tapes in the place of CUDA graphs, and nothing in the place of streams."""

    @contextlib.contextmanager
    def capture(tape: Tape, pool: Any = None) -> Iterator[None]:
        with taped(tape):
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)


def graphed(capacity: float | str, T: int = 12, D: int = 16, E: int = 4) -> tuple[Any, Tensor, Tensor]:
    """A layer whose forward is a graph that was captured with a window open; tokens; an output gradient."""
    case = make_case(T, D, 8, E, activation=torch.nn.functional.gelu, capacity=capacity, G=(0.0, 0.2), active=[0, 1, 2])
    layer = case.layer
    layer.result_func = lambda y: (y, y.l_aux)
    layer._silence.see = lambda routing: None  # a CPU reads at once what a GPU reads late
    layer.drops_are_repaired = True
    layer.begin_record_routing()
    torch.cuda.make_graphed_callables(layer, (case.x.clone().requires_grad_(),))
    return layer, case.x, case.dy


def outcome(layer: Any, forward: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Outputs, all gradients, records and dropped assignments of one step."""
    layer.zero_grad(), layer.reset_record_routing()
    before, x = layer.dropped_assignments.clone(), x.clone().requires_grad_()
    y, l_aux = forward(x)
    ((y * dy).sum() + l_aux).backward()
    found = {"y": y, "l_aux": l_aux, "x": x.grad, "dropped": layer.dropped_assignments - before}
    found |= {name: p.grad for name, p in layer.named_parameters()}
    found |= {f"record {i}": tensor for i, tensor in enumerate(layer.record.tensors())}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert relative_rms(found[name], tensor, 1e-3) < 10 * FP32, name


@pytest.mark.usefixtures("tapes_for_graphs")
def test_steps_growth_and_repair() -> None:
    """Replays give what the layer itself gives: on other data, after pruning and growth; a repair leaves the graph."""
    layer, x, dy = graphed(0.8)
    eager = type(layer).forward.__get__(layer)
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(x.shape, generator=generator)
    dropped = []
    for tokens, decision in ((x, None), (other, Decision([(1, "test")], [(other[0], "test")])), (other, None)):
        found, expected = outcome(layer, layer, tokens, dy), outcome(layer, eager, tokens, dy)
        assert_alike(found, expected)
        assert all(found[name].any() for name, _ in layer.named_parameters())
        dropped.append(int(found["dropped"]))
        if decision is not None:
            assert len(layer.update_experts(decision)) == 2
    assert all(dropped)

    repair = OverflowRepair(layer)

    def step(forward: Any) -> dict[str, Tensor]:
        return outcome(layer, eager if repair.repeating else forward, x, dy)

    found = repair(lambda: step(layer))
    assert repair.repeated == 1
    assert int(found["dropped"]) == 0
    layer.capacity = "exact"
    assert_alike(found, outcome(layer, eager, x, dy))

    # a backward without gradients there makes them the graph's own buffers, to which no second one may add
    layer.capacity = 0.8
    sums = {}
    for forward in (layer, eager):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for tokens in (x, other):
            y, l_aux = forward(tokens.clone().requires_grad_())
            ((y * dy).sum() + l_aux).backward()
        sums[forward is eager] = {name: p.grad for name, p in layer.named_parameters()}
    assert_alike(sums[False], sums[True])
