"""`DynMoECallback` with transformers' Trainer on DeepSpeed: as without it, and bitwise after a resume."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_jobs import WITHOUT, Model, difference, launch, model_of, whole
from torch import Tensor
from torch.utils.data import Dataset

pytestmark = WITHOUT
STEPS = 6
ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.0, "torch_adam": True}}


class Items(Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(200, 8, generator=generator)
        self.labels = torch.randint(0, 3, (200,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


class Hosted(Model):
    """The loss of the task alone, under the names of transformers."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        hidden = self.inner(x)
        return {"loss": F.cross_entropy(self.outer(hidden + self._mixed(hidden)[0]), labels)}


def hosted(**options: Any) -> Hosted:
    model = model_of(**options)
    model.__class__ = Hosted
    return model  # type: ignore[return-value]


def trainer_of(folder: str, stage: int | None, **given: Any) -> Any:
    """A Trainer and its callback; without DeepSpeed where `stage` is None."""
    import transformers
    from accelerate.state import AcceleratorState, PartialState

    from dynmoe_tutel.integrations.transformers import DynMoECallback

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    if stage is not None:
        given["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            **({"optimizer": ADAM} if given.pop("in_config", True) else {}),
        }
    model = hosted(**given.pop("model", {}))
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        **given,
    }
    trainer = transformers.Trainer(model, transformers.TrainingArguments(folder, **arguments), train_dataset=Items())
    callback = DynMoECallback(trainer, schedule=2, aux_weight=0.3)
    trainer.add_callback(callback)
    return trainer, callback


def state(trainer: Any, callback: Any) -> dict[str, Any]:
    return {"weights": whole(trainer.model), "events": [str(event) for event in callback.events]}


def trained(rank: int, folder: str) -> dict[str, Any]:
    found = {}
    runs: dict[str, dict[str, Any]] = {
        "plain": {"stage": None},
        "zero 0": {"stage": 0},
        "zero 1, Trainer's optimizer": {"stage": 1, "in_config": False},
        "zero 2": {"stage": 2},
        "ep 1": {"stage": 2, "model": {"ep_size": 1}},
        "ep 2": {"stage": 2, "model": {"ep_size": 2}},
    }
    for name, options in runs.items():
        trainer, callback = trainer_of(f"{folder}/{name}", **options)
        trainer.train()
        found[name] = state(trainer, callback)
    saving = {"save_strategy": "steps", "save_steps": 3}
    for name in ("ep 2", "zero 2"):
        where = f"{folder}/saved {name}"
        trainer, callback = trainer_of(where, **runs[name], **saving)
        trainer.train()
        found[f"saving {name}"] = state(trainer, callback)
        trainer, callback = trainer_of(where, **runs[name], **saving)
        trainer.train(resume_from_checkpoint=f"{where}/checkpoint-3")
        found[f"resumed {name}"] = state(trainer, callback)
    try:
        trainer_of(f"{folder}/refused", 3)
    except ValueError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("trainer")
    return launch(trained, folder, 2, str(folder))


@pytest.mark.parametrize(
    ("name", "as_in"),
    [("zero 0", "plain"), ("zero 1, Trainer's optimizer", "plain"), ("zero 2", "plain"), ("ep 2", "ep 1")],
)
def test_deepspeed_changes_no_weight(results: list[dict[str, Any]], name: str, as_in: str) -> None:
    for result in results:
        assert result[name]["events"] == result[as_in]["events"] != []
        assert difference(result[name]["weights"], result[as_in]["weights"]) < 1e-6
        assert difference(result[name]["weights"], results[0][name]["weights"]) == 0, "ranks differ"


@pytest.mark.parametrize("name", ["zero 2", "ep 2"])
def test_a_resumed_training_is_bitwise_the_whole_one(results: list[dict[str, Any]], name: str) -> None:
    for result in results:
        for kind in ("saving", "resumed"):
            assert result[f"{kind} {name}"]["events"] == result[name]["events"]
            assert difference(result[f"{kind} {name}"]["weights"], result[name]["weights"]) == 0, kind


def test_zero_3_is_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert re.search("choose stage 0, 1 or 2", result["refused"])
