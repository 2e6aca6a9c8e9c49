"""Options shared by `ffn` and `llama_ffn` experts: the activation by name, `engine`, `recompute`."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import moe, validation
from dynmoe_tutel.kernels import ACTIVATIONS

T, D, H, E = 40, 16, 24, 5
GATES: dict[str, dict[str, Any]] = {
    "top_any": {"type": "top_any", "max_expert_num": E},
    "top": {"type": "top", "k": 2},
}
KINDS: dict[str, dict[str, Any]] = {
    "ffn": {"type": "ffn", "activation_fn": F.gelu},
    "llama_ffn": {"type": "llama_ffn", "activation_fn": F.silu},
    "by stages": {"type": "ffn", "activation_fn": torch.tanh},
}


def layer_with(kind: str, gate: str = "top_any", capacity: Any = "exact", **given: Any) -> Any:
    experts = {"num_experts_per_device": E, "hidden_size_per_expert": H, **KINDS[kind], **given}
    layer = moe.moe_layer(GATES[gate], D, experts, capacity=capacity, seeds=(1, 2))
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.normal_(0, D**-0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    return layer


def tokens() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(0))


def outcome(layer: Any, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output and every gradient."""
    x = tokens().requires_grad_()
    layer.zero_grad()
    y = layer(x) if run is None else run(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 2e-6) -> None:
    for name, value in expected.items():
        error, size = float((found[name] - value).norm()), float(value.norm())
        assert error <= limit * size, f"{name}: {error} of {size}"


def bytes_kept(layer: Any) -> int:
    """Bytes of distinct storages that a forward keeps for its backward, besides the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(tokens().requires_grad_())
    y.sum().backward()
    return sum(kept.values())


class TestActivationByName:
    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    @pytest.mark.parametrize("name", list(ACTIVATIONS))
    def test_is_the_function(self, name: str, kind: str) -> None:
        """The fused path by name equals the unfused path with a function that the kernels do not know."""
        named = layer_with(kind, activation_fn=name)
        assert named.experts.activation == name
        assert callable(named.experts.activation_fn)
        staged = layer_with(kind, activation_fn=lambda h: ACTIVATIONS[name].value(h))
        assert staged.experts.activation is None
        assert_close(outcome(named), outcome(staged))

    def test_squared_relu(self) -> None:
        squared, plain = (layer_with("ffn", activation_fn=f) for f in ("squared_relu", lambda h: F.relu(h) ** 2))
        assert_close(outcome(squared), outcome(plain))

    @pytest.mark.parametrize("name", list(ACTIVATIONS))
    def test_such_a_layer_is_copied_and_pickled(self, name: str) -> None:
        layer = layer_with("ffn", activation_fn=name)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.experts.activation == name
            assert torch.equal(other(tokens()), layer(tokens()))

    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    def test_another_name_is_refused(self, kind: str) -> None:
        with pytest.raises(ValueError, match=r"experts\['activation_fn'\] = 'swish': allowed.* gelu, .*squared_relu"):
            layer_with(kind, activation_fn="swish")


class TestEngine:
    @pytest.mark.parametrize("capacity", ["exact", 1.5, "full"])
    @pytest.mark.parametrize("gate", list(GATES))
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_all_give_the_same(self, kind: str, gate: str, capacity: Any) -> None:
        """Also in eval, where an unrouted token falls back to an expert."""
        layers = {engine: layer_with(kind, gate, capacity, engine=engine) for engine in ("torch", "auto", "grouped_mm")}
        for training in (True, False):
            found = {engine: outcome(layer.train(training)) for engine, layer in layers.items()}
            assert_close(found["auto"], found["torch"])
            assert_close(found["grouped_mm"], found["torch"])

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_it_reaches_the_operations(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from dynmoe_tutel.kernels import grouped_mm

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("here")

        monkeypatch.setattr(grouped_mm, "grouped_ffn", fail)
        monkeypatch.setattr(grouped_mm, "grouped_linear", fail)
        for gate in GATES:
            layer_with(kind, gate)(tokens())
            with pytest.raises(RuntimeError, match="here"):
                layer_with(kind, gate, engine="grouped_mm")(tokens())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_under_autocast(self, kind: str, dtype: torch.dtype) -> None:
        layers = [layer_with(kind, engine=engine) for engine in ("torch", "grouped_mm")]
        with torch.autocast("cpu", dtype):
            expected, found = (outcome(layer) for layer in layers)
        assert_close(found, expected, 2e-2)

    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    @pytest.mark.parametrize("engine", ["cuda", "Torch", None, 1, ["torch"]])
    def test_another_is_refused(self, engine: Any, kind: str) -> None:
        with pytest.raises(ValueError, match=r"experts\['engine'\].*'auto', 'triton', 'grouped_mm', 'numba', 'torch'"):
            layer_with(kind, engine=engine)

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_triton_without_a_gpu_says_what_to_do(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match=r"engine = 'triton' needs tensors on a GPU.*engine = 'auto'"):
            layer_with(kind, engine="triton")(tokens())


class TestRecompute:
    @pytest.mark.parametrize("engine", ["torch", "grouped_mm"])
    @pytest.mark.parametrize("gate", list(GATES))
    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    def test_same_gradients_bit_by_bit(self, kind: str, gate: str, engine: str) -> None:
        kept, again = (layer_with(kind, gate, engine=engine, recompute=value) for value in ("none", "up"))
        assert_equal(outcome(again), outcome(kept))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_in_other_types(self, dtype: torch.dtype) -> None:
        found = []
        for value in ("none", "up"):
            layer = layer_with("llama_ffn", recompute=value).to(dtype)
            x = tokens().to(dtype).requires_grad_()
            layer(x).square().sum().backward()
            found.append([x.grad, *(p.grad for p in layer.parameters())])
        for kept, again in zip(*found, strict=True):
            assert torch.equal(kept, again)

    @pytest.mark.parametrize("gate", list(GATES))
    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    def test_the_pre_activations_are_what_it_saves(self, kind: str, gate: str) -> None:
        kept, again = (layer_with(kind, gate, recompute=value) for value in ("none", "up"))
        A = int(kept.route(tokens()).num_assignments)
        assert A > T
        each = 2 if kind == "llama_ffn" else 1
        assert bytes_kept(kept) - bytes_kept(again) == each * A * H * 4

    def test_within_gradient_checkpointing(self) -> None:
        plain, layer = layer_with("ffn"), layer_with("ffn", recompute="up")
        found = outcome(layer, lambda x: checkpoint(layer, x, use_reentrant=False))
        assert_equal(found, outcome(plain))

    def test_without_gradients_nothing_changes(self) -> None:
        with torch.no_grad():
            assert torch.equal(layer_with("ffn", recompute="up")(tokens()), layer_with("ffn")(tokens()))

    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    @pytest.mark.parametrize("value", ["down", True, None, ["up"]])
    def test_another_value_is_refused(self, value: Any, kind: str) -> None:
        with pytest.raises(ValueError, match=r"experts\['recompute'\].*'none', 'up'"):
            layer_with(kind, recompute=value)

    @pytest.mark.parametrize("activation", [{"activation_fn": torch.tanh}, {"activation_fn_with_self": lambda h, s: h}])
    def test_an_activation_by_stages_is_refused(self, activation: dict[str, Any]) -> None:
        given = {"activation_fn": None, **activation}
        with pytest.raises(ValueError, match=r"experts\['recompute'\] = 'up'.*gelu.*checkpoint"):
            layer_with("ffn", recompute="up", **given)

    def test_an_activation_that_is_changed_later_warns_once(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(validation, "_warned", set())
        layer = layer_with("ffn", recompute="up")
        layer.experts.activation_fn = torch.tanh
        with caplog.at_level(logging.WARNING, "dynmoe_tutel"):
            assert_close(outcome(layer), outcome(layer_with("by stages")))
            layer(tokens())
        assert sum("recompute" in r.getMessage() for r in caplog.records) == 1


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("kind", "gate", "given"),
        [
            ("ffn", "top_any", {"engine": "grouped_mm"}),
            ("llama_ffn", "top", {"engine": "grouped_mm", "recompute": "up"}),
            ("by stages", "top_any", {"engine": "grouped_mm"}),
            ("ffn", "top_any", {"engine": "torch", "recompute": "up"}),
            ("ffn", "top", {"recompute": "up", "activation_fn": "squared_relu"}),
        ],
    )
    @pytest.mark.parametrize("capacity", ["exact", 1.5])
    def test_one_graph(self, kind: str, gate: str, given: dict[str, Any], capacity: Any) -> None:
        layer = layer_with(kind, gate, capacity, **given)
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(layer, fullgraph=True, backend=counter)
        assert_close(outcome(layer, run), outcome(layer))
        assert counter.frame_count == 1


def test_the_options_are_not_of_custom_experts() -> None:
    """The user's own modules decide for themselves."""
    modules = [nn.Linear(D, D) for _ in range(E)]
    for option in ({"engine": "torch"}, {"recompute": "up"}):
        experts = {"type": "custom", "num_experts_per_device": E, "module": modules, **option}
        with pytest.raises(ValueError, match=next(iter(option))):
            moe.moe_layer(GATES["top_any"], D, experts)
