"""`DynMoECallback` in `transformers.Trainer` runs that are resumed, repeated, or on several ranks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import spawn_ranks
from hf_trainers import SAVING, Gradients, assert_same_state, state_of, trainer_of, transformers, with_callback
from tiny import CountedNet, Items, Net, assert_same_tensors

from dynmoe_tutel.integrations.transformers import FOLDER


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, float]]]:
    """Seven steps with updates after 3 and 6, and a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = trainer_of(Net(), folder, gradient_accumulation_steps=2, **SAVING)
    callback = with_callback(trainer, max_new_experts=2)
    trainer.train()
    assert {event.step for event in callback.events} == {3, 6}
    return folder, state_of(trainer, callback), [e for e in trainer.state.log_history if "moe/aux" in e]


@pytest.mark.parametrize(
    ("step", "where"),
    [(2, "in place"), (3, "in place"), (5, "in place"), (2, "moved to output_dir"), (2, "moved elsewhere")],
)
def test_resume_is_bitwise(step: int, where: str, uninterrupted: Any, tmp_path: Path) -> None:
    """Resume in the middle of a window (2, 5) and between two; the run writes the later checkpoints anew."""
    folder, expected, logged = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    source, given = run / f"checkpoint-{step}", {}
    if where == "moved elsewhere":
        source = Path(shutil.move(source, tmp_path / "best"))
        shutil.rmtree(run)
        given = {"resume_from_checkpoint": str(source)}
    written = json.loads((source / "trainer_state.json").read_text())
    written["stateful_callbacks"]["dynmoe_tutel"]["folder"] = str(folder if where == "in place" else "gone")
    (source / "trainer_state.json").write_text(json.dumps(written))
    trainer = trainer_of(Net(), run, gradient_accumulation_steps=2, **SAVING, **given)
    callback = with_callback(trainer, max_new_experts=2)
    trainer.train(resume_from_checkpoint=str(source))
    assert_same_state(state_of(trainer, callback), expected)
    drop = ("epoch", "step")
    again = [e for e in trainer.state.log_history if "moe/aux" in e]
    assert [{n: v for n, v in e.items() if n not in drop} for e in again] == [
        {n: v for n, v in e.items() if n not in drop} for e in logged
    ]


def test_resume_without_its_state_is_refused(uninterrupted: Any, tmp_path: Path) -> None:
    source = tmp_path / "copy"
    shutil.copytree(uninterrupted[0] / "checkpoint-2", source, ignore=shutil.ignore_patterns(FOLDER))
    written = json.loads((source / "trainer_state.json").read_text())
    written["stateful_callbacks"]["dynmoe_tutel"]["folder"] = str(tmp_path / "gone")
    (source / "trainer_state.json").write_text(json.dumps(written))
    trainer = trainer_of(Net(), tmp_path / "run", **SAVING)
    with_callback(trainer)
    with pytest.raises(ValueError, match="no state of DynMoECallback for step 2"):
        trainer.train(resume_from_checkpoint=str(source))


def test_resume_of_a_run_without_the_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(Net(), tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = trainer_of(Net(), tmp_path, max_steps=3)
    callback = with_callback(trainer)
    with caplog.at_level(logging.WARNING, "dynmoe_tutel"):
        trainer.train(resume_from_checkpoint=True)
    assert "the adaptive process starts anew" in caplog.text
    assert callback.controller.steps == 1


def test_state_loads_into_another_schedule(uninterrupted: Any, tmp_path: Path) -> None:
    trainer = trainer_of(Net(), tmp_path, gradient_accumulation_steps=2, **SAVING)
    callback = with_callback(trainer, max_new_experts=2, schedule={"every": 2, "start": 1})
    trainer.train(resume_from_checkpoint=str(uninterrupted[0] / "checkpoint-4"))
    assert callback.controller.steps == 7
    assert {event.step for event in callback.events if event.step > 4} <= {5, 7}
    assert callback.controller.state_dict()["values"]["window_open"]
    assert int(trainer.model.first.record.tokens) == 0, "a window opened after the update at 7"


def test_save_total_limit_and_best_model(tmp_path: Path) -> None:
    options = {"save_total_limit": 1, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(Net(), tmp_path, **(SAVING | options))
    callback = with_callback(trainer, schedule=2)
    trainer.train()
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == [Path(trainer.state.best_model_checkpoint).name]
    assert (tmp_path / left[0] / FOLDER / "state.json").is_file()
    from safetensors.torch import load_file

    assert_same_tensors(dict(trainer.model.state_dict()), load_file(tmp_path / left[0] / "model.safetensors"))
    assert callback.controller.steps == 7


def test_two_trainers_do_not_disturb_each_other(tmp_path: Path) -> None:
    def run(index: int, then: Any = None) -> dict[str, Any]:
        trainer = trainer_of(Net(), tmp_path / str(index), Items(seed=index), max_steps=4)
        callback = with_callback(trainer, schedule=2)
        if then is not None:
            trainer.add_callback(then())
        trainer.train()
        return state_of(trainer, callback)

    alone, inner = run(0), []

    class TrainAnother(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                inner.append(run(1))

    assert_same_state(run(0, TrainAnother), alone)
    assert_same_state(inner[0], run(1))


def test_training_again_starts_anew(tmp_path: Path) -> None:
    trainer = trainer_of(Net(), tmp_path, max_steps=2)
    callback = with_callback(trainer)
    trainer.train()
    first = callback.controller
    hooks = len(trainer.model.first._forward_hooks)
    trainer.train()
    assert callback.controller is not first
    assert callback.controller.steps == 2
    assert len(trainer.model.first._forward_hooks) == hooks == 0


def _rank(rank: int, folder: str) -> None:
    """Two micro-batches of two on each of two ranks; then the same from a checkpoint in the middle of a window."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    states, watch = [], Gradients()
    for name, checkpoint in (("whole", None), ("resumed", f"{folder}/whole/checkpoint-2")):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "callbacks": [watch]}
        trainer = trainer_of(CountedNet(), Path(folder) / name, **(SAVING | options))
        callback = with_callback(trainer, max_new_experts=2)
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append(state_of(trainer, callback))
    assert_same_state(states[1], states[0])
    scalars = [entry["moe/first/k"] for entry in trainer.state.log_history if "moe/aux" in entry]
    of_records = {name for name in states[0]["tensors"] if ".gates.0:" in name}
    common = {name: value for name, value in states[0]["tensors"].items() if name not in of_records}
    torch.save({"gradients": watch.steps[0], "state": common, "k": scalars}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    """The gradients equal one process's with the same items, and every rank resumes its own record."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    spawn_ranks(_rank, (str(tmp_path),), 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same_tensors(ranks[0]["state"], ranks[1]["state"])
    assert ranks[0]["k"] == ranks[1]["k"]
    watch = Gradients()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = trainer_of(CountedNet(), tmp_path / "one", callbacks=[watch], **options)
    with_callback(trainer)
    trainer.train()
    assert_same_tensors(ranks[0]["gradients"], watch.steps[0], rtol=1e-4, atol=1e-6)
