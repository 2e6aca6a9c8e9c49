"""Short runs of transformers' Trainer with the callback, and the results to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import Items, assert_same_tensors, gradients
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")
transformers.utils.logging.set_verbosity_error()

from dynmoe_tutel.integrations.transformers import DynMoECallback  # noqa: E402

WEIGHT = 0.3


class Gradients(transformers.TrainerCallback):
    """Records the gradients that the optimizer gets at each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(gradients(kwargs["model"]))


def trainer_of(model: nn.Module, folder: Path, items: Items | None = None, **given: Any) -> Any:
    own = {"callbacks", "compute_loss_func", "compute_metrics"}
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    } | {name: value for name, value in given.items() if name not in own}
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **arguments),
        train_dataset=Items() if items is None else items,
        eval_dataset=Items(6, seed=1),
        **{name: value for name, value in given.items() if name in own},
    )


def with_callback(trainer: Any, **options: Any) -> Any:
    callback = DynMoECallback(trainer, **{"schedule": 3, "aux_weight": WEIGHT, **options})
    trainer.add_callback(callback)
    return callback


SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_strategy": "steps", "logging_steps": 3, "max_steps": 7}


def state_of(trainer: Any, callback: Any) -> dict[str, Any]:
    controller = callback.controller.state_dict()
    moments = trainer.optimizer.state_dict()["state"]
    tensors = {f"{i}/{n}": v for i, s in moments.items() for n, v in s.items()}
    tensors |= {f"model/{n}": v for n, v in trainer.model.state_dict().items()}
    return {"tensors": tensors | controller["tensors"], "values": controller["values"]}


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same_tensors(found["tensors"], expected["tensors"])
    assert found["values"] == expected["values"]
