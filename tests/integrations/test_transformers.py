"""`DynMoECallback` in real `transformers.Trainer` runs of a few steps."""

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
import torch.nn.functional as F
from helpers import spawn_ranks
from tiny import TOKENS, CountedNet, Items, Net, assert_same_tensors, expected_gradients, gradients
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")

from dynmoe_tutel.integrations.transformers import FOLDER, DynMoECallback  # noqa: E402

WEIGHT = 0.3


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


class Gradients(transformers.TrainerCallback):
    """What the optimizer was given at each step."""

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


def first_gradients(model: nn.Module, folder: Path, scaler: Any = None, **given: Any) -> dict[str, Tensor]:
    """The gradients of the first step, over all items."""
    watch = Gradients()
    trainer = trainer_of(model, folder, callbacks=[watch], max_steps=1, **given)
    trainer.accelerator.scaler = scaler
    with_callback(trainer)
    trainer.train()
    return watch.steps[0]


@pytest.mark.parametrize(
    ("kind", "size", "accumulation"),
    [(Net, 16, 1), (Net, 4, 4), (CountedNet, 16, 1), (CountedNet, 4, 4), (CountedNet, 5, 4)],
)
def test_gradient_is_that_of_one_batch(kind: Any, size: int, accumulation: int, tmp_path: Path) -> None:
    expected = expected_gradients(kind(), WEIGHT, Items())
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    assert_same_tensors(first_gradients(kind(), tmp_path, **options), expected, rtol=1e-4, atol=1e-6)
    without = expected_gradients(kind(), 0.0, Items())
    assert not torch.allclose(expected["first.gates.0.sim_matrix"], without["first.gates.0.sim_matrix"], rtol=1e-2)


@pytest.mark.parametrize("kind", [Net, CountedNet])
def test_last_step_of_an_epoch_has_fewer_micro_batches(kind: Any, tmp_path: Path) -> None:
    """12 items are 3 batches: with 2 to accumulate, the second step of an epoch has one."""
    watch = Gradients()
    options = {"gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 0.0}
    trainer = trainer_of(kind(), tmp_path, Items(12), callbacks=[watch], **options)
    with_callback(trainer)
    trainer.train()
    plain = [with_none(kind, tmp_path, options, weight) for weight in (0.0, WEIGHT)]
    of_aux = {
        n: expected_gradients(Net(), WEIGHT, Items())[n] - g for n, g in expected_gradients(Net(), 0.0, Items()).items()
    }
    for step in range(2):
        for name in ("first.gates.0.sim_matrix", "second.gates.0.sim_matrix"):
            torch.testing.assert_close(plain[1][step][name] - plain[0][step][name], of_aux[name], rtol=1e-3, atol=1e-5)
    assert len(watch.steps) == 2


def with_none(kind: Any, folder: Path, options: dict[str, Any], weight: float) -> list[dict[str, Tensor]]:
    watch = Gradients()
    trainer = trainer_of(kind(), folder, Items(12), callbacks=[watch], **options)
    with_callback(trainer, aux_weight=weight)
    trainer.train()
    return watch.steps


def test_loss_function_of_the_user(tmp_path: Path) -> None:
    """The model's outputs have no loss then."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    found = first_gradients(Net(), tmp_path, compute_loss_func=loss, gradient_accumulation_steps=4)
    assert_same_tensors(found, expected_gradients(Net(), WEIGHT, Items()), rtol=1e-4, atol=1e-6)


def test_gradient_scaler(tmp_path: Path) -> None:
    """fp16 scales the loss: the gradient of the auxiliary loss must be scaled alike."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = first_gradients(Net(), tmp_path, scaler, gradient_accumulation_steps=4)
    found = {name: gradient / 1024 for name, gradient in scaled.items()}
    assert_same_tensors(found, expected_gradients(Net(), WEIGHT, Items()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    model = Net(checkpointing=reentrant)
    found = first_gradients(model, tmp_path, gradient_accumulation_steps=4)
    assert_same_tensors(found, expected_gradients(Net(), WEIGHT, Items()), rtol=1e-4, atol=1e-6)
    records = (model.first.record, model.second.record)
    assert [int(record.tokens) for record in records] == [16 * TOKENS] * 2, "a recompute is not recorded"


def test_autocast(tmp_path: Path) -> None:
    found = first_gradients(Net(), tmp_path, bf16=True, gradient_accumulation_steps=4)
    expected, name = expected_gradients(Net(), WEIGHT, Items()), "first.gates.0.sim_matrix"
    assert torch.linalg.vector_norm(found[name] - expected[name]) < 0.05 * torch.linalg.vector_norm(expected[name])


def test_compiled_model(tmp_path: Path) -> None:
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "logging_strategy": "steps"}
    model = Net()
    found = first_gradients(model, tmp_path, per_device_train_batch_size=16, logging_steps=1, **options)
    assert_same_tensors(found, expected_gradients(Net(), WEIGHT, Items()), rtol=1e-4, atol=1e-6)
    assert int(model.first.record.tokens) == 16 * TOKENS
    torch._dynamo.reset()


def test_evaluation_and_prediction_are_not_recorded(tmp_path: Path) -> None:
    """The record's token count is that of the training tokens, with evaluations at every step and before the first."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "logging_steps": 2}
    model = Net()
    trainer = trainer_of(
        model, tmp_path, max_steps=4, gradient_accumulation_steps=2, logging_strategy="steps", **options
    )
    callback = with_callback(trainer, schedule={"every": 100})
    seen = []

    class Predict(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                trainer.predict(Items(7, seed=2))
            seen.append([int(layer.record.tokens) for layer in (model.first, model.second)])

    trainer.add_callback(Predict())
    trainer.train()
    assert seen == [[step * 2 * 4 * TOKENS] * 2 for step in (1, 2, 3, 4)]
    assert callback.controller.steps == 4
    trainer.evaluate()
    trainer.predict(Items(7, seed=2))
    model.train()(x=Items().x)
    assert int(model.first.record.tokens) == 4 * 2 * 4 * TOKENS, "nothing is recorded once training has ended"


def test_logs(tmp_path: Path) -> None:
    watch: list[dict[str, float]] = []

    class Reporter(transformers.TrainerCallback):  # before ours, as reporters are
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            watch.append(dict(logs))

    trainer = trainer_of(Net(), tmp_path, logging_strategy="steps", logging_steps=2, callbacks=[Reporter()])
    callback = with_callback(trainer, schedule=2)
    trainer.train()
    scalars = [entry for entry in trainer.state.log_history if "moe/aux" in entry]
    assert [entry["step"] for entry in scalars] == [2, 4]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]
    assert sum("moe/aux" in logs for logs in watch) == 2
    for entry in scalars:
        for layer in ("first", "second"):
            bins = [v for name, v in entry.items() if name.startswith(f"moe/{layer}/k_histogram/")]
            assert sum(bins) == pytest.approx(1)
            mean = sum(k * entry[f"moe/{layer}/k_histogram/{k}"] for k in range(len(bins)))
            assert entry[f"moe/{layer}/k"] == pytest.approx(mean)
            assert entry[f"moe/{layer}/unrouted"] == pytest.approx(bins[0])
            assert entry[f"moe/{layer}/load_max_over_mean"] >= 1
    events = [(e.step, e.layer, e.action) for e in callback.events]
    assert events
    for entry in scalars:
        for layer in ("first", "second"):
            for action in ("grown", "pruned"):
                assert entry[f"moe/{layer}/{action}"] == events.count((entry["step"], layer, action))
    assert scalars[0]["moe/aux"] == pytest.approx(scalars[0]["moe/first/aux"] + scalars[0]["moe/second/aux"])
    assert scalars[-1]["moe/first/experts"] == trainer.model.first.num_global_experts


def test_the_logged_loss_is_that_of_the_task(tmp_path: Path) -> None:
    logged = []
    for weight in (0.0, WEIGHT):
        trainer = trainer_of(Net(), tmp_path, max_steps=1, logging_strategy="steps", logging_steps=1)
        with_callback(trainer, aux_weight=weight)
        trainer.train()
        logged += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == logged[1]


def state_of(trainer: Any, callback: Any) -> dict[str, Any]:
    controller = callback.controller.state_dict()
    moments = trainer.optimizer.state_dict()["state"]
    tensors = {f"{i}/{n}": v for i, s in moments.items() for n, v in s.items()}
    tensors |= {f"model/{n}": v for n, v in trainer.model.state_dict().items()}
    return {"tensors": tensors | controller["tensors"], "values": controller["values"]}


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same_tensors(found["tensors"], expected["tensors"])
    assert found["values"] == expected["values"]


SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_strategy": "steps", "logging_steps": 3, "max_steps": 7}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, float]]]:
    """Seven steps with updates after 3 and 6, a checkpoint at each."""
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
    """In the middle of a window (2, 5) and between two; the later checkpoints of the first run are written anew."""
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


def test_fixed_k_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(Net("top"), tmp_path, logging_strategy="steps", logging_steps=2)
    callback = with_callback(trainer)
    with caplog.at_level(logging.WARNING, "dynmoe_tutel"):
        trainer.train()
    assert "schedule is ignored" in caplog.text
    assert callback.controller is None
    assert callback.events == []
    assert [e["moe/first/k"] for e in trainer.state.log_history if "moe/aux" in e] == [1, 1]


def test_a_converted_bert(tmp_path: Path) -> None:
    """Gradients are those of the loss plus `aux_loss`; padding is in no record, evaluations neither."""
    from dynmoe_tutel.convert import aux_loss, convert

    def bert() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        config = transformers.BertConfig(
            vocab_size=20, **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = transformers.BertForSequenceClassification(config)
        convert(model, layers="all", gate_type={"type": "top_any", "max_expert_num": 6}, num_experts=3)
        return model

    words = torch.randint(1, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.arange(8).remainder(4).unsqueeze(1) + 3
    items = [{"input_ids": w, "attention_mask": m.long(), "labels": w[0] % 2} for w, m in zip(words, mask, strict=True)]
    watch, model = Gradients(), bert()
    model.accepts_loss_kwargs = False  # its mean ignores num_items_in_batch, but the Trainer of 5.24 believes otherwise
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = trainer_of(model, tmp_path, items, callbacks=[watch], **options, eval_strategy="steps", eval_steps=1)
    trainer.eval_dataset = items
    callback = with_callback(trainer)
    trainer.train()
    assert {int(layer.record.tokens) for layer in callback.controller._layers} == {int(mask.sum())}

    expected = bert()
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    (expected(**batch).loss + aux_loss(expected, WEIGHT)).backward()
    assert_same_tensors(watch.steps[0], gradients(expected), rtol=1e-3, atol=1e-6)


def test_what_it_refuses(tmp_path: Path) -> None:
    trainer = trainer_of(Net(), tmp_path)
    with pytest.raises(ValueError, match=r"must have a dynmoe_tutel\.MoELayer .* got a Dense without one"):
        DynMoECallback(trainer_of(Dense(), tmp_path))
    with pytest.raises(ValueError, match="unknown option 'pacience': allowed are aux_weight, schedule"):
        DynMoECallback(trainer, pacience=2)
    for weight in (-1, float("nan"), "1", True):
        with pytest.raises(ValueError, match="aux_weight must be a number of at least 0"):
            DynMoECallback(trainer, aux_weight=weight)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel copies"):
        DynMoECallback(trainer)
    trainer.args._n_gpu = 0
    one, two = DynMoECallback(trainer, schedule=2), DynMoECallback(trainer, schedule=2)
    trainer.add_callback(one)
    with pytest.raises(ValueError, match="another DynMoECallback already"):
        DynMoECallback(trainer)
    trainer.add_callback(two)
    with pytest.raises(ValueError, match="another DynMoECallback already"):
        trainer.train()


class Dense(nn.Module):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": x.mean()}


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
    """The gradients are those of one process with the same items, and every rank resumes its own record."""
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
