"""Experts of type modules: nn.Linear maps with the results of stacked weights, slots that grow, tools that reach."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import FP32, relative_rms
from torch import Tensor, nn

from dynmoe_tutel import MoELayer
from dynmoe_tutel.convert import convert, revert
from dynmoe_tutel.experts import ModuleExperts

D, H, E, T = 12, 20, 4, 50
GATE = {"type": "top_any", "max_expert_num": E}
SIZES = {"num_experts_per_device": 3, "hidden_size_per_expert": H}


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(0), dtype=dtype)


def pair(gated: bool) -> tuple[MoELayer, MoELayer]:
    """A layer of modules and one of stacked weights that hold the same."""
    kind = {"type": "modules", "gated": gated, "bias": not gated, "activation_fn": "silu"}
    ours = MoELayer(GATE, D, {**kind, **SIZES}, seeds=(0, 1))
    stacked_kind = {"type": "llama_ffn" if gated else "ffn", "activation_fn": "silu"}
    stacked = MoELayer(GATE, D, {**stacked_kind, **SIZES}, seeds=(0, 1))
    with torch.no_grad():
        for role in stacked.experts.dense_names:
            for view, tensor in zip(stacked.experts.dense_view(role), ours.experts.dense_view(role), strict=True):
                view.copy_(tensor)
    return ours, stacked


@pytest.mark.parametrize("gated", [False, True])
def test_results_and_gradients_are_those_of_stacked_weights(gated: bool) -> None:
    ours, stacked = pair(gated)
    for training in (True, False):
        xs = [tokens().requires_grad_() for _ in range(2)]
        ys = [layer.train(training)(x) for layer, x in zip((ours, stacked), xs, strict=True)]
        assert relative_rms(ys[0], ys[1]) < FP32
        for y in ys:
            y.square().sum().backward()
        assert relative_rms(xs[0].grad, xs[1].grad) < 10 * FP32
        grads = [layer.gates[0].sim_matrix.grad for layer in (ours, stacked)]
        assert relative_rms(*grads) < 10 * FP32
    down = stacked.experts.dense_parameters("down")[0]
    for slot, linear in enumerate(ours.experts.dense_parameters("down")):
        grad = torch.zeros_like(linear) if linear.grad is None else linear.grad
        assert relative_rms(grad.t() + 1, down.grad[slot] + 1) < 10 * FP32


def test_maps_are_linear_modules_with_the_names_of_the_state_dict() -> None:
    layer = MoELayer(GATE, D, {"type": "modules", "gated": True, "bias": False, **SIZES})
    linears = [name for name, m in layer.named_modules() if type(m) is nn.Linear]
    assert len(linears) == 3 * E
    assert {f"{name}.weight" for name in linears} == {k for k in layer.state_dict() if k.startswith("experts.")}
    again = MoELayer(GATE, D, {"type": "modules", "gated": True, "bias": False, **SIZES})
    again.load_state_dict(layer.state_dict())
    x = tokens()
    assert relative_rms(again.eval()(x), layer.eval()(x)) < FP32


def test_seeds_draw_each_slot() -> None:
    one, two = (MoELayer(GATE, D, {"type": "modules", **SIZES}, seeds=(0, 7)) for _ in range(2))
    weights = one.experts.dense_view("up")
    assert all(torch.equal(a, b) for a, b in zip(weights, two.experts.dense_view("up"), strict=True))
    assert not torch.equal(weights[0], weights[1])
    kept = copy.deepcopy(weights)
    with torch.no_grad():
        weights[0].zero_()
    one.experts.reset_parameters()
    assert torch.equal(one.experts.dense_view("up")[0], kept[0])


def test_a_slot_grows_as_a_copy() -> None:
    layer = MoELayer(GATE, D, {"type": "modules", **SIZES})
    layer.experts.copy_slot(3, [1])
    assert all(
        torch.equal(layer.experts.dense_view(role)[3], layer.experts.dense_view(role)[1])
        for role in ("up", "up_bias", "down", "down_bias")
    )


def test_an_expert_without_tokens_is_called_only_to_learn() -> None:
    layer = MoELayer(GATE, D, {"type": "modules", **SIZES})
    called: list[int] = []
    for expert in layer.experts.module:
        expert.register_forward_pre_hook(lambda _, args: called.append(len(args[0])))
    with torch.no_grad():
        layer.eval()(tokens())
    assert len(called) == 3  # the fourth slot is free
    assert 0 not in called
    layer.train()(tokens()).sum().backward()
    assert called.count(0) == 1
    assert not layer.experts.dense_parameters("up")[3].grad.any()


class Quantised(nn.Module):
    """What a quantizer puts in the place of a map: 8-bit integers and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_a_quantizer_reaches_them_and_slots_no_longer_grow() -> None:
    layer = MoELayer(GATE, D, {"type": "modules", "gated": True, "bias": False, **SIZES}).eval()
    x = tokens()
    exact = layer(x)
    for module in list(layer.experts.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Quantised(child))
    assert 0 < relative_rms(layer(x), exact) < 0.02
    with pytest.raises(ValueError, match=r"experts\.module\.0\.gate\.weight is a Parameter of torch\.int8"):
        layer.check_written()


class GatedBias(nn.Module):
    """A gated FFN whose maps have biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return y


class Plain(nn.Module):
    """An FFN with dropouts before and after its second map."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.middle = nn.Linear(D, H), nn.GELU(), nn.Dropout(0.1)
        self.down, self.last = nn.Linear(H, D), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.down(self.middle(self.act(self.up(x)))))
        return y


@pytest.mark.parametrize("ffn", [GatedBias, Plain])
@pytest.mark.parametrize("recipe", ["gmoe", "emoe"])
def test_converted_and_reverted(ffn: Any, recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ffn(), ffn()).eval()
    model[1].up.weight.requires_grad_(False)
    plain = copy.deepcopy(model)
    convert(model, "all", recipe, gate_type=GATE, num_experts=E, split="contiguous", experts="modules")
    layers = [m for m in model.modules() if isinstance(m, MoELayer)]
    assert all(isinstance(layer.experts, ModuleExperts) for layer in layers)
    assert not any(p.requires_grad for p in layers[1].experts.dense_parameters("up"))
    for layer in layers:
        with torch.no_grad():
            layer.gates[0].gates.fill_(-1)  # every token activates every expert
    assert relative_rms(model(tokens()), plain(tokens())) < 10 * FP32
    revert(model)
    state = plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_refusals() -> None:
    model = nn.Sequential(Plain()).eval()
    with pytest.raises(ValueError, match="experts = 'linear': give a dict of recompute and engine, 'modules', or None"):
        convert(model, "all", experts="linear")
    with pytest.raises(ValueError, match=r"is a gated FFN with biases, .* give experts='modules'"):
        convert(nn.Sequential(GatedBias()).eval(), "all")
    with pytest.raises(ValueError, match=r"experts\['hidden_size_per_expert'\] = 0"):
        MoELayer(GATE, D, {"type": "modules"})
    with pytest.raises(ValueError, match="unknown key 'engine' in experts of type 'modules'"):
        MoELayer(GATE, D, {"type": "modules", "engine": "torch", **SIZES})
