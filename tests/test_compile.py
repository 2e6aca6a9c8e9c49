"""torch.compile(fullgraph=True): same results as eager, one graph whatever the number of assignments."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import Routing, kernels, moe
from dynmoe_tutel.adaptive import Budgets

D, H, E, T = 16, 12, 6, 24


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_with(gate: Any = None, experts: Any = None, **given: Any) -> Any:
    gate = {"type": "top_any", "max_expert_num": E} if gate is None else gate
    config = {"num_experts_per_device": 4, "hidden_size_per_expert": H, "activation_fn": F.gelu, **(experts or {})}
    return moe.moe_layer(gate, D, config, **{"seeds": (1, 2), **given})


def budgeted() -> Any:
    return layer_with({"type": "top_any", "max_expert_num": E, "budget": {"target_k": 2.0, "max_k": 3}}, capacity=None)


def batches(layer: Any, T: int = T) -> list[Tensor]:
    """Batches of very different A: random, all tokens along one routing vector, none routed, all experts, zeros."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(T, D, generator=generator)
    w = getattr(layer.gates[0], "sim_matrix", None)
    along = random if w is None or w.shape[0] != D else w.detach().t()[:1].repeat(T, 1)
    active = random if w is None or w.shape[0] != D else w.detach()[:, :4].sum(1).repeat(T, 1)
    return [random, along, -active, active, torch.zeros(T, D), 100 * random]


def outcome(run: Callable[[Tensor], Any], layer: Any, x: Tensor, grad: bool) -> list[Tensor]:
    """Output, l_aux and, with `grad`, every gradient."""
    x = x.clone().requires_grad_(grad)
    layer.zero_grad()
    y = run(x)
    found = [y.detach(), layer.l_aux.detach(), y.l_aux.detach()]
    if grad:
        (y.float().square().sum() + layer.l_aux).backward()
        found += [t.grad for t in (x, *layer.parameters()) if t.grad is not None]
        assert len(found) == 4 + sum(p.requires_grad for p in layer.parameters())
    return found


def compiled(layer: nn.Module, **given: Any) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(layer, fullgraph=True, backend=counter, **given), counter


KINDS: dict[str, Callable[[], Any]] = {
    "top_any": layer_with,
    "all of top_any": lambda: layer_with(
        {"type": "gated_multi_gate_t", "max_expert_num": 65},
        {"output_dim": 5},
        aux_losses={"diversity": 1, "simplicity": 1, "load_balance": 1, "efficiency": 1, "gshard": 1},
    ),
    "budget": lambda: budgeted(),
    "bounded": lambda: layer_with(capacity=1.5),
    "full, llama": lambda: layer_with(experts={"type": "llama_ffn", "activation_fn": F.silu}, capacity="full"),
    "lambda": lambda: layer_with(experts={"activation_fn": lambda h: F.gelu(h) * 2}),
    "top": lambda: layer_with({"type": "top", "k": 2}),
    "cosine_top": lambda: layer_with({"type": "cosine_top", "k": 2, "proj_dim": 8}),
    "custom gate": lambda: layer_with({"type": "custom", "module": Halves()}),
}


class Halves(nn.Module):
    """A gate of the user's own that returns a Routing."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x_TD: Tensor) -> Routing:
        weights_TE = torch.sigmoid(x_TD @ self.w)
        return Routing.from_assignments(weights_TE > 0.5, weights=weights_TE)


class TestOneGraph:
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_in_training(self, kind: str) -> None:
        layer = KINDS[kind]()
        run, counter = compiled(layer)
        counts = []
        for x in batches(layer):
            for mine, eager in zip(outcome(run, layer, x, True), outcome(layer, layer, x, True), strict=True):
                assert torch.allclose(mine, eager, rtol=1e-6, atol=1e-7)
            counts.append(int(layer.route(x).num_assignments))
            assert counter.frame_count == 1, f"compiled again at A = {counts}"
        if "top_any" in kind or "full" in kind:
            assert len(set(counts)) >= 4
            assert 0 in counts

    @pytest.mark.parametrize(
        ("kind", "context"),
        [
            ("top_any", torch.inference_mode),
            ("top_any", torch.no_grad),
            ("bounded", torch.inference_mode),
            ("full, llama", torch.enable_grad),
            ("top", torch.inference_mode),
        ],
    )
    def test_in_eval(self, kind: str, context: Any) -> None:
        layer = KINDS[kind]().eval()
        run, counter = compiled(layer)
        with context():
            for x in batches(layer):
                for mine, eager in zip(outcome(run, layer, x, False), outcome(layer, layer, x, False), strict=True):
                    assert torch.equal(mine, eager)
                assert counter.frame_count == 1

    @pytest.mark.parametrize("keep_tokens", [0, 5])
    def test_in_an_open_record_window(self, keep_tokens: int) -> None:
        """A controller that grows several experts per window sets `keep_tokens`."""
        layer, eager = layer_with(), layer_with()
        run, counter = compiled(layer)
        for one in (layer, eager):
            one.begin_record_routing()
            one.record.keep_tokens = keep_tokens
        for x in batches(layer):
            run(x)
            eager(x)
            assert counter.frame_count == 1
        for name, value in eager.record.state_dict().items():
            assert torch.equal(torch.as_tensor(layer.record.state_dict()[name]), torch.as_tensor(value)), name

    def test_opening_and_closing_windows_adds_one_graph(self) -> None:
        layer = layer_with()
        run, counter = compiled(layer)
        seen = []
        for step, x in enumerate(batches(layer) * 2):
            if step % 4 == 2:
                layer.begin_record_routing()
            if step % 4 == 0:
                layer.end_record_routing()
            run(x)
            seen.append(counter.frame_count)
        assert seen == [1, 1] + [2] * 10
        assert int(layer.record.tokens) == 2 * T

    def test_growing_and_pruning_add_none(self) -> None:
        layer = layer_with()
        run, counter = compiled(layer)
        x = batches(layer)[0]
        for change in (lambda: None, lambda: grow(layer), lambda: layer.gates[0].deactivate(0)):
            change()
            assert torch.equal(run(x), layer(x))
        assert counter.frame_count == 1

    def test_a_step_of_a_budget_adds_none(self) -> None:
        """The compiled layer keeps the sample that the eager one keeps."""
        layer, eager = budgeted(), budgeted()
        run, counter = compiled(layer)
        for x in batches(layer):
            for each, forward in ((layer, run), (eager, eager)):
                outcome(forward, each, x, True)
                Budgets(each).step()
            assert torch.equal(layer.gates[0].budget_shift, eager.gates[0].budget_shift)
            assert counter.frame_count == 1
        assert float(layer.gates[0].budget_shift) != 0

    def test_dropped_assignments_are_counted(self) -> None:
        layer, eager = layer_with(capacity=0.5), layer_with(capacity=0.5)
        run, counter = compiled(layer)
        for x in batches(layer):
            run(x)
            eager(x)
        assert int(layer.dropped_assignments) == int(eager.dropped_assignments) > 0
        assert counter.frame_count == 1

    @pytest.mark.parametrize("capacity", ["exact", 1.5])
    def test_the_number_of_tokens_adds_one_dynamic_graph(self, capacity: Any) -> None:
        layer = layer_with(capacity=capacity)
        run, counter = compiled(layer)
        for size in (24, 31, 32, 7, 100):
            x = batches(layer, size)[0]
            assert torch.equal(run(x), layer(x))
        assert counter.frame_count == 2

    def test_no_tokens(self) -> None:
        layer = layer_with()
        run, _ = compiled(layer)
        y = run(torch.zeros(0, D))
        assert y.shape == (0, D)
        y.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


def grow(layer: Any) -> None:
    layer.gates[0].activate(4, torch.ones(D))
    layer._num_global_experts.fill_(5)


class TestInAModel:
    def test_two_layers_and_their_losses(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList([layer_with(), layer_with({"type": "top", "k": 2})])

            def forward(self, x: Tensor) -> Tensor:
                loss = x.new_zeros(())
                for block in self.blocks:
                    y = block(x)
                    x = x + y
                    loss = loss + y.l_aux
                return x.square().mean() + loss

        torch.manual_seed(0)
        model = Model()
        run, counter = compiled(model)
        x = torch.randn(T, D)
        found = []
        for one in (run, model, run):
            model.zero_grad()
            loss = one(x)
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        for mine, eager, again in zip(*found, strict=True):
            assert torch.allclose(mine, eager, rtol=1e-6, atol=1e-8)
            assert torch.equal(mine, again)
        assert counter.frame_count == 1

    def test_autocast(self) -> None:
        layer = layer_with()
        run, counter = compiled(layer)
        for x in batches(layer):
            with torch.autocast("cpu", torch.bfloat16):
                mine, eager = run(x), layer(x)
            assert torch.equal(mine, eager)
            mine.square().sum().backward()
        assert counter.frame_count == 1

    def test_half_precision(self) -> None:
        layer = layer_with().bfloat16()
        run, counter = compiled(layer)
        for x in batches(layer):
            mine, eager = (outcome(one, layer, x.bfloat16(), True) for one in (run, layer))
            for one, other in zip(mine, eager, strict=True):
                assert one.dtype == other.dtype
                assert torch.allclose(one, other, rtol=1e-2, atol=1e-3)
        assert counter.frame_count == 1

    def test_gradient_checkpointing(self) -> None:
        """Recorded once: with the right option, the compiler leaves side effects out of the recompute."""
        layer = layer_with()
        layer.begin_record_routing()

        def block(x: Tensor) -> Tensor:
            return checkpoint(layer, x, use_reentrant=False)  # type: ignore[return-value]

        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(block, fullgraph=True, backend=counter)
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
            for step, x in enumerate(batches(layer)[:3]):
                mine = gradients(run, layer, x)
                assert int(layer.record.tokens) == (2 * step + 1) * T
                for grad, eager in zip(mine, gradients(layer, layer, x), strict=True):
                    assert torch.allclose(grad, eager, rtol=1e-6, atol=1e-7)
        assert counter.frame_count == 1

    def test_a_list_of_gates(self) -> None:
        layer = layer_with(["top_any", {"type": "top", "k": 2}])
        run, _ = compiled(layer)
        x = batches(layer)[0]
        for index in (0, 1):
            assert torch.equal(run(x, gate_index=index), layer(x, gate_index=index))

    def test_the_functional_form(self) -> None:
        """A custom layer from `moe.top_any_routing` and the routing's packed rows."""
        torch.manual_seed(0)
        w, g, tau = torch.randn(D, 4), torch.zeros(4), torch.tensor(2.0, requires_grad=True)

        def forward(x: Tensor, fallback: bool, scale: Any) -> Tensor:
            routing = moe.top_any_routing(x, w, g, torch.ones(4), scale=scale, fallback=fallback)
            return routing.combine(torch.tanh(routing.dispatch(x)) * routing.row_gates().unsqueeze(1))

        for fallback, scale in ((False, 1.0), (True, 1.0), (False, tau), (True, tau)):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            run = torch.compile(forward, fullgraph=True, backend=counter)
            for size in (1.0, 100.0):
                x = torch.randn(T, D) * size
                assert torch.allclose(run(x, fallback, scale), forward(x, fallback, scale), atol=1e-6)
            assert counter.frame_count == 1


def gradients(run: Callable[[Tensor], Tensor], layer: Any, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    run(x).square().sum().backward()
    return [p.grad.clone() for p in layer.parameters()]


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="inductor needs a C++ compiler"
)
@pytest.mark.slow
def test_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer = layer_with()
    run = torch.compile(layer, fullgraph=True)
    # Inductor reads the vector width from the processor. If ATen was told of another, Inductor's cache may hold code
    # for the wrong one; if ATen was told of none, vector code does not compile.
    if "ATEN_CPU_CAPABILITY" in os.environ:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    lanes = 1 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else None
    with torch._dynamo.config.patch(error_on_recompile=True), torch._inductor.config.patch({"cpp.simdlen": lanes}):
        for x in batches(layer):
            for mine, eager in zip(outcome(run, layer, x, True), outcome(layer, layer, x, True), strict=True):
                assert torch.allclose(mine, eager, rtol=1e-5, atol=1e-6)


def test_a_kernel_is_not_traced_where_torch_leaves_its_caller_to_python() -> None:
    """Otherwise the compiler would compile it piece by piece, and again for every shape."""
    rows, index = torch.randn(4, 3), kernels.ragged_index(kernels.pack_bits(torch.ones(2, 2, dtype=torch.bool)), 2)

    @torch._dynamo.disable(recursive=False)
    def left_alone(x: torch.Tensor) -> torch.Tensor:
        return kernels.combine(x, *index[1:], True)

    counter = CompileCounterWithBackend("eager")
    torch.compile(lambda x: left_alone(x), backend=counter)(rows.requires_grad_()).sum().backward()
    assert counter.frame_count == 0
