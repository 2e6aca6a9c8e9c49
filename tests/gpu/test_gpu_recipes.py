"""The recipes of docs/cuda_graphs.md on a GPU: graphed callables, reduce-overhead, steps repaired after an overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import HALF, relative_rms
from test_gpu_static import STATIC, batch, cuda_only, layer_with, no_waiting
from torch import Tensor, nn

from dynmoe_tutel import OverflowRepair
from dynmoe_tutel.adaptive.policy import Decision

MAX_K = {"type": "top_any", "max_expert_num": 8, "budget": {"target_k": 1.5, "max_k": 3}}


def recording_layer(device: str, capacity: Any) -> Any:
    """A layer with an open window, whose outputs are y and l_aux; capacity None: the room of a budget."""
    more = {"gate": MAX_K} if capacity is None else {}
    layer = layer_with(device, capacity, **more, result_func=lambda y: (y, y.l_aux))
    layer.begin_record_routing()
    return layer


def outcome(layer: Any, forward: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Outputs, all gradients, records and dropped assignments of one step."""
    layer.zero_grad(), layer.reset_record_routing()
    before, x = layer.dropped_assignments.clone(), x.detach().clone().requires_grad_()
    y, l_aux = forward(x)
    torch.autograd.backward((y, l_aux), (dy, torch.ones_like(l_aux)))
    assert all(p.grad is not None for p in layer.parameters())
    found = [y, l_aux, x.grad, *(p.grad for p in layer.parameters())]
    return [t.detach().clone() for t in (*found, *layer.record.tensors(), layer.dropped_assignments - before)]


def batches(layer: Any, device: str) -> list[Tensor]:
    """Batches of very different A."""
    w = layer.gates[0].sim_matrix.detach()
    along, against = w[:, :1].t().expand(600, -1), -w.sum(dim=1).expand(600, -1)
    return [batch(device, seed=1)[0], against, along, 30 * batch(device, seed=2)[0]]


def change_experts(layer: Any) -> None:
    """Prune an expert and grow one in its place."""
    w_D = layer.gates[0].sim_matrix.detach()[:, 2].float()
    assert len(layer.update_experts(Decision([(1, "test")], [(w_D, "test")]))) == 2


class TestGraphedCallables:
    @cuda_only
    @pytest.mark.parametrize("capacity", [*STATIC, None])
    def test_steps_and_growth(self, capacity: Any, device: str) -> None:
        layer = recording_layer(device, capacity)
        eager = type(layer).forward.__get__(layer)
        x, dy = batch(device)
        torch.cuda.make_graphed_callables(layer, (x.detach().clone().requires_grad_(),))
        for tokens in batches(layer, device):
            for a, b in zip(outcome(layer, layer, tokens, dy), outcome(layer, eager, tokens, dy), strict=True):
                assert torch.equal(a, b)
            change_experts(layer)

    @cuda_only
    def test_replays_do_not_wait(self, device: str) -> None:
        layer = recording_layer(device, 2.5)
        x, dy = batch(device)
        torch.cuda.make_graphed_callables(layer, (x.detach().clone().requires_grad_(),))
        with no_waiting():
            for _ in range(3):
                y, l_aux = layer(x)
                torch.autograd.backward((y, l_aux), (dy, torch.ones_like(l_aux)))

    @cuda_only
    def test_autocast(self, device: str) -> None:
        """Weights in fp32, cast inside the graph, so that a replay sees what the optimizer has written."""
        layer = recording_layer(device, 2.5).float()
        eager = type(layer).forward.__get__(layer)
        x, dy = (t.detach().float() for t in batch(device))
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            torch.cuda.make_graphed_callables(layer, (x.clone().requires_grad_(),))
            for _ in range(2):
                for a, b in zip(outcome(layer, layer, x, dy), outcome(layer, eager, x, dy), strict=True):
                    assert torch.equal(a, b)
                with torch.no_grad():
                    for parameter in layer.experts.parameters():
                        parameter.mul_(1.25)


class TestReduceOverhead:
    @cuda_only
    @pytest.mark.slow
    @pytest.mark.parametrize("capacity", [0.7, "full", None])
    def test_steps_and_growth(self, capacity: Any, device: str) -> None:
        """Inductor takes CUDA graphs for the whole step, and nothing is recompiled."""
        torch._dynamo.reset()
        skips = torch._dynamo.utils.counters["inductor"]
        before = skips["cudagraph_skips"]
        layer = recording_layer(device, capacity)
        compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        dy = batch(device)[1]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for tokens in [*batches(layer, device), *batches(layer, device)]:
                torch.compiler.cudagraph_mark_step_begin()
                found = outcome(layer, compiled, tokens, dy)
                for a, b in zip(found, outcome(layer, layer, tokens, dy), strict=True):
                    assert relative_rms(a.cpu(), b.cpu()) < HALF
                change_experts(layer)
        assert skips["cudagraph_skips"] == before
        torch._dynamo.reset()


class TestOverflowRepair:
    def model(self, device: str, capacity: Any) -> nn.Module:
        layers = [layer_with(device, capacity), layer_with(device, capacity)]
        return nn.Sequential(layers[0], nn.Dropout(0.2), layers[1])

    def trained(self, device: str, capacity: Any) -> tuple[list[Tensor], OverflowRepair]:
        """Outputs and gradients of two steps, and the random state after them."""
        model = self.model(device, capacity)
        repair, (x, dy) = OverflowRepair(model), batch(device)
        torch.manual_seed(3)

        def step() -> Tensor:
            y: Tensor = model(x)
            repair.forwards_done()
            torch.autograd.backward((y, y.l_aux), (dy, torch.ones_like(y.l_aux)))
            return y.detach()

        ys = [repair(step) for _ in range(2)]  # gradients of both
        state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
        return [*ys, *(p.grad for p in model.parameters()), state], repair

    def test_a_repeated_step_is_the_exact_step(self, device: str) -> None:
        (found, repair), (expected, never) = self.trained(device, 0.7), self.trained(device, "exact")
        assert (repair.repeated, never.repeated) == (2, 0)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

    @cuda_only
    def test_the_only_wait_is_for_the_flag(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model(device, 2.5)
        repair, (x, dy), waits = OverflowRepair(model), batch(device), []

        def step() -> None:
            y = model(x)
            repair.forwards_done()
            torch.autograd.backward((y, y.l_aux), (dy, torch.ones_like(y.l_aux)))

        repair(step)  # compiles
        waiting = torch.cuda.Event.synchronize

        def wait(event: Any) -> None:
            waits.append(event)
            waiting(event)

        monkeypatch.setattr(torch.cuda.Event, "synchronize", wait)
        with no_waiting():
            for _ in range(3):
                repair(step)
        assert (repair.repeated, len(waits)) == (0, 3)

    @cuda_only
    def test_with_graphed_callables(self, device: str) -> None:
        """A replay is repeated by the layer's own forward."""
        layer = recording_layer(device, 0.7)
        eager = type(layer).forward.__get__(layer)
        x, dy = batch(device)
        torch.cuda.make_graphed_callables(layer, (x.detach().clone().requires_grad_(),))
        repair = OverflowRepair(layer)
        found = repair(lambda: outcome(layer, eager if repair.repeating else layer, x, dy))
        assert repair.repeated == 1
        layer.capacity = "exact"
        for a, b in zip(found, outcome(layer, eager, x, dy), strict=True):
            assert torch.equal(a, b)
