"""Loading a layer's state into other active and slot counts, and refusing foreign states."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from helpers import FP32, assert_margin, relative_rms
from torch import Tensor, nn

from dynmoe_tutel import MoELayer, moe

D, H = 8, 5


def layer_with(slots: int = 6, start: int = 3, seed: int = 1, gate: Any = None, **experts: Any) -> Any:
    config = {"num_experts_per_device": start, "hidden_size_per_expert": H, **experts}
    gate = {"type": "top_any", "max_expert_num": slots, "init_t": 0.5} if gate is None else gate
    layer = moe.moe_layer(gate, D, config, seeds=(seed, seed + 1))
    for one in layer.gates:
        if one.adaptive:
            with torch.no_grad():
                one.gates.copy_(torch.linspace(-0.1, 0.2, one.slots))
    return layer


def tokens() -> Tensor:
    return torch.randn(40, D, generator=torch.Generator().manual_seed(0))


def same(first: Any, second: Any) -> bool:
    """Bitwise; with other numbers of slots within rounding: batched products of other shapes may sum otherwise."""
    x = tokens()
    for index in range(len(first.gates)):
        assert_margin(first, x, index)
    pairs = [(first.train(mode)(x), second.train(mode)(x)) for mode in (True, False)]
    if first.slots == second.slots:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(relative_rms(a, b) < FP32 for a, b in pairs)


class TestSameSlots:
    @pytest.mark.parametrize("active", [[0], [0, 1, 2], [1, 4], [0, 1, 2, 3, 4, 5]])
    def test_any_active_slots(self, active: list[int]) -> None:
        saved, other = layer_with(), layer_with(seed=5)
        for slot in range(6):
            saved.gates[0].experts_mask[slot] = float(slot in active)
        saved._num_global_experts.fill_(len(active))
        result = other.load_state_dict(saved.state_dict())
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert other.num_global_experts == len(active)
        assert other.gates[0].active().nonzero().squeeze(1).tolist() == active
        assert same(saved, other)

    @pytest.mark.parametrize("gate", [{"type": "top", "k": 2}, {"type": "cosine_top", "proj_dim": 4}])
    def test_fixed_k(self, gate: dict[str, Any]) -> None:
        saved, other = layer_with(gate=gate), layer_with(gate=gate, seed=5)
        other.load_state_dict(saved.state_dict())
        assert same(saved, other)

    def test_the_callers_dict_is_not_changed(self) -> None:
        state = layer_with(slots=4).state_dict()
        before = {name: value.clone() for name, value in state.items()}
        layer_with(slots=7).load_state_dict(state)
        assert list(state) == list(before)
        assert all(torch.equal(state[name], value) for name, value in before.items())

    def test_in_a_model(self) -> None:
        def model(seed: int) -> nn.Module:
            return nn.Sequential(nn.Linear(D, D), nn.ModuleDict({"moe": layer_with(seed=seed)})["moe"], layer_with(4))

        torch.manual_seed(0)
        saved, other = model(1), model(5)
        other.load_state_dict(saved.state_dict())
        assert torch.equal(saved(tokens()), other(tokens()))


class TestOtherSlots:
    @pytest.mark.parametrize("slots", [7, 12, 70])
    @pytest.mark.parametrize("experts", [{}, {"has_fc1_bias": False}, {"output_dim": 3}, {"type": "llama_ffn"}])
    def test_more_slots(self, experts: dict[str, Any], slots: int) -> None:
        saved, other = layer_with(6, **experts), layer_with(slots, seed=5, **experts)
        own = copy.deepcopy(other.state_dict())
        saved.gates[0].experts_mask[5] = 1
        saved._num_global_experts.fill_(4)
        other.load_state_dict(saved.state_dict())
        assert (other.num_global_experts, other.max_num_global_experts) == (4, slots)
        assert other.gates[0].active().nonzero().squeeze(1).tolist() == [0, 1, 2, 5]
        assert same(saved, other)
        for name, value in other.experts.state_dict().items():
            assert torch.equal(value[6:], own[f"experts.{name}"][6:]), "free slots keep what they were drawn with"
        assert torch.equal(other.gates[0].sim_matrix[:, 6:], own["gates.0.sim_matrix"][:, 6:])

    def test_free_slots_of_a_larger_layer_are_inactive(self) -> None:
        saved, other = layer_with(3, start=1), layer_with(6, start=6)
        other.load_state_dict(saved.state_dict())
        assert other.gates[0].active().tolist() == [True] + [False] * 5
        assert other.num_global_experts == 1

    @pytest.mark.parametrize("slots", [3, 4, 5])
    def test_fewer_slots_of_which_none_is_lost(self, slots: int) -> None:
        saved, other = layer_with(6), layer_with(slots, seed=5)
        other.load_state_dict(saved.state_dict())
        assert (other.num_global_experts, other.max_num_global_experts) == (3, slots)
        assert same(saved, other)

    @pytest.mark.parametrize(("lost", "least"), [([3], 4), ([3, 5], 6), ([5], 6)])
    def test_active_slots_that_would_be_lost_are_refused(self, lost: list[int], least: int) -> None:
        saved, other = layer_with(6), layer_with(3, seed=5)
        before = copy.deepcopy(other.state_dict())
        for slot in lost:
            saved.gates[0].experts_mask[slot] = 1
        with pytest.raises(ValueError) as error:
            other.load_state_dict(saved.state_dict())
        for word in (f"slots {lost}", "6 slots", "this layer 3", f"max_expert_num >= {least}"):
            assert word in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())

    def test_every_gate_of_a_list_counts(self) -> None:
        gates = [{"type": "top_any", "max_expert_num": n} for n in (6, 6)]
        saved, other = layer_with(gate=gates), layer_with(gate=[{**g, "max_expert_num": 3} for g in gates], seed=5)
        saved.gates[1].experts_mask[4] = 1
        with pytest.raises(ValueError, match=r"slots \[4\]"):
            other.load_state_dict(saved.state_dict())
        saved.gates[1].experts_mask[4] = 0
        other.load_state_dict(saved.state_dict())
        for index in (0, 1):
            assert torch.equal(saved(tokens(), index), other(tokens(), index))

    @pytest.mark.parametrize("kind", ["list", "batched"])
    def test_custom_experts(self, kind: str) -> None:
        class Batched(nn.Module):
            def __init__(self, local_experts: int) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(local_experts, D, D))

            def forward(self, x: Tensor, ctx: Any) -> Tensor:
                return torch.bmm(x, self.w)

        def layer(slots: int) -> Any:
            module: Any = [nn.Linear(D, D) for _ in range(slots)] if kind == "list" else Batched
            gate = {"type": "top_any", "max_expert_num": slots}
            return moe.moe_layer(gate, D, {"type": "custom", "num_experts_per_device": 3, "module": module})

        saved, larger, smaller = layer(6), layer(9), layer(4)
        for other in (larger, smaller):
            other.load_state_dict(saved.state_dict())
            assert same(saved, other)
            assert other.num_global_experts == 3

    def test_a_batched_module_whose_parts_are_numbered(self) -> None:
        """These numbers are not slots: nn.Sequential numbers its layers."""

        class Layers(nn.Sequential):
            def forward(self, x: Tensor, ctx: Any) -> Tensor:  # type: ignore[override]
                return super().forward(x)

        def layer() -> Any:
            module = Layers(*(nn.Linear(D, D) for _ in range(5)))
            gate = {"type": "top_any", "max_expert_num": 3}
            return moe.moe_layer(gate, D, {"type": "custom", "num_experts_per_device": 3, "module": module})

        saved, other = layer(), layer()
        other.load_state_dict(saved.state_dict())
        assert same(saved, other)

    def test_in_a_model_with_strict_off(self) -> None:
        saved, other = nn.ModuleDict({"moe": layer_with(6)}), nn.ModuleDict({"moe": layer_with(9, seed=5)})
        other.load_state_dict(saved.state_dict(), strict=False)
        assert same(saved["moe"], other["moe"])

    def test_another_device_or_dtype_of_what_was_saved(self) -> None:
        saved, other = layer_with(6), layer_with(9, seed=5)
        other.load_state_dict(copy.deepcopy(saved).double().state_dict())
        assert other.gates[0].sim_matrix.dtype == torch.float32
        assert same(saved, other)


class TestForeign:
    def test_upstreams_bias_shape(self) -> None:
        """Upstream's converters save biases as [E, 1, H]."""
        saved, other = layer_with(), layer_with(seed=5)
        state = dict(saved.state_dict())
        for name in ("experts.batched_fc1_bias", "experts.batched_fc2_bias"):
            state[name] = state[name].unsqueeze(1)
        other.load_state_dict(state)
        assert same(saved, other)
        larger = layer_with(9, seed=5)
        larger.load_state_dict(state)
        assert same(saved, larger)

    def test_missing_counts_are_read_from_the_mask(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING, "dynmoe_tutel")
        saved, other = layer_with(start=5), layer_with(start=2, seed=5)
        state = {name: value for name, value in saved.state_dict().items() if "num_global" not in name}
        other.load_state_dict(state)
        assert same(saved, other)
        assert int(other.gates[0].experts_mask.sum()) == 5
        assert other.num_global_experts == 5
        assert sum("_num_global_experts" in record.getMessage() for record in caplog.records) >= 1

    def test_a_model_without_the_layer_says_what_is_missing(self) -> None:
        model = nn.ModuleDict({"dense": nn.Linear(D, D), "moe": layer_with()})
        with pytest.raises(RuntimeError, match=r"moe\.gates\.0\.sim_matrix"):
            model.load_state_dict(nn.ModuleDict({"dense": nn.Linear(D, D)}).state_dict())

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("gates.0.sim_matrix", lambda t: t.t().contiguous()),
            ("experts.batched_fc1_w", lambda t: t.transpose(1, 2).contiguous()),
            ("experts.batched_fc2_w", lambda t: t.transpose(1, 2).contiguous()),
            ("experts.batched_fc1_w", lambda t: t.flatten()),
            ("experts.batched_fc1_w", lambda t: t.transpose(0, 1).contiguous()),
        ],
    )
    def test_another_layout_of_equal_size_is_refused(self, name: str, change: Any) -> None:
        """A transposed matrix has as many numbers: reshaping it would silently scramble the weights."""
        other = layer_with(seed=5)
        state = dict(layer_with().state_dict())
        state[name] = change(state[name])
        with pytest.raises((RuntimeError, ValueError), match=name.rsplit(".", 1)[-1]):
            other.load_state_dict(state)

    @pytest.mark.parametrize("cut", [lambda t: t[:-1], lambda t: t[..., :-1], lambda t: t[:0], lambda t: t.sum()])
    @pytest.mark.parametrize("name", ["experts.batched_fc1_w", "gates.0.sim_matrix", "gates.0.gates"])
    def test_a_truncated_tensor_is_refused(self, name: str, cut: Any) -> None:
        state = dict(layer_with().state_dict())
        state[name] = cut(state[name])
        for slots in (6, 9):
            with pytest.raises((RuntimeError, ValueError), match=name.rsplit(".", 1)[-1]):
                layer_with(slots, seed=5).load_state_dict(state)

    @pytest.mark.parametrize("name", ["experts_mask", "sim_matrix", "batched_fc2_w"])
    def test_a_missing_tensor_is_named(self, name: str) -> None:
        for slots in (6, 9):
            state = {key: value for key, value in layer_with().state_dict().items() if not key.endswith(name)}
            with pytest.raises((RuntimeError, ValueError), match=name):
                layer_with(slots, seed=5).load_state_dict(state)

    def test_another_hidden_size_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="batched_fc1_w"):
            layer_with().load_state_dict(layer_with(hidden_size_per_expert=H + 1).state_dict())

    def test_a_mask_without_an_active_expert_is_refused(self) -> None:
        """the design, section 3: a layer always has an active expert."""
        state = layer_with().state_dict()
        state["gates.0.experts_mask"] = torch.zeros(6)
        with pytest.raises(ValueError, match="experts_mask"):
            layer_with(seed=5).load_state_dict(state)

    @pytest.mark.parametrize("slots", [6, 9])
    @pytest.mark.parametrize("assign", [False, True])
    def test_averaged_masks_are_rounded_with_a_warning(
        self, slots: int, assign: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Regression: a mask of 0.02, of a dict that was averaged over a growth, counted as an active expert."""
        state = layer_with().state_dict()
        state["gates.0.experts_mask"] = torch.tensor([1, 0.98, 0.51, 0.02, 0.5, 0])
        state["_num_global_experts"] = torch.tensor(2)
        other = layer_with(slots, seed=5)
        other.load_state_dict(state, assign=assign)
        assert other.gates[0].experts_mask.tolist() == [1, 1, 1, *[0] * (slots - 3)]
        assert other.num_global_experts == int(other.state_dict()["_num_global_experts"]) == 3
        [message] = caplog.messages
        assert "gates.0.experts_mask" in message
        assert "[1, 2, 3, 4]" in message
        assert "averages=" in message


class TestTheShiftOfABudget:
    """`budget_shift` is there where the gate has a target, and only there."""

    @staticmethod
    def layer(**budget: Any) -> Any:
        gate = {"type": "top_any", "max_expert_num": 4, **({"budget": budget} if budget else {})}
        return moe.moe_layer(gate, 8, {"num_experts_per_device": 3, "hidden_size_per_expert": 4}, seeds=(1, 2))

    def test_a_state_without_one_starts_at_0(self, caplog: pytest.LogCaptureFixture) -> None:
        layer = torch.nn.Sequential(self.layer(target_k=2.0))
        layer[0].gates[0].budget_shift.fill_(0.3)
        layer.load_state_dict(torch.nn.Sequential(self.layer()).state_dict())
        assert layer[0].gates[0].budget_shift.tolist() == [0.0]
        assert "0.gates.0.budget_shift is missing in the checkpoint and is filled in" in caplog.text

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("budget", [{}, {"max_k": 2}])
    def test_a_state_with_one_needs_a_target(self, budget: dict[str, Any], strict: bool) -> None:
        saved = torch.nn.Sequential(self.layer(target_k=2.0)).state_dict()
        message = r"the shift of a budget, 0\.gates\.0\.budget_shift.*gate_type\['budget'\] = \{'target_k'"
        with pytest.raises(ValueError, match=message):
            torch.nn.Sequential(self.layer(**budget)).load_state_dict(saved, strict=strict)

    def test_by_gate_of_a_list(self) -> None:
        gates = [{"type": "top_any", "max_expert_num": 4, "budget": {"target_k": k}} for k in (1.5, 2.0)]
        experts = {"num_experts_per_device": 3, "hidden_size_per_expert": 4}
        first, second = (moe.moe_layer(gates, 8, experts) for _ in range(2))
        for gate, shift in zip(first.gates, (0.1, 0.2), strict=True):
            gate.budget_shift.fill_(shift)
        second.load_state_dict(first.state_dict())
        assert [gate.budget_shift.item() for gate in second.gates] == pytest.approx([0.1, 0.2])

    def test_another_target_takes_the_shift_over(self) -> None:
        first, second = self.layer(target_k=2.0), self.layer(target_k=1.5, max_k=2)
        first.gates[0].budget_shift.fill_(0.25)
        second.load_state_dict(first.state_dict())
        assert second.gates[0].budget_shift.tolist() == [0.25]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_shift_that_is_not_finite_is_refused(self, value: float) -> None:
        """It would silently leave one expert to each token, or all, and no step would mend it."""
        layer = self.layer(target_k=2.0)
        state = {**layer.state_dict(), "gates.0.budget_shift": torch.tensor([value])}
        with pytest.raises(ValueError, match=r"budget_shift of the checkpoint is \[-?(nan|inf)\].*torch.zeros"):
            layer.load_state_dict(state)


@pytest.mark.parametrize("name", ["thresholds", "steps"])
def test_a_routers_state_that_is_not_finite_is_refused(name: str) -> None:
    gate = {"type": "expert_threshold", "target_k": 2.0}
    layer = MoELayer(gate, 8, {"num_experts_per_device": 4, "hidden_size_per_expert": 4})
    state = layer.state_dict()
    state[f"gates.0.{name}"] = torch.full_like(state[f"gates.0.{name}"], float("nan"))
    with pytest.raises(ValueError, match=rf"gates\.0\.{name} of the checkpoint is \[nan.*finite numbers;"):
        layer.load_state_dict(state)
