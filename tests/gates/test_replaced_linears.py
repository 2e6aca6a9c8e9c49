"""A router's linear map that a tool replaced, wrapped or hooked is called, in the dtype that its kind computes in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dynmoe_tutel import MoELayer

D, E = 8, 6
LINEARS = {"top": "wg", "cosine_top": "cosine_projector"}
gates = pytest.mark.parametrize("kind", list(LINEARS))


def layer_with(kind: str, **options: Any) -> MoELayer:
    experts = {"num_experts_per_device": E, "hidden_size_per_expert": 16}
    return MoELayer({"type": kind, "k": 2}, D, experts, seeds=(1, 2), **options).eval()


def tokens(count: int = 64) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(0))


def linear_of(layer: MoELayer) -> Any:
    gate = layer.gates[0]
    return next(getattr(gate, name) for name in LINEARS.values() if hasattr(gate, name))


def replace(layer: MoELayer, kind: str, module: nn.Module) -> Any:
    setattr(layer.gates[0], LINEARS[kind], module)
    return module


class Int8(nn.Module):
    """A weight-only int8 map, as quantisers make: its `weight` means nothing without its scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Adapted(nn.Module):
    """LoRA: the old map, and a low-rank one beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear
        self.a = nn.Linear(linear.in_features, 2, bias=False).to(linear.weight.dtype)
        self.b = nn.Linear(2, linear.out_features, bias=False).to(linear.weight.dtype)
        nn.init.zeros_(self.b.weight)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        y: Tensor = self.base(x) + self.b(self.a(x))
        return y


@gates
class TestReplaced:
    def test_int8_scores_are_near(self, kind: str) -> None:
        layer, x_TD = layer_with(kind), tokens()
        before = layer.route(x_TD).scores
        replace(layer, kind, Int8(linear_of(layer)))
        assert (layer.route(x_TD).scores - before).norm() < 0.02 * before.norm()

    @pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated, and used
    def test_quantize_dynamic(self, kind: str) -> None:
        layer, x_TD = layer_with(kind), tokens()
        before = layer.route(x_TD).scores
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear})
        assert type(linear_of(quantised)) is not nn.Linear
        assert (quantised.route(x_TD).scores - before).norm() < 0.02 * before.norm()
        assert quantised(x_TD).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_an_adapter_starts_as_nothing_and_learns_in_its_own_dtype(self, kind: str, dtype: torch.dtype) -> None:
        layer, x_TD = layer_with(kind).to(dtype), tokens().to(dtype)
        before = layer.route(x_TD).scores
        adapted = replace(layer, kind, Adapted(linear_of(layer)))
        scores = layer.route(x_TD).scores
        if dtype is torch.float32:
            assert torch.equal(scores, before)
        assert (scores - before).norm() < 0.02 * before.norm()
        layer(x_TD).float().square().sum().backward()
        assert adapted.b.weight.grad.any()
        assert set(adapted.seen) == {dtype}

    def test_no_tensor_is_refused(self, kind: str) -> None:
        class Pair(nn.Linear):
            def forward(self, input: Tensor) -> Any:
                return super().forward(input), None

        layer = layer_with(kind)
        linear = linear_of(layer)
        replace(layer, kind, Pair(linear.in_features, linear.out_features))
        with pytest.raises(ValueError, match="Pair, a linear map of the gate, returned tuple"):
            layer(tokens())


@gates
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestCalled:
    def test_hooks_run_once(self, kind: str, dtype: torch.dtype) -> None:
        layer, calls = layer_with(kind).to(dtype), []
        expected = layer(tokens().to(dtype))
        linear_of(layer).register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(layer(tokens().to(dtype)), expected)
        assert calls == [1]

    def test_arithmetic_is_fp32_and_weights_stay(self, kind: str, dtype: torch.dtype) -> None:
        """In half precision too: the same scores as fp32 weights of those values give, and gradients in place."""
        layer, x_TD = layer_with(kind).to(dtype), tokens().to(dtype)
        wide = copy.deepcopy(layer).float()
        scores, expected = (each.route(x).scores for each, x in ((layer, x_TD), (wide, x_TD.float())))
        assert scores.dtype is torch.float32
        assert torch.equal(scores, expected)
        scores.square().sum().backward()
        expected.square().sum().backward()
        weight = linear_of(layer).weight
        assert weight.dtype is dtype
        assert isinstance(weight, nn.Parameter)
        assert torch.equal(weight.grad, linear_of(wide).weight.grad.to(dtype))

    def test_under_autocast(self, kind: str, dtype: torch.dtype) -> None:
        layer, x_TD = layer_with(kind).to(dtype), tokens().to(dtype)
        expected = layer.route(x_TD).scores
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.route(x_TD).scores, expected)


@gates
@pytest.mark.parametrize("normed", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_learns(kind: str, normed: Any) -> None:
    layer, x_TD = layer_with(kind), tokens()
    before = layer.route(x_TD).scores
    normed(linear_of(layer))
    assert torch.allclose(layer.route(x_TD).scores, before, atol=1e-5)
    layer(x_TD).square().sum().backward()
    own = list(linear_of(layer).named_parameters())
    assert all(p.grad is not None and p.grad.any() for name, p in own if "bias" not in name)


class TestKeys:
    """EMoE's avg-k gate writes `wg.weight`: it says so where that is lost."""

    def layer(self) -> MoELayer:
        return layer_with("top", one_score_gate=True)

    @pytest.mark.parametrize("tool", ["int8", "adapter", "weight_norm"])
    def test_are_refused_where_a_write_is_lost(self, tool: str) -> None:
        layer = self.layer()
        if tool == "weight_norm":
            parametrizations.weight_norm(linear_of(layer))
        else:
            replace(layer, "top", {"int8": Int8, "adapter": Adapted}[tool](linear_of(layer)))
        with pytest.raises(ValueError, match=r"the gate's wg\.weight"):
            layer.update_one_score_gate()
        with pytest.raises(ValueError, match=r"the gate's wg\.weight"):
            layer.reset_parameters()


def test_compiles_in_half_precision() -> None:
    layer, x_TD = layer_with("top").bfloat16(), tokens().bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x_TD), layer(x_TD))


def test_a_custom_gate_with_quantised_parts_gets_tokens_of_a_float_dtype() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wg = Int8(nn.Linear(D, E, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype is torch.float32
            y: Tensor = self.wg(x)
            return y

    experts = {"num_experts_per_device": E, "hidden_size_per_expert": 16}
    layer = MoELayer({"type": "custom", "module": Own(), "k": 2}, D, experts)
    assert layer(tokens()).isfinite().all()
