"""A controller made for a model that another one has left in the middle of a window."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from controller_case import D, Net, near, train

from dynmoe_tutel import ExpertController
from dynmoe_tutel.adaptive.policy import Decision


def left_behind() -> tuple[Net, ExpertController]:
    """A window with forwards whose tokens pass no threshold, and room for a sample of them."""
    torch.manual_seed(0)
    model = Net()
    controller = ExpertController(model, None, 3, max_new_experts=2)
    train(model, None, controller, near(0, 1, 4))
    return model, controller


@pytest.mark.parametrize("schedule", [2, {"every": 4, "window": 2}])
def test_it_starts_clean(schedule: Any) -> None:
    """Neither the record nor the sample of the earlier window reaches a decision of a policy of one's own."""
    model, _ = left_behind()
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    seen: dict[int, list[Any]] = {}
    for each in (model, fresh):
        records = seen.setdefault(id(each), [])

        def policy(record: Any, *_: Any, records: list[Any] = records) -> Decision:
            records.append({name: torch.as_tensor(value) for name, value in record.state_dict().items()})
            return Decision()

        controller = ExpertController(each, None, schedule, policy)
        assert each.mlp.record_routing == (schedule == 2)
        for _ in range(4):
            train(each, None, controller, near(0, 5))
    found, expected = seen.values()
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_number_of_tokens_that_a_user_keeps_stays() -> None:
    model = Net()
    model.mlp.record.keep_tokens = 7
    ExpertController(model, None, 3, max_new_experts=2)
    assert model.mlp.record.keep_tokens > 7
    ExpertController(model, None, 3)
    assert model.mlp.record.keep_tokens == 7


@pytest.mark.parametrize("end", ["another", "begin", "end", "close"])
def test_a_controller_without_its_window_is_refused(end: str) -> None:
    """It would update twice, or from forwards that are not its own. Nothing is counted or changed."""
    model, controller = left_behind()
    if end == "another":
        ExpertController(model, None, 3)
    elif end == "begin":
        model.mlp.begin_record_routing()
    elif end == "end":
        model.mlp.end_record_routing()
    else:
        controller.close()
    before, steps = copy.deepcopy(model.state_dict()), controller.steps
    for _ in range(3):
        with pytest.raises(RuntimeError, match="record window of this ExpertController is not open any more"):
            controller.step()
    assert controller.steps == steps
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_close_leaves_the_window_of_another() -> None:
    model, old = left_behind()
    new = ExpertController(model, None, 3)
    old.close()
    assert model.mlp.record_routing
    new.close()
    new.close()
    assert not model.mlp.record_routing
    model(torch.randn(5, D))
    assert int(model.mlp.record.tokens) == 0


def test_a_state_resumes_in_its_window() -> None:
    """`load_state_dict` brings the window back, with its forwards, whatever was left on the model since."""
    model, controller = left_behind()
    state, weights = controller.state_dict(), copy.deepcopy(model.state_dict())
    for _ in range(2):
        train(model, None, controller, near(0, 1, 4))
    other = ExpertController(model, None, 3, max_new_experts=2)
    train(model, None, other, near(2))  # left in the middle of a window, too
    model.load_state_dict(weights)
    resumed = ExpertController(model, None, 3, max_new_experts=2)
    resumed.load_state_dict(state)
    for _ in range(2):
        train(model, None, resumed, near(0, 1, 4))
    assert resumed.events == controller.events != []
    assert resumed.state_dict()["values"] == controller.state_dict()["values"]


def test_a_copied_model_has_a_window_of_its_own() -> None:
    model, controller = left_behind()
    copied = copy.deepcopy(model)
    tokens = int(model.mlp.record.tokens)
    copied.train()(torch.randn(5, D))
    other = ExpertController(copied, None, 3)
    train(copied, None, other, near(0))
    assert int(model.mlp.record.tokens) == tokens
    controller.step()
