"""`convert` takes a module for an FFN only if the replacement loses nothing and nothing else uses the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_rms
from torch import Tensor, nn
from torch.nn.utils import prune

from dynmoe_tutel import MoELayer
from dynmoe_tutel.convert import aux_loss, convert, revert
from dynmoe_tutel.convert.find_ffns import find_ffns

D, H = 8, 24
EXACT = 1e-6


class FFN(nn.Module):
    """An FFN with `drop` at "input", "hidden", "activated" or "output"."""

    def __init__(self, drop: nn.Module | None = None, place: str = "", act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, H), act or nn.GELU(), nn.Linear(H, D)
        self.drop, self.place = drop, place

    def at(self, place: str, x: Tensor) -> Tensor:
        return x if self.drop is None or place != self.place else self.drop(x)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.at("hidden", self.up(self.at("input", x))))
        return self.at("output", self.down(self.at("activated", h)))


class FunctionalDropout(FFN):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(self.act(self.up(x)), 0.5, self.training))


class Host(nn.Module):
    def __init__(self, *ffns: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ffns)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def tokens() -> Tensor:
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))


def hooked(ffn: FFN, part: str) -> FFN:
    ffn.get_submodule(part).register_forward_hook(lambda module, inputs, output: 2 * output)
    return ffn


def with_old_weight_norm() -> FFN:
    ffn = FFN()
    nn.utils.weight_norm(ffn.up)
    return ffn


def pruned() -> FFN:
    ffn = FFN()
    prune.l1_unstructured(ffn.down, "weight", 0.5)
    return ffn


def with_own_forward() -> FFN:
    """An FFN wrapped the way offloading libraries do."""
    ffn = FFN()
    inner = ffn.up.forward
    ffn.up.forward = lambda x: inner(x)  # type: ignore[method-assign]
    return ffn


@pytest.mark.parametrize(
    ("make", "ps"),
    [
        (lambda: FFN(), (0.0, 0.0)),
        (lambda: FFN(nn.Dropout(0.5), "activated"), (0.5, 0.0)),
        (lambda: FFN(nn.Dropout(0.5), "output"), (0.0, 0.5)),
        (lambda: FFN(nn.Dropout(0.5), "hidden", nn.ReLU()), (0.5, 0.0)),  # ReLU and dropout commute
    ],
)
def test_dropouts_that_the_layer_can_have(make: Callable[[], FFN], ps: tuple[float, float]) -> None:
    (ffn,) = find_ffns(Host(make()))
    assert (ffn.dropout, ffn.last_dropout) == ps


@pytest.mark.parametrize(
    "make",
    [
        lambda: FFN(nn.Dropout(0.5), "input"),
        lambda: FFN(nn.Dropout(0.5), "hidden"),
        lambda: FFN(nn.AlphaDropout(0.5), "activated"),
        lambda: FFN(nn.Dropout1d(0.5), "activated"),
        lambda: FFN(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), "activated"),
        FunctionalDropout,
    ],
)
def test_dropouts_that_would_be_lost_make_no_ffn(make: Callable[[], FFN]) -> None:
    """In evaluation all of these compute down(act(up(x)))."""
    state = torch.get_rng_state()
    model = Host(make()).train()
    after = torch.get_rng_state()
    assert find_ffns(model) == []
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(state, after)
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(FFN(), ""),
        lambda: hooked(FFN(), "up"),
        lambda: hooked(FFN(), "down"),
        with_old_weight_norm,
        pruned,
        with_own_forward,
    ],
)
def test_what_a_replacement_would_lose_is_left_alone(make: Callable[[], FFN]) -> None:
    model = Host(make(), FFN()).eval()
    expected = model(tokens())
    convert(model, "all", num_experts=4)
    assert [type(block) is MoELayer for block in model.blocks] == [False, True]
    assert relative_rms(model(tokens()), expected) < EXACT
    assert torch.equal(revert(model)(tokens()), expected)


def test_a_dropout_with_hooks_is_left_alone() -> None:
    ffn = FFN(nn.Dropout(0.5), "activated")
    ffn.drop.register_forward_hook(lambda *_: None)
    model = convert(Host(ffn, FFN()), "all", num_experts=4)
    assert [type(block) is MoELayer for block in model.blocks] == [False, True]


def test_an_activation_with_hooks_is_called() -> None:
    """One that only looks too: the fused activation of the same values would not run it."""
    model, calls = Host(FFN()), []
    model.blocks[0].act.register_forward_hook(lambda *_: calls.append(1))
    convert(model, "all", num_experts=4)
    calls.clear()
    model(tokens())
    assert calls


def test_hooks_are_named_where_such_a_module_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"'blocks.0' is a FFN with hooks, with the linear maps.*without hooks"):
        convert(Host(hooked(FFN(), ""), FFN()), "blocks.0", num_experts=4)
    with pytest.raises(ValueError, match=r"up \[24, 8\] \(with hooks, or a weight that is no plain parameter\), down"):
        convert(Host(hooked(FFN(), "up"), FFN()), "blocks.0", num_experts=4)


def test_a_linear_map_that_is_used_elsewhere_is_refused() -> None:
    """Its weight would be on the meta device there."""
    first, second = FFN(), FFN()
    second.up = first.up
    model = Host(first, second)
    expected = model(tokens())
    with pytest.raises(ValueError, match=r"'blocks.0': one of its linear maps is also 'up' of a FFN outside it"):
        convert(model, [0], num_experts=4)
    assert torch.equal(model(tokens()), expected)


def test_what_is_frozen_stays_frozen_map_by_map() -> None:
    model = Host(FFN(act=nn.PReLU()))
    for frozen in ("up.bias", "down.weight", "act.weight"):
        model.blocks[0].get_parameter(frozen).requires_grad_(False)
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    experts: Any = convert(model, "all", num_experts=4).blocks[0].experts  # type: ignore[union-attr]
    assert {name: p.requires_grad for name, p in experts.named_parameters()} == {
        "batched_fc1_w": True,
        "batched_fc1_bias": False,
        "batched_fc2_w": False,
        "batched_fc2_bias": True,
        "activation_fn.weight": False,
    }
    (model(tokens()).square().mean() + aux_loss(model)).backward()
    assert experts.batched_fc1_w.grad.abs().sum() > 0
    assert experts.batched_fc2_w.grad is None
    revert(model, expert=0)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learning


def test_corrections_of_fp32_bits_stay_out_of_another_dtype() -> None:
    """Three slots multiply `down` by 3; the error of dividing by 3 is kept in units of fp32's last place."""
    torch.manual_seed(0)
    model = convert(Host(FFN()), "all", "emoe", split="random", num_experts=3)
    layer: Any = model.blocks[0]
    assert layer._origin.undo[0] is not None
    scaled = layer.experts.batched_fc2_w.detach().to(torch.bfloat16).flatten(0, 1)
    revert(model.to(torch.bfloat16))
    places = layer._origin.neurons_EH.flatten().argsort()
    assert torch.equal(model.blocks[0].down.weight, (scaled[places] / 3).t())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert(3, "all"), "model must be a torch.nn.Module, got int"),  # type: ignore[arg-type]
        (lambda: revert(3), "model must be a torch.nn.Module, got int"),  # type: ignore[arg-type]
        (lambda: aux_loss(3), "model must be a torch.nn.Module, got int"),  # type: ignore[arg-type]
        (lambda: convert(Host(FFN()), "all", experts=3), "experts = 3: give a dict"),  # type: ignore[arg-type]
        (lambda: convert(Host(FFN()), "all", seed="a"), "seed = 'a': give an integer from 0"),  # type: ignore[arg-type]
        (lambda: convert(Host(FFN()), "all", seed=-1), "seed = -1: give an integer from 0"),
        (lambda: convert(Host(FFN()), "all", model_dim=8), "model_dim is that of the FFN"),
        (lambda: convert(Host(FFN()), True, num_experts=4), "layers: True: give indices or names"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
