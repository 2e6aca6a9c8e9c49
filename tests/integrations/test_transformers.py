"""`DynMoECallback` in real `transformers.Trainer` runs of a few steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_trainers import WEIGHT, Gradients, trainer_of, transformers, with_callback
from tiny import TOKENS, CountedNet, Items, Net, assert_same_tensors, expected_gradients, gradients
from torch import Tensor, nn

from dynmoe_tutel.integrations.transformers import DynMoECallback


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
    """12 items are 3 batches: accumulating 2, the second step of an epoch has only one."""
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
    """The model's outputs then have no loss."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    found = first_gradients(Net(), tmp_path, compute_loss_func=loss, gradient_accumulation_steps=4)
    assert_same_tensors(found, expected_gradients(Net(), WEIGHT, Items()), rtol=1e-4, atol=1e-6)


def test_gradient_scaler(tmp_path: Path) -> None:
    """fp16 scales the loss, so the auxiliary loss's gradient must get the same scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = first_gradients(Net(), tmp_path, scaler, gradient_accumulation_steps=4)
    found = {name: gradient / 1024 for name, gradient in scaled.items()}
    assert_same_tensors(found, expected_gradients(Net(), WEIGHT, Items()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_skipped_step_is_none(optim: str, tmp_path: Path) -> None:
    """The scaler finds an infinite gradient in the second of four steps; a fused optimizer skips it by itself."""
    model = Net()
    trainer = trainer_of(model, tmp_path, optim=optim)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    callback = with_callback(trainer, schedule=2)
    moved = []

    class Infinite(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                model.head.weight.grad.fill_(torch.inf)
            moved.append(model.head.weight.detach().clone())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moved[-1] = not torch.equal(model.head.weight, moved[-1])

    trainer.add_callback(Infinite())
    trainer.train()
    assert moved == [True, False, True, True]
    assert callback.controller.steps == 3
    assert {event.step for event in callback.events} == {2}


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
    """The record counts only training tokens, with evaluations at every step and before the first."""
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

    class Reporter(transformers.TrainerCallback):  # runs before ours, as reporters do
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


def test_a_budget_is_held_and_logged(tmp_path: Path) -> None:
    options = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 40, "learning_rate": 0.001}
    trainer = trainer_of(Net(budget={"target_k": 1.5}), tmp_path, gradient_accumulation_steps=2, **options)
    with_callback(trainer, schedule=1000)
    trainer.train()
    scalars = [entry for entry in trainer.state.log_history if "moe/aux" in entry]
    for layer in ("first", "second"):
        k = [entry[f"moe/{layer}/k"] for entry in scalars]
        assert k[0] < 0.8
        assert sum(k[-20:]) / 20 == pytest.approx(1.5, rel=0.05)
        assert scalars[-1][f"moe/{layer}/target_k"] == 1.5
        assert scalars[-1][f"moe/{layer}/shift"] == pytest.approx(
            float(getattr(trainer.model, layer).gates[0].budget_shift)
        )


def test_the_logged_loss_is_that_of_the_task(tmp_path: Path) -> None:
    logged = []
    for weight in (0.0, WEIGHT):
        trainer = trainer_of(Net(), tmp_path, max_steps=1, logging_strategy="steps", logging_steps=1)
        with_callback(trainer, aux_weight=weight)
        trainer.train()
        logged += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == logged[1]


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
    """Gradients include `aux_loss`; no record contains padding or evaluations."""
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
    with pytest.raises(ValueError, match="schedule: unknown key 'evry'"):  # at construction, not when training begins
        DynMoECallback(trainer, schedule={"evry": 3})
    with pytest.raises(ValueError, match=r"trainer must be the transformers\.Trainer itself, got Net"):
        DynMoECallback(trainer.model)
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
