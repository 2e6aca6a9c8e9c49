"""Expert tensors that a tool parametrised, packed or wrapped: the layer reads their values, once a forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from dynmoe_tutel import MoELayer

D, H, E = 8, 6, 4
STACKED = {"ffn": ("batched_fc1_w", "batched_fc2_w"), "llama_ffn": ("W_fc1", "W_fc2", "W_fc3")}
GATES: tuple[Any, ...] = ({"type": "top_any"}, {"type": "top", "k": 2})
kinds = pytest.mark.parametrize("kind", list(STACKED))
routers = pytest.mark.parametrize("gate", GATES, ids=["top_any", "top"])


def layer_with(gate: dict[str, Any], kind: str = "ffn", **experts: Any) -> MoELayer:
    options = {"type": kind, "num_experts_per_device": E, "hidden_size_per_expert": H, **experts}
    return MoELayer(gate, D, options, seeds=(0, 0))


def tokens(seed: int = 32) -> Tensor:
    return torch.randn(12, D, generator=torch.Generator().manual_seed(seed))


class LowRank(nn.Module):
    """W + A B for each expert, with A zero at start."""

    def __init__(self, weight: Tensor, rank: int = 2) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(*weight.shape[:2], rank))
        self.b = nn.Parameter(torch.randn(len(weight), rank, weight.shape[2]) / 4)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


class Dequantised(nn.Module):
    """The value of an int8 tensor with one scale an expert, as quantisers parametrise stacked weights."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, packed: Tensor) -> Tensor:
        scale: Any = self.scale
        return packed.float() * scale


class Counted(nn.Module):
    """Counts its evaluations; each gives another value, as a power iteration in training does."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.times += 1
        return weight * (1 + self.times / 100)


class Wrapped(nn.Module):
    """What PEFT's ParamWrapper does: it parametrises a tensor of the module inside while that runs."""

    def __init__(self, inner: Any, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name
        self.adapter = LowRank(getattr(inner, name))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        adapter = self.adapter
        proxy = nn.Module()
        proxy.forward = lambda weight: adapter(weight)  # type: ignore[method-assign,assignment]
        parametrize.register_parametrization(self.inner, self.name, proxy)
        try:
            return self.inner(*arguments, **options)
        finally:
            parametrize.remove_parametrizations(self.inner, self.name, leave_parametrized=False)


@kinds
@routers
class TestLowRank:
    def test_starts_as_nothing_learns_and_merges(self, gate: dict[str, Any], kind: str) -> None:
        layer, x_TD = layer_with(gate, kind), tokens()
        before = layer(x_TD)
        for name in STACKED[kind]:
            weight = getattr(layer.experts, name)
            parametrize.register_parametrization(layer.experts, name, LowRank(weight))
        assert torch.equal(layer(x_TD), before)
        layer(x_TD).square().sum().backward()
        learns = {n: p for n, p in layer.experts.named_parameters() if n.endswith((".a", ".b"))}
        assert len(learns) == 2 * len(STACKED[kind])
        assert all(p.grad is not None and (p.grad.any() or n.endswith(".b")) for n, p in learns.items())
        with torch.no_grad():
            for parameter in learns.values():
                parameter.add_(0.1)
        trained = layer(x_TD)
        assert not torch.allclose(trained, before, atol=1e-3)
        for name in STACKED[kind]:
            parametrize.remove_parametrizations(layer.experts, name)  # merges
        assert torch.equal(layer(x_TD), trained)

    def test_around_the_experts(self, gate: dict[str, Any], kind: str) -> None:
        """A wrapper in the place of the experts is called, and its adapters learn."""
        layer, x_TD = layer_with(gate, kind), tokens()
        before = layer(x_TD)
        layer.experts = wrapper = Wrapped(layer.experts, STACKED[kind][0])
        assert torch.allclose(layer(x_TD), before, atol=1e-6)
        layer(x_TD).square().sum().backward()
        assert wrapper.adapter.a.grad is not None
        assert wrapper.adapter.a.grad.any()


@routers
def test_an_int8_tensor_is_read_by_its_value(gate: dict[str, Any]) -> None:
    layer, x_TD = layer_with(gate), tokens()
    before = layer(x_TD)
    for name in STACKED["ffn"]:
        weight = getattr(layer.experts, name).detach()
        scale = weight.abs().amax((1, 2), keepdim=True) / 127
        packed = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        delattr(layer.experts, name)
        layer.experts.register_parameter(name, packed)
        with pytest.raises(ValueError, match=rf"experts\.{name} is torch\.int8 \[4, 6, 8\]: packed or quantised"):
            layer(x_TD)
        parametrize.register_parametrization(layer.experts, name, Dequantised(scale), unsafe=True)
    assert (layer(x_TD) - before).norm() < 0.02 * before.norm()


class TestReadOnce:
    @routers
    def test_an_expert_tensor(self, gate: dict[str, Any]) -> None:
        layer = layer_with(gate)
        parametrize.register_parametrization(layer.experts, "batched_fc1_w", counted := Counted())
        before = counted.times
        layer(tokens())
        assert counted.times == before + 1

    @pytest.mark.parametrize("name", ["sim_matrix", "gates", "temperature"])
    def test_a_tensor_of_the_gate(self, name: str) -> None:
        """With all terms of the loss: they are of the same routing vectors as the scores."""
        layer = layer_with({"type": "top_any", "init_t": 0.5})
        parametrize.register_parametrization(layer.gates[0], name, counted := Counted())
        before = counted.times
        layer(tokens()).l_aux.backward()
        assert counted.times == before + 1


@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm", "orthogonal"])
def test_routing_vectors_may_be_normed(norm: str) -> None:
    layer = layer_with({"type": "top_any"}).eval()
    getattr(parametrizations, norm)(layer.gates[0], "sim_matrix")
    routing = layer.route(tokens())
    fixed = layer_with({"type": "top_any"}).eval()
    with torch.no_grad():
        fixed.gates[0].sim_matrix.copy_(layer.gates[0].sim_matrix)
    assert torch.allclose(routing.scores, fixed.route(tokens()).scores, atol=1e-6)
    layer(tokens()).square().sum().backward()
    assert all(p.grad is not None for p in layer.gates[0].parameters())


def test_a_quantised_custom_expert_computes_in_its_float_dtype() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.ones(D, D, dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype is torch.float32
            return x @ (self.packed * self.scale)

    layer = MoELayer("top_any", D, {"type": "custom", "module": Own, "num_experts_per_device": E})
    assert layer(tokens()).isfinite().all()


class TestConvertedBack:
    def model(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)))

    def converted(self) -> Any:
        from dynmoe_tutel.convert import convert

        return convert(self.model(), layers="all", num_experts=2)

    def test_by_the_values_of_parametrised_tensors(self) -> None:
        from dynmoe_tutel.convert import revert

        model = self.converted()
        layer = model[0]
        parametrize.register_parametrization(
            layer.experts, "batched_fc1_w", low := LowRank(layer.experts.batched_fc1_w)
        )
        with torch.no_grad():
            low.a.fill_(0.1)
            low.b.copy_(low.b[:1].expand_as(low.b))
        value = layer.experts.batched_fc1_w[0].detach().clone()
        revert(model)
        assert torch.equal(model[0][0].weight, value)

    def test_not_past_a_wrapper(self) -> None:
        from dynmoe_tutel.convert import revert

        model = self.converted()
        model[0].experts = Wrapped(model[0].experts, "batched_fc1_w")
        with pytest.raises(ValueError, match=r"a Wrapped with the parameter adapter\.a wraps a part of the layer"):
            revert(model)


def test_a_deep_copy_of_wrapped_experts_is_the_same_function() -> None:
    layer = layer_with({"type": "top_any"})
    layer.experts = Wrapped(layer.experts, "batched_fc1_w")
    assert torch.equal(copy.deepcopy(layer)(tokens()), layer(tokens()))
