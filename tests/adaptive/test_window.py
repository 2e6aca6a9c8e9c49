"""Record windows that the caller begins and ends, instead of the schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynmoe_tutel import ExpertController, MoELayer

D = 8


def small() -> tuple[nn.Module, Tensor]:
    layer = MoELayer(
        {"type": "top_any", "max_expert_num": 4},
        D,
        {"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 8},
        seeds=(1, 2),
    )
    return layer, torch.randn(32, D, generator=torch.Generator().manual_seed(3))


def test_the_update_follows_the_step_after_the_end() -> None:
    layer, x = small()
    controller = ExpertController(layer, schedule=1)
    layer(x)
    controller.begin_window()  # the schedule's window, and what it holds, is gone
    assert int(layer.record.tokens) == 0
    layer(x)
    assert controller.step() == [], "the schedule would update after each step"
    layer(x)
    assert int(layer.record.tokens) == 64, "a window goes over steps until it is ended"
    controller.end_window()
    layer(x)
    assert int(layer.record.tokens) == 64
    assert [event.action for event in controller.step()] == ["grown"]
    assert not layer.record_routing
    assert controller.step() == []


def test_micro_batches_of_one_step_share_a_window() -> None:
    layer, x = small()
    controller = ExpertController(layer, schedule=300)
    for _ in range(3):
        controller.begin_window()
        layer(x)
        controller.end_window()
    assert int(layer.record.tokens) == 96
    assert controller.step()
    controller.begin_window()
    assert int(layer.record.tokens) == 0


def test_an_end_without_a_window_is_refused() -> None:
    controller = ExpertController(small()[0], schedule=1)
    with pytest.raises(ValueError, match=r"begin_window\(\)"):
        controller.end_window()  # the schedule's window is not the caller's
    controller.leave_schedule()
    with pytest.raises(ValueError, match=r"begin_window\(\)"):
        controller.end_window()


@pytest.mark.parametrize("ended", [False, True])
def test_a_window_is_resumed(ended: bool) -> None:
    layer, x = small()
    controller = ExpertController(layer, schedule=1)
    controller.begin_window()
    layer(x)
    controller.step() if not ended else controller.end_window()
    other, _ = small()
    resumed = ExpertController(other, schedule=1)
    resumed.load_state_dict(controller.state_dict())
    assert other.record_routing is not ended
    if not ended:
        resumed.end_window()
    assert int(other.record.tokens) == 32
    assert len(resumed.step()) == 1
    assert resumed.step() == []


def test_another_window_is_noticed() -> None:
    layer, x = small()
    controller = ExpertController(layer, schedule=300)
    controller.begin_window()
    layer(x)
    layer.begin_record_routing()
    with pytest.raises(RuntimeError, match="not open any more"):
        controller.begin_window()
    with pytest.raises(RuntimeError, match="not open any more"):
        controller.step()
