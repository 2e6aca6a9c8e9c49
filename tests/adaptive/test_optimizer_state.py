"""An update resets the right part of the optimizers' state and leaves the rest alone."""

from __future__ import annotations

import importlib
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
from torch import Tensor
from torchvision_stand_in import import_timm

from dynmoe_tutel.adaptive.controller import ExpertController
from dynmoe_tutel.adaptive.optimizer_state import OptimizerRows

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

    @pytest.mark.parametrize("state", [torch.ones(7), torch.ones(SLOTS, H, D, dtype=torch.uint8)])
    def test_state_of_another_shape_or_type_is_left_alone_with_one_warning(
        self, caplog: pytest.LogCaptureFixture, state: Tensor
    ) -> None:
        model = Net(experts=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        controller = ExpertController(model, optimizer, 1)
        train(model, optimizer, controller, near(0, 1))
        optimizer.state[model.mlp.experts.batched_fc1_w]["absmax"] = state
        for axis in (5, 4):
            train(model, optimizer, controller, near(0, 1, 2, axis))
        about_fc1 = [m for m in caplog.messages if f"{(SLOTS, H, D)}" in m and "absmax" in m]
        assert len(about_fc1) == 1
        assert (state == 1).all()

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


def of_timm() -> Any:
    import_timm()
    return importlib.import_module("timm.optim")


def _named(model: Net) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "mlp" in name}


ELEMENTWISE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "adagrad-from-zero": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "timm-lion": lambda p: of_timm().Lion(p, lr=0.1),
    "timm-adabelief": lambda p: of_timm().AdaBelief(p, lr=0.1),
    "timm-madgrad": lambda p: of_timm().MADGRAD(p, lr=0.1, momentum=0.9),
    "timm-nadamw": lambda p: of_timm().NAdamW(p, lr=0.1),
    "timm-lookahead": lambda p: of_timm().Lookahead(torch.optim.SGD(p, lr=0.1, momentum=0.9)),
}
# a slot's step depends on the other slots, by a norm or by what they share of a factored state
COUPLED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "transformers-adafactor": lambda p: pytest.importorskip("transformers").Adafactor(
        p, lr=0.1, relative_step=False, beta1=0.9
    ),
    "timm-adafactor": lambda p: of_timm().Adafactor(p, lr=0.1),
    "timm-adafactor-bv": lambda p: of_timm().AdafactorBigVision(p, lr=0.1, min_dim_size_to_factor=2),
    "timm-lamb": lambda p: of_timm().Lamb(p, lr=0.1),
    "timm-muon": lambda p: of_timm().Muon(p, lr=0.1),
}


FIVE = 5  # slots; no other size is five


def grown_under(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[Net, torch.optim.Optimizer, list[int]]:
    """A model whose slot 2 was pruned after some steps and grew again, its optimizer and [2]."""
    model = Net(experts=3, slots=FIVE)
    optimizer = make(model.parameters())
    controller = ExpertController(model, optimizer, {"every": 4, "window": 1})
    for _ in range(3):
        train(model, optimizer, controller, near(0, 1, 2))
    with torch.no_grad():
        model.mlp.gates[0].sim_matrix.copy_(torch.eye(D)[:, :FIVE])
        model.mlp.gates[0].gates.fill_(0.5)
    model.mlp(near(0, 1, 5)).sum().backward()
    model.zero_grad()
    optimizer.step = lambda *_: None  # type: ignore[method-assign, assignment]
    assert [(e.slot, e.action) for e in train(model, optimizer, controller, near(0, 1, 5))] == [
        (2, "pruned"),
        (2, "grown"),
    ]
    del optimizer.step
    return model, optimizer, [2]


class TestFreshState:
    """A grown slot's state is that of a fresh parameter. Regression: zeros made Rprop's slot stand still for ever."""

    @pytest.mark.parametrize("name", ELEMENTWISE)
    def test_first_step_of_a_grown_slot_is_a_fresh_parameter_s(
        self, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Of one whose optimizer counts as many steps: all slots of a parameter share the counter."""
        model, optimizer, slots = grown_under(ELEMENTWISE[name])
        start = {n: p.detach().clone() for n, p in _named(model).items()}
        fresh = {n: torch.nn.Parameter(value.clone()) for n, value in start.items()}
        other = ELEMENTWISE[name](fresh.values())
        for parameter in fresh.values():
            parameter.grad = torch.zeros_like(parameter)
        other.step()  # makes the state, and with gradient zero leaves the moments as they start
        generator = torch.Generator().manual_seed(0)
        for key, parameter in _named(model).items():
            with torch.no_grad():
                fresh[key].copy_(start[key])
            for entry, value in optimizer.state[parameter].items():
                if not isinstance(value, Tensor) or value.dim() == 0:  # a counter
                    other.state[fresh[key]][entry] = value.clone() if isinstance(value, Tensor) else value
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            fresh[key].grad = parameter.grad.clone()
        optimizer.step()
        other.step()
        for key, parameter in _named(model).items():
            where = slot_mask(key, parameter, slots)
            if where.any():
                assert not torch.equal(parameter[where], start[key][where]), f"{key} stands still"
                torch.testing.assert_close(parameter[where], fresh[key][where], rtol=1e-6, atol=1e-7, msg=key)
        assert caplog.messages == []

    @pytest.mark.parametrize(
        ("shape", "index", "name", "of_state", "expected"),
        [
            ((6, 6), (slice(None), 2), "exp_avg_sq_row", (6,), []),  # means over the slots
            ((6, 6), (slice(None), 2), "exp_avg_sq_col", (6,), [(2,)]),
            ((6, 6), (slice(None), 2), "unknown", (6,), []),
            ((6, 6, 8), (2,), "exp_avg_sq_row", (6, 6), [(2,)]),
            ((6, 6, 8), (2,), "exp_avg_sq_col", (6, 8), [(2,)]),
            ((8, 6), (slice(None), 2), "row_var", (8, 1), []),
            ((8, 6), (slice(None), 2), "col_var", (1, 6), [(slice(None), 2)]),
        ],
    )
    def test_entries_of_a_slot_in_factored_state(
        self, shape: Any, index: Any, name: str, of_state: Any, expected: Any
    ) -> None:
        """Also where an axis is as long as another."""
        parameter = torch.nn.Parameter(torch.zeros(shape))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        optimizer.state[parameter][name] = torch.ones(of_state)
        assert [own for _, own in OptimizerRows([optimizer]).of(parameter, index)] == expected

    def test_an_accumulator_that_starts_at_one(self) -> None:
        """timm's RMSpropTF and torch's RMSprop have state of the same name."""
        model, optimizer, slots = grown_under(lambda p: of_timm().RMSpropTF(p, lr=0.1, momentum=0.9))
        for key, parameter in _named(model).items():
            where = slot_mask(key, parameter, slots)
            assert (optimizer.state[parameter]["square_avg"][where] == 1).all(), key
            assert not optimizer.state[parameter]["momentum_buffer"][where].any(), key

    @pytest.mark.parametrize("name", COUPLED)
    def test_rows_of_coupled_state_are_zero_and_others_stay(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        model, optimizer, slots = grown_under(COUPLED[name])
        generator = torch.Generator().manual_seed(0)
        seen = 0
        for key, parameter in _named(model).items():
            where = slot_mask(key, parameter, slots)
            for entry, value in optimizer.state[parameter].items():
                if not isinstance(value, Tensor) or value.dim() == 0 or not where.any():
                    continue
                axes = [axis for axis, size in enumerate(value.shape) if size == FIVE]
                if axes:
                    own = value.select(axes[0], slots[0])
                    rest = value.index_select(axes[0], torch.tensor([0, 1]))
                    seen += 1
                    assert not own.any(), f"{entry} of {key}"
                    assert rest.any(), f"{entry} of {key}"
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        assert seen
        assert caplog.messages == []
        before = {key: p.detach().clone() for key, p in _named(model).items()}
        optimizer.step()
        for key, parameter in _named(model).items():
            where = slot_mask(key, parameter, slots)
            moved = (parameter - before[key])[where]
            assert not where.any() or (moved.abs().max() > 0 and moved.isfinite().all()), key

    def test_the_history_of_lbfgs_starts_anew(self, caplog: pytest.LogCaptureFixture) -> None:
        """Its vectors run over all parameters; after an update they are of another function."""
        model = Net(experts=3)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01)
        controller = ExpertController(model, optimizer, 2)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(near(0, 1)).square().mean() + 0.01 * model.mlp.l_aux
            loss.backward()
            return loss

        for events in ([], ["pruned"]):
            optimizer.step(closure)
            assert next(iter(optimizer.state.values()))
            assert [event.action for event in controller.step()] == events
        assert not next(iter(optimizer.state.values()))
        assert [m for m in caplog.messages if "history" in m] == caplog.messages
        assert len(caplog.messages) == 1
        optimizer.step(closure)
