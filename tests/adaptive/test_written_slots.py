"""Growth writes what the expert kind names as a slot's, all of it, or is refused by name before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from dynmoe_tutel import ExpertController, MoELayer
from dynmoe_tutel.adaptive.policy import Decision

D, H, E, START = 8, 6, 8, 3
pytestmark = pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*:FutureWarning")


class Scaled(nn.Module):
    """A parametrisation without right_inverse."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


TOOLS: dict[str, Callable[[nn.Module, str], Any]] = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "without right_inverse": lambda module, name: parametrize.register_parametrization(module, name, Scaled()),
    "old spectral_norm": nn.utils.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "prune": lambda module, name: prune.l1_unstructured(module, name, 0.5),
}
tools = pytest.mark.parametrize("tool", list(TOOLS))


def layer_with(kind: str = "ffn", **experts: Any) -> MoELayer:
    options = {"type": kind, "num_experts_per_device": START, **experts}
    if kind != "custom":
        options["hidden_size_per_expert"] = H
    return MoELayer({"type": "top_any", "max_expert_num": E}, D, options, seeds=(1, 2))


def tokens() -> Tensor:
    return torch.randn(300, D, generator=torch.Generator().manual_seed(0))


def grow(layer: MoELayer, init: str = "nearest") -> int:
    """Grow one expert towards the routing vector of slot 1; returns its slot."""
    w_D = layer.gates[0].sim_matrix.detach()[:, 1] + 0.01
    generator = torch.Generator().manual_seed(0)
    return layer.update_experts(Decision(grow=((w_D, "test"),)), init=init, generator=generator)[0].slot


def state(layer: MoELayer) -> dict[str, Tensor]:
    return copy.deepcopy(layer.state_dict())


def same(layer: MoELayer, before: dict[str, Tensor]) -> bool:
    """Whether no tensor changed, but those of spectral_norm's power iteration: each reading in training moves them."""
    after = layer.state_dict()
    fixed = [name for name in before if not name.endswith(("._u", "._v"))]
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in fixed)


@tools
@pytest.mark.parametrize("part", ["gates.0.sim_matrix", "experts.batched_fc1_w"])
class TestComputedTensors:
    """A write to a tensor that is computed from others would be lost."""

    def layer(self, part: str, tool: str) -> tuple[MoELayer, str]:
        owner, _, name = part.rpartition(".")
        layer = layer_with()
        TOOLS[tool](layer.get_submodule(owner), name)
        return layer, rf"{'gate 0' if 'gates' in part else 'the experts'}\.{name} is computed from other tensors"

    def test_the_controller_is_refused(self, part: str, tool: str) -> None:
        layer, message = self.layer(part, tool)
        with pytest.raises(ValueError, match=message):
            ExpertController(layer, torch.optim.SGD(layer.parameters(), lr=0.1), schedule=1)

    def test_growth_is_refused_and_changes_nothing(self, part: str, tool: str) -> None:
        layer, message = self.layer(part, tool)
        layer.begin_record_routing()
        layer(tokens())
        before, seen = state(layer), int(layer.record.tokens)
        with pytest.raises(ValueError, match=message):
            grow(layer)
        with pytest.raises(ValueError, match=message):
            layer.adaptive_update_experts()
        assert same(layer, before)
        assert int(layer.record.tokens) == seen

    def test_a_tool_that_comes_later_is_refused_at_the_update(self, part: str, tool: str) -> None:
        layer = layer_with()
        controller = ExpertController(layer, torch.optim.SGD(layer.parameters(), lr=0.0), schedule=1)
        owner, _, name = part.rpartition(".")
        TOOLS[tool](layer.get_submodule(owner), name)
        layer(tokens())
        before = state(layer)
        with pytest.raises(ValueError, match="is computed from other tensors"):
            controller.step()
        assert same(layer, before)

    def test_pruning_writes_no_such_tensor(self, part: str, tool: str) -> None:
        layer, _ = self.layer(part, tool)
        assert [change.slot for change in layer.update_experts(Decision(prune=((1, "test"),)))] == [1]
        assert layer.gates[0].active().tolist() == [True, False, True] + [False] * 5

    def test_a_reset_is_refused(self, part: str, tool: str) -> None:
        layer, _ = self.layer(part, tool)
        with pytest.raises(ValueError, match=r"sim_matrix|batched_fc1_w"):
            layer.reset_parameters()


class TestOfNoSlot:
    """A tensor is an expert's only because the kind says so, whatever its shape."""

    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    @pytest.mark.parametrize("init", ["nearest", "mean", "fresh"])
    def test_slopes_and_own_tensors_stay(self, kind: str, init: str) -> None:
        """Slopes, as many as slots, as a PReLU has them; a parameter and a buffer of the user's own."""
        layer = layer_with(kind, activation_fn=Slopes())
        layer.experts.register_parameter("own", nn.Parameter(torch.arange(float(E))))
        layer.experts.register_buffer("seen", torch.arange(E))
        with torch.no_grad():
            layer.experts.activation_fn.weight.copy_(torch.arange(E))
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        (layer(tokens()).square().sum() + layer.experts.own.square().sum()).backward()
        optimizer.step()
        others = [layer.experts.own, layer.experts.activation_fn.weight, layer.experts.seen]
        before = [t.detach().clone() for t in others]
        moments = [optimizer.state[p]["exp_avg"].clone() for p in others[:2]]
        slot = grow(layer, init)
        for parameter, index in layer.slot_parameters(slot):
            assert all(parameter is not other for other in others), index
        assert all(map(torch.equal, others, before))
        assert all(torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in zip(others[:2], moments, strict=True))

    def test_a_block_keeps_them_whole(self) -> None:
        layer = layer_with(activation_fn=Slopes())
        layer.experts.register_buffer("seen", torch.arange(E))
        layer.experts.keep_slots(2, 4)
        assert layer.experts.batched_fc1_w.shape == (4, H, D)
        assert layer.experts.activation_fn.weight.shape == layer.experts.seen.shape == (E,)

    def test_in_a_module_of_tutel_s_kind(self) -> None:
        layer = layer_with("custom", module=Batched)
        with torch.no_grad():
            layer.experts.module.slopes.weight.copy_(torch.arange(E))
            layer.experts.module.norm.running_mean.copy_(torch.arange(E))
        slot = grow(layer)
        assert torch.equal(layer.experts.module.w[slot], layer.experts.module.w[1])
        assert layer.experts.module.slopes.weight.tolist() == layer.experts.module.norm.running_mean.tolist()
        assert layer.experts.module.slopes.weight.tolist() == list(range(E))

    def test_in_a_module_that_names_its_slots(self) -> None:
        layer = layer_with("custom", module=Named)
        before = layer.experts.module.table.detach().clone()
        slot = grow(layer)
        assert torch.equal(layer.experts.module.inner.w[slot], layer.experts.module.inner.w[1])
        assert torch.equal(layer.experts.module.table, before)

    def test_a_wrong_name_is_refused(self) -> None:
        class Wrong(Named):
            slot_names = ("inner.slopes.alpha",)

        with pytest.raises(ValueError, match=r"slot_names of Wrong has 'inner\.slopes\.alpha'"):
            layer_with("custom", module=Wrong)

    def test_a_checkpoint_of_fewer_slots(self) -> None:
        """Slopes are no slots to add, and the gate's projection has as many rows as the layer slots."""
        small = MoELayer({"type": "top_any", "max_expert_num": 4}, D, {"hidden_size_per_expert": H}, seeds=(1, 2))
        large = MoELayer({"type": "top_any", "max_expert_num": D}, D, {"hidden_size_per_expert": H}, seeds=(3, 4))
        for layer in (small, large):
            layer.experts.register_parameter("own", nn.Parameter(torch.zeros(D)))
        saved = small.state_dict()
        saved["experts.own"] = torch.zeros(4)  # as long as the saved slots, and of no slot
        with pytest.raises(RuntimeError, match=r"experts\.own"):
            large.load_state_dict(saved)
        saved["experts.own"] = torch.arange(float(D))
        large.load_state_dict(saved)
        assert torch.equal(large.experts.own, torch.arange(float(D)))
        assert torch.equal(large.gates[0].sim_matrix[:, :4], small.gates[0].sim_matrix)


class Slopes(nn.Module):
    """PReLU with a slope a slot of the layer, applied to hidden units in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((E,), 0.25))

    def forward(self, h: Tensor) -> Tensor:
        slope_H = self.weight.repeat(H)[: h.shape[1]]
        return torch.where(h > 0, h, slope_H * h)


class Batched(nn.Module):
    """Tutel's kind, with layers of torch.nn that have as many channels as there are slots."""

    def __init__(self, num_experts_per_device: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(num_experts_per_device, D, D))
        self.slopes = nn.PReLU(E)
        self.norm = nn.BatchNorm1d(E)

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        return torch.bmm(x, self.w)


class Named(nn.Module):
    slot_names: tuple[str, ...] = ("inner.w",)

    def __init__(self, num_experts_per_device: int) -> None:
        super().__init__()
        self.inner = Batched(num_experts_per_device)
        self.table = nn.Parameter(torch.randn(num_experts_per_device, 5))

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        out: Tensor = self.inner(x, ctx)
        return out


class TestCustomExperts:
    def test_parametrised_linears_are_copied_whole(self) -> None:
        def expert() -> nn.Module:
            return nn.Sequential(
                parametrizations.weight_norm(nn.Linear(D, H)), nn.PReLU(), parametrizations.orthogonal(nn.Linear(H, D))
            )

        layer = layer_with("custom", module=expert)
        slot = grow(layer)
        x_TD = tokens()
        assert torch.equal(layer.experts.module[slot](x_TD), layer.experts.module[1](x_TD))

    @tools
    def test_a_stacked_tensor_is_refused(self, tool: str) -> None:
        """Old norms and pruning keep stacked tensors, whose rows are copied: the grown expert is its source."""
        layer = layer_with("custom", module=Batched)
        TOOLS[tool](layer.experts.module, "w")
        if tool.startswith("old") or tool == "prune":
            slot = grow(layer)
            layer(tokens())
            assert torch.allclose(layer.experts.module.w[slot], layer.experts.module.w[1], atol=1e-6)
            return
        before = state(layer)
        with pytest.raises(ValueError, match=r"the experts\.w is computed from other tensors \(parametrised by"):
            grow(layer)
        assert same(layer, before)

    def test_tied_to_all_others_is_no_slot_s_own(self) -> None:
        shared = nn.Linear(H, D)
        layer = layer_with("custom", module=[nn.Sequential(nn.Linear(D, H), shared) for _ in range(E)])
        before = shared.weight.detach().clone()
        slot = grow(layer)
        assert torch.equal(shared.weight, before)
        assert all(parameter is not shared.weight for parameter, _ in layer.slot_parameters(slot))
        assert torch.equal(layer.experts.module[slot](tokens()), layer.experts.module[1](tokens()))

    def test_tied_to_some_is_refused(self) -> None:
        experts = [nn.Sequential(nn.Linear(D, H), nn.Linear(H, D)) for _ in range(E)]
        experts[3][1] = experts[2][1]  # slot 3 grows, slot 2 is active
        layer = layer_with("custom", module=experts)
        before = state(layer)
        with pytest.raises(ValueError, match="slots 0 and 2 are tied"):
            grow(layer)
        assert same(layer, before)


def test_frozen_tensors_grow_and_stay_frozen() -> None:
    layer = layer_with()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    slot = grow(layer)
    assert torch.equal(layer.experts.batched_fc1_w[slot], layer.experts.batched_fc1_w[1])
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_quantised_experts_are_refused() -> None:
    layer = layer_with()
    layer.experts.batched_fc1_w = nn.Parameter(torch.zeros(E, H, D, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"the experts\.batched_fc1_w is torch\.int8 \[8, 6, 8\] \(quantised or packed\)"
    ):
        grow(layer)


@pytest.mark.parametrize("part", ["experts", "gate"])
def test_a_wrapper_with_parameters_of_its_own_is_refused(part: str) -> None:
    class Around(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.shift = inner, nn.Parameter(torch.zeros(D))

        def forward(self, *arguments: Any) -> Any:
            return self.inner(*arguments)

    layer = layer_with()
    if part == "experts":
        layer.experts = Around(layer.experts)
    else:
        layer.gates[0] = Around(layer.gates[0])
    assert layer(tokens()).isfinite().all()
    with pytest.raises(ValueError, match=r"wrapped by a Around with the parameter shift"):
        ExpertController(layer, torch.optim.SGD(layer.parameters(), lr=0.1), schedule=1)
    with pytest.raises(ValueError, match="reset_parameters: a Around with the parameter shift"):
        layer.reset_parameters()


@pytest.mark.parametrize("part", ["experts", "gate"])
def test_a_wrapper_without_parameters_grows(part: str) -> None:
    layer = layer_with()
    if part == "experts":
        layer.experts = torch.compile(layer.experts, backend="eager")
    else:
        layer.gates[0] = torch.compile(layer.gates[0], backend="eager")
    slot = grow(layer)
    assert layer.num_global_experts == START + 1
    layer.reset_parameters()
    assert slot == START
