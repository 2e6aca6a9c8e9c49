"""Promises of a bounded or full capacity on a GPU: no waiting for the device, CUDA graphs; compilation; memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import HALF, relative_rms
from torch import Tensor

from dynmoe_tutel import kernels, moe
from dynmoe_tutel.adaptive import Budgets

STATIC = [2.5, 0.7, "full"]  # 0.7 drops assignments
cuda_only = pytest.mark.cuda_only


def layer_with(
    device: str,
    capacity: float | str | None = "exact",
    *,
    kind: str = "ffn",
    D: int = 128,
    H: int = 256,
    E: int = 8,
    **more: Any,
) -> Any:
    """A bf16 layer whose tokens take about two of E experts."""
    experts = {"type": kind, "num_experts_per_device": E, "hidden_size_per_expert": H, **more.pop("experts", {})}
    if kind == "ffn":
        experts.setdefault("activation_fn", F.gelu)
    gate = more.pop("gate", {"type": "top_any", "max_expert_num": E})
    layer = moe.moe_layer(gate, D, experts, seeds=(1, 2), capacity=capacity, **more)
    with torch.no_grad():
        layer.gates[0].gates.fill_(0.67 * D**-0.5)  # a quarter of the cosines pass
    return layer.to(device, torch.bfloat16)


def batch(device: str, T: int = 600, D: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and an output gradient, bf16."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(T, D, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    return x.requires_grad_(), dy


OTHERS = ("fixed k", "custom activation", "token mask")


def other_layer(name: str, device: str) -> tuple[Any, Tensor | None]:
    """A layer that runs other kernels, and its token mask."""
    mask = torch.arange(600, device=device) % 4 > 0 if name == "token mask" else None
    if name == "fixed k":
        layer = moe.moe_layer(
            {"type": "top", "k": 2},
            128,
            {"type": "ffn", "num_experts_per_device": 8, "hidden_size_per_expert": 256, "activation_fn": F.gelu},
            seeds=(1, 2),
            capacity="full",
        )
        return layer.to(device, torch.bfloat16), mask
    experts = {"activation_fn": torch.tanh} if name == "custom activation" else {}
    return layer_with(device, 2.5, experts=experts), mask


def step(layer: Any, x: Tensor, dy: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Output, auxiliary loss and every gradient."""
    y = layer(x) if mask is None else layer(x, token_mask=mask)
    grads = torch.autograd.grad((y, y.l_aux), [x, *layer.parameters()], (dy, torch.ones_like(y.l_aux)))
    return [y.detach(), y.l_aux.detach(), *grads]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make any call that waits for the device raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of the call, after three warm-up calls on a side stream, and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = call()
    return graph, static


@cuda_only
def test_tensors_on_a_device_that_is_not_the_current_one(device: str) -> None:
    """The engine makes the tensors' device current, since Triton launches on the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for where in ("cuda:0", "cuda:1"):
        layer = layer_with(where)
        assert torch.cuda.current_device() == 0
        results.append(step(layer, *batch(where)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0


class TestNoWaiting:
    @cuda_only
    @pytest.mark.parametrize("recording", [False, True])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    @pytest.mark.parametrize("capacity", STATIC)
    def test_forward_and_backward(
        self, capacity: float | str, kind: str, training: bool, recording: bool, device: str
    ) -> None:
        layer = layer_with(device, capacity, kind=kind).train(training)
        x, dy = batch(device)
        if recording:
            layer.begin_record_routing()
        step(layer, x, dy)  # compiles
        with no_waiting():
            for _ in range(3):
                step(layer, x, dy)

    @cuda_only
    @pytest.mark.parametrize("terms", [["load_balance", "efficiency"], ["gshard"]])
    @pytest.mark.parametrize("name", ["gated_multi_gate", "gated_multi_gate_t"])
    def test_other_gates_and_losses(self, name: str, terms: list[str], device: str) -> None:
        gate = {"type": name, "max_expert_num": 8}
        layer = layer_with(device, 2.5, gate=gate, aux_losses=dict.fromkeys(terms, 1.0))
        x, dy = batch(device)
        step(layer, x, dy)
        with no_waiting():
            step(layer, x, dy)

    @cuda_only
    @pytest.mark.parametrize("name", OTHERS)
    def test_other_layers(self, name: str, device: str) -> None:
        layer, mask = other_layer(name, device)
        x, dy = batch(device)
        step(layer, x, dy, mask)
        with no_waiting():
            step(layer, x, dy, mask)

    @cuda_only
    @pytest.mark.parametrize("scope", ["layer", "model"])
    def test_a_budget(self, scope: str, device: str) -> None:
        """No capacity given: room for `max_k` experts a token. And the step that moves the shift."""
        gate = {"type": "top_any", "max_expert_num": 8, "budget": {"target_k": 1.5, "max_k": 3, "scope": scope}}
        layer = layer_with(device, None, gate=gate)
        x, dy = batch(device)
        budgets = Budgets(layer)
        for _ in range(2):  # compiles
            step(layer, x, dy)
            budgets.step()
        with no_waiting():
            for max_k in (None, 2):
                step(layer, x, dy)
                layer(x, max_k=max_k)
                budgets.step()
        assert float(layer.gates[0].budget_shift) != 0

    @cuda_only
    def test_the_test_sees_waiting(self, device: str) -> None:
        with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device=device).item()


class TestGraphs:
    @cuda_only
    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    @pytest.mark.parametrize("capacity", STATIC)
    def test_replays_on_other_data_are_right(self, capacity: float | str, kind: str, device: str) -> None:
        """Batches of very different A: random, none routed, all along one routing vector, large."""
        layer = layer_with(device, capacity, kind=kind)
        x, dy = batch(device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(layer, x, dy)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = step(layer, x, dy)
        w = layer.gates[0].sim_matrix.detach()
        batches = [
            batch(device, seed=1)[0],
            -w.sum(dim=1).expand(600, -1),
            w[:, :1].t().expand(600, -1),
            30 * batch(device, seed=2)[0],
        ]
        for tokens in batches:
            with torch.no_grad():
                x.copy_(tokens)
            dy.normal_()
            graph.replay()
            found = [tensor.clone() for tensor in static]
            for tensor in static:
                tensor.fill_(torch.nan)
            expected = step(layer, x, dy)
            for a, b in zip(found, expected, strict=True):
                assert a.isfinite().all()
                assert torch.equal(a, b)

    @cuda_only
    @pytest.mark.parametrize("name", OTHERS)
    def test_other_layers(self, name: str, device: str) -> None:
        layer, mask = other_layer(name, device)
        x, dy = batch(device)
        graph, static = captured(lambda: step(layer, x, dy, mask))
        with torch.no_grad():
            x.copy_(batch(device, seed=1)[0])
        graph.replay()
        found = [tensor.clone() for tensor in static]
        for a, b in zip(found, step(layer, x, dy, mask), strict=True):
            assert torch.equal(a, b)

    @cuda_only
    def test_200_replays_of_a_large_step_give_the_same_bits(self, device: str) -> None:
        """BERT-L's sizes: a product that once reads an operand before its copy is there would show."""
        layer = layer_with(device, 2.5, D=1024, H=4096, E=16)
        with torch.no_grad():
            layer.gates[0].gates.fill_(1.15 * 1024**-0.5)  # an eighth of the cosines pass: mean k is 2
        x, dy = batch(device, 32768, 1024)
        graph, static = captured(lambda: step(layer, x, dy))
        graph.replay()
        first = [tensor.clone() for tensor in static]
        assert all(tensor.isfinite().all() for tensor in first)
        for replay in range(200):
            for tensor in static:
                tensor.fill_(torch.nan)
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(first, static, strict=True)), f"replay {replay}"

    @cuda_only
    def test_a_record_window_opened_after_the_capture_counts(self, device: str) -> None:
        """The graph holds the addresses of the window that was open at its capture."""
        layer = layer_with(device, 2.5)
        x, dy = batch(device)
        layer.begin_record_routing()
        graph, _ = captured(lambda: step(layer, x, dy))
        layer.begin_record_routing()
        for _ in range(3):
            graph.replay()
        assert int(layer.record.tokens) == 3 * x.shape[0]
        assert torch.equal(layer.record.counts.cpu(), 3 * layer.route(x).counts.cpu())

    @cuda_only
    def test_dropped_assignments_are_counted_by_replays(self, device: str) -> None:
        layer = layer_with(device, 0.7)
        x, _ = batch(device)
        with torch.no_grad():
            layer(x)
            each = int(layer.dropped_assignments)
            assert each > 0
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                layer(x)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layer(x)
            before = int(layer.dropped_assignments)
            for _ in range(3):
                graph.replay()
        assert int(layer.dropped_assignments) == before + 3 * each


def test_overflow_warns_once(device: str, caplog: pytest.LogCaptureFixture) -> None:
    """It warns a step or two late, since nothing waits for the count, and never if all fits."""
    x, dy = batch(device)
    with caplog.at_level(logging.WARNING, logger="dynmoe_tutel"):
        for capacity in ("full", 0.7):
            assert not caplog.records
            layer = layer_with(device, capacity)
            for _ in range(4):
                step(layer, x, dy)
                if device == "cuda":
                    torch.cuda.synchronize()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "capacity = 0.7 was too small" in caplog.text
    assert int(layer.dropped_assignments) > 0


class TestCompile:
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("capacity", ["exact", 2.5, "full"])
    def test_one_graph_and_the_eager_results(self, capacity: float | str, backend: str, device: str) -> None:
        """Two batches of different A share one compilation."""
        torch._dynamo.reset()
        layer = layer_with(device, capacity)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in (0, 1):
                x, dy = batch(device, seed=seed)
                expected = step(layer, x, dy)
                y = compiled(x)
                found = [y.detach(), *torch.autograd.grad(y, [x, *layer.experts.parameters()], dy)]
                y_eager = layer(x)
                reference = [expected[0], *torch.autograd.grad(y_eager, [x, *layer.experts.parameters()], dy)]
                for a, b in zip(found, reference, strict=True):
                    assert relative_rms(a.cpu(), b.cpu()) < (1e-6 if backend == "aot_eager" else HALF)
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        "name", ["threshold_gate", "ragged_index", "bound_assignments", "rows", "top_any_ffn", "vector_losses"]
    )
    def test_opcheck(self, name: str, device: str) -> None:
        """Schema, fake kernel and autograd registration of every operation, on small inputs."""
        for operation, args in operations(device)[name]:
            torch.library.opcheck(operation, args)


def operations(device: str) -> dict[str, list[tuple[Any, tuple[Any, ...]]]]:
    """Operations with inputs, by file."""
    T, D, H, E = 40, 32, 48, 5
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_(grad)

    x, w, b1, b2 = normal(T, D), normal(D, E), normal(E, H), normal(E, D)
    w1, w2, tau = normal(E, D, H), normal(E, H, D), torch.ones((), device=device)
    threshold, active = torch.zeros(E, device=device), torch.ones(E, dtype=torch.bool, device=device)
    gate = kernels.threshold_gate(x.detach(), w.detach(), threshold, active, tau, False)
    score, bits, unrouted, inv_norm = gate[:4]
    index = kernels.Index(*kernels.ragged_index(bits, E))
    rows = index.rows
    theta = torch.sigmoid(threshold).requires_grad_()
    router = kernels.Router(w, theta, tau, score, inv_norm, unrouted, bits)
    weights = kernels.ExpertWeights(w1, b1, None, None, w2, b2)
    gated = kernels.ExpertWeights(w1, None, normal(E, D, H), None, w2, None)
    return {
        "threshold_gate": [(kernels.threshold_gate, (x, w, threshold, active, tau, e)) for e in (False, True)],
        "ragged_index": [(kernels.ragged_index, (bits, E, capacity)) for capacity in (-1, rows + 3)],
        "vector_losses": [(kernels.vector_losses, (w, active))],
        "bound_assignments": [(kernels.bound_assignments, (bits, score, rows - 7))],
        "rows": [
            (kernels.dispatch, (x, *index[1:])),
            (kernels.combine, (normal(rows, D), *index[1:], True)),
            (kernels.row_gates, (score.detach().requires_grad_(), theta, unrouted, index, True)),
        ],
        "top_any_ffn": [
            (kernels.top_any_ffn, (x, router, index, weights, "gelu", False, torch.float32, True)),
            (kernels.grouped_ffn, (x, normal(rows), index, gated, "silu", True, True)),
        ],
    }


class TestMemory:
    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    def test_saved_for_the_backward(self, kind: str, device: str) -> None:
        """x, pre-activations and 8 bytes per assignment, within the design's 1.05; no pre-activations with "up"."""
        T, D, H = 2048, 128, 256
        saved = {}
        for recompute in ("none", "up"):
            layer = layer_with(device, kind=kind, experts={"recompute": recompute})
            x, _ = batch(device, T)
            parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
            storages: dict[int, int] = {}

            def keep(tensor: Tensor, storages: dict[int, int] = storages, known: set[int] = parameters) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = layer(x)
            A = int(layer.route(x).num_assignments)
            saved[recompute] = sum(storages.values())
            pre = A * H * (2 if kind == "llama_ffn" else 1)
            target = 2 * T * D + 2 * pre + 8 * A
            del y
            if recompute == "none":
                assert A > 1.5 * T
                assert saved["none"] / target < 1.05 + 4 * T * 8 / target  # the scores [T, 8] are large at this D
            else:
                assert saved["up"] <= saved["none"] - 2 * pre

    @cuda_only
    def test_no_extra_memory_is_kept_from_step_to_step(self, device: str) -> None:
        layer = layer_with(device)
        x, dy = batch(device, 4096)
        step(layer, x, dy)
        gc.collect()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step(layer, x, dy)
        gc.collect()
        assert torch.cuda.memory_allocated() - before < 1 << 20

    @cuda_only
    def test_rows_beyond_32_bits(self, device: str) -> None:
        """T * D > 2**31: the address of a row needs 64 bits."""
        T, D = 600_000, 4096
        _needs(26 << 30)
        x = torch.empty(T, D, dtype=torch.bfloat16, device=device).normal_()
        assigned = torch.zeros(T, 2, dtype=torch.bool, device=device)
        assigned[::2, 0], assigned[1::2, 1] = True, True
        index = kernels.ragged_index(kernels.pack_bits(assigned), 2, T)
        token = index[2].long()
        rows = kernels.dispatch(x, *index[1:])
        for part in (slice(0, 100), slice(T - 100, T)):
            assert torch.equal(rows[part], x[token[part]])
        assert torch.equal(kernels.combine(rows, *index[1:], True)[-100:], x[-100:])
        del rows
        w = torch.randn(D, 2, device=device)
        gate = (w, torch.zeros(2, device=device), torch.ones(2, dtype=torch.bool, device=device))
        tau = torch.ones((), device=device)
        score, bits, *_ = kernels.threshold_gate(x, *gate, tau, False)
        tail_score, tail_bits, *_ = kernels.threshold_gate(x[-96:].clone(), *gate, tau, False)
        assert torch.equal(bits[-96:], tail_bits)
        assert relative_rms(score[-96:].cpu(), tail_score.cpu()) < 1e-6

    @cuda_only
    def test_experts_beyond_32_bits(self, device: str) -> None:
        """A * H > 2**31, forward and the gradient of the tokens, against the same tokens alone."""
        T, D, H = 600_000, 64, 4096
        _needs(40 << 30)
        x = torch.empty(T, D, dtype=torch.bfloat16, device=device).normal_()
        w1 = torch.empty(1, D, H, dtype=torch.bfloat16, device=device).normal_(0, D**-0.5)
        w2 = torch.empty(1, H, D, dtype=torch.bfloat16, device=device).normal_(0, H**-0.5)
        dy = torch.empty_like(x).normal_()

        def run(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
            T = x.shape[0]
            index = kernels.Index(*kernels.ragged_index(torch.ones(T, 1, dtype=torch.int64, device=device), 1, T))
            x = x.detach().requires_grad_()
            gate = torch.ones(T, device=device)
            weights = kernels.ExpertWeights(w1, None, None, None, w2, None)
            rows, *_ = kernels.grouped_ffn(x, gate, index, weights, "relu", False, True)
            return rows.detach(), torch.autograd.grad(rows, x, dy)[0]

        whole, alone = run(x, dy), run(x[-128:], dy[-128:])
        for a, b in zip(whole, alone, strict=True):
            assert relative_rms(a[-128:].cpu(), b.cpu()) < HALF


def _needs(size: int) -> None:
    """Skip if fewer bytes are free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size >> 30} GB of free memory, {free >> 30} are free")
