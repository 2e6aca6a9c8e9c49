"""`OverflowRepair` around the training step of a real `transformers.Trainer` with the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_trainers import Gradients, trainer_of, with_callback
from tiny import Net, assert_same_tensors
from torch import Tensor

from dynmoe_tutel import OverflowRepair


def trained(
    capacity: Any, folder: Path, accumulation: int
) -> tuple[list[dict[str, Tensor]], OverflowRepair, list[Any]]:
    """The gradients of each step; the repair; what was logged of the layers."""
    model, watch = Net(), Gradients()
    for layer in (model.first, model.second):
        layer.capacity = capacity
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    trainer = trainer_of(model, folder, callbacks=[watch], **options)
    repair, training_step = OverflowRepair(model), trainer.training_step
    trainer.training_step = lambda *given: repair(lambda: training_step(*given))
    with_callback(trainer)
    trainer.train()
    logged = [value for entry in trainer.state.log_history for name, value in entry.items() if "first" in name]
    return watch.steps, repair, logged


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_of_a_trainer(accumulation: int, tmp_path: Path) -> None:
    """The gradient of the auxiliary loss, which the callback adds, and its log are as without a drop."""
    found, repair, logged = trained(0.05, tmp_path, accumulation)
    expected, _, exactly = trained("exact", tmp_path, accumulation)
    assert repair.repeated == repair.steps == 2 * accumulation
    for a, b in zip(found, expected, strict=True):
        assert_same_tensors(a, b, rtol=1e-5, atol=1e-7)
    assert logged == pytest.approx(exactly)
    assert len(logged) > 4
