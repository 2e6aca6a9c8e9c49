"""An update resets the right part of the optimizers' state and leaves the rest alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from controller_case import (
    SLOTS,
    D,
    H,
    Net,
    near,
    slot_mask,
    train,
)

from dynmoe_tutel.adaptive.controller import ExpertController

pytestmark = pytest.mark.usefixtures("seeded")


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "sgd-nesterov-foreach": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.0),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.0, foreach=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.0, amsgrad=True, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.0),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.0, fused=True),
    "adamw-fused-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.0, amsgrad=True, fused=True),
}


class TestOptimizers:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_exactly_the_rows_of_changed_slots_go_to_zero(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        """Regression for upstream's defect D9: stale moments kept moving pruned experts and kicked grown ones."""
        model = Net(experts=3)
        optimizer = OPTIMIZERS[name](model.parameters())
        controller = ExpertController(model, optimizer, {"every": 2, "window": 1})
        batch = near(0, 1, 5)
        train(model, optimizer, controller, batch)
        for state in optimizer.state.values():
            for key, value in state.items():
                if key != "step":
                    value.fill_(7.0)
        model(batch).sum().backward()  # lr is 0: the step below changes only the moments of active slots
        reference = {id(p): dict(optimizer.state[p]) for p in model.parameters()}
        optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
        model.zero_grad()
        events = train(model, optimizer, controller, batch)
        assert [(e.slot, e.action) for e in events] == [(2, "pruned"), (2, "grown")]
        touched = 0
        for parameter_name, parameter in model.named_parameters():
            expected_zero = slot_mask(parameter_name, parameter, [2])
            assert set(optimizer.state[parameter]) == set(reference[id(parameter)])
            for key, value in optimizer.state[parameter].items():
                if key == "step":
                    assert float(value) == 1
                    continue
                touched += int(expected_zero.any())
                assert torch.equal(value == 0, expected_zero), f"{key} of {parameter_name}"
                assert (value[~expected_zero] == 7).all(), f"{key} of {parameter_name}"
        assert touched >= 6
        assert caplog.messages == []

    def test_a_pruned_slot_that_stays_free_is_reset_too(self) -> None:
        model = Net(experts=3)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        controller = ExpertController(model, optimizer, 2)
        train(model, optimizer, controller, near(0, 1, 2))
        train(model, optimizer, controller, near(0, 1, 2))
        train(model, optimizer, controller, near(0, 1))
        parameter = model.mlp.experts.batched_fc1_w
        assert optimizer.state[parameter]["exp_avg"][2].abs().sum() > 0
        assert [e.action for e in train(model, optimizer, controller, near(0, 1))] == ["pruned"]
        assert optimizer.state[parameter]["exp_avg"][2].abs().sum() == 0
        assert optimizer.state[parameter]["exp_avg"][1].abs().sum() > 0
        frozen = parameter[2].detach().clone()
        for _ in range(3):
            train(model, optimizer, controller, near(0, 1))
        assert torch.equal(parameter[2], frozen)

    def test_optimizers_in_a_list_share_the_model(self) -> None:
        model = Net(experts=3)
        gate, rest = list(model.mlp.gates.parameters()), list(model.mlp.experts.parameters())
        both = [torch.optim.SGD(gate, lr=0.0, momentum=0.9), torch.optim.AdamW(rest, lr=0.0)]
        controller = ExpertController(model, both, 1)
        model.mlp(near(0, 1, 2)).sum().backward()
        model.mlp.l_aux.backward()
        for optimizer in both:
            optimizer.step()
        controller.step()
        model.mlp(near(0, 1)).sum().backward()
        assert [e.action for e in controller.step()] == ["pruned"]
        assert both[0].state[gate[0]]["momentum_buffer"][:, 2].abs().sum() == 0
        assert both[0].state[gate[0]]["momentum_buffer"][:, :2].abs().sum() > 0
        for parameter in rest:
            moments = both[1].state[parameter]["exp_avg_sq"]
            assert moments[2].abs().sum() == 0
            assert moments[:2].abs().sum() > 0
        assert not any(parameter in both[0].state for parameter in rest), "an empty state entry was made"

    def test_master_copies_take_the_new_value(self) -> None:
        """Regression for upstream's defect S5: a grown expert was overwritten from its stale master copy."""
        model = Net(experts=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        controller = ExpertController(model, optimizer, 1)
        for parameter in model.parameters():
            optimizer.state[parameter]["master_param"] = parameter.detach().double() + 1
        before = {name: p.detach().double() for name, p in model.named_parameters()}
        assert [e.slot for e in train(model, optimizer, controller, near(0, 1, 5))] == [2]
        for name, parameter in model.named_parameters():
            mask = slot_mask(name, parameter, [2])
            expected = torch.where(mask, parameter.detach().double(), before[name] + 1)
            assert torch.equal(optimizer.state[parameter]["master_param"], expected), name

    def test_state_of_another_shape_is_left_alone_with_one_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Net(experts=2)
        optimizer = torch.optim.Adafactor(model.parameters(), lr=0.0)
        controller = ExpertController(model, optimizer, 1)
        train(model, optimizer, controller, near(0, 1))
        for axis in (5, 4):
            train(model, optimizer, controller, near(0, 1, 2, axis))
        about_fc1 = [m for m in caplog.messages if f"{(SLOTS, H, D)}" in m and "row_var" in m]
        assert len(about_fc1) == 1

    def test_averages_and_copies_take_the_new_value_and_unknown_state_is_warned_of(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """SGD's average and a schedule-free optimizer's z are weights, so zero would be wrong."""
        model = Net(experts=2)
        optimizer = torch.optim.ASGD(model.parameters(), lr=1e-3)
        controller = ExpertController(model, optimizer, 1)
        train(model, optimizer, controller, near(0, 1))
        for parameter in model.parameters():
            optimizer.state[parameter] |= {"z": parameter.detach() + 1, "curvature": torch.ones_like(parameter)}
        assert [e.slot for e in train(model, optimizer, controller, near(0, 1, 5))] == [2]
        for parameter in model.mlp.experts.parameters():
            state = optimizer.state[parameter]
            assert torch.equal(state["ax"][2], parameter[2])
            assert torch.equal(state["z"][2], parameter[2])
            assert not torch.equal(state["z"][1], parameter[1])
            assert not state["curvature"][2].any()
        assert [m for m in caplog.messages if "optimizer state 'curvature' is unknown" in m] == caplog.messages
        assert len(caplog.messages) == 1

    def test_no_optimizer_warns_once(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Net(experts=3)
        controller = ExpertController(model, None, 1)
        for _ in range(3):
            train(model, None, controller, near(0))
        assert [m for m in caplog.messages if "no optimizer given" in m] == caplog.messages
        assert len(caplog.messages) == 1
        caplog.clear()
        ExpertController(Net().requires_grad_(False), None, 1)
        assert caplog.messages == []
