"""`DynMoECallback` in real Lightning runs of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOKENS, Items, Net, assert_same_tensors, expected_gradients, gradients
from torch import Tensor, nn
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install '.[test]'")

from dynmoe_tutel.integrations.lightning import DynMoECallback  # noqa: E402

WEIGHT = 0.3


class Module(lightning.LightningModule):
    def __init__(self, manual: bool = False, lr: float = 0.05, **options: Any) -> None:
        super().__init__()
        self.lr = lr
        self.net = Net(**options)
        self.automatic_optimization = not manual
        self.steps: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        loss = self.net(**batch)["loss"]
        self.log("loss", loss)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        self.optimizers().step()
        self.optimizers().zero_grad()
        return None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(**batch)["loss"])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(x=batch["x"])["logits"]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps.append(gradients(self.net))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def loader(size: int = 4, items: int = 16, seed: int = 0) -> Any:
    return DataLoader(Items(items, seed), batch_size=size)


def trainer_of(folder: Path, *callbacks: Any, **given: Any) -> Any:
    arguments = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(callbacks=list(callbacks), **(arguments | given))


def fitted(folder: Path, module: Module, size: int = 4, **given: Any) -> Module:
    trainer_of(folder, DynMoECallback(3, WEIGHT), **given).fit(module, loader(size))
    return module


@pytest.mark.parametrize(("size", "accumulation"), [(16, 1), (4, 4)])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradient_is_that_of_one_batch(size: int, accumulation: int, checkpointing: Any, tmp_path: Path) -> None:
    module = fitted(tmp_path, Module(checkpointing=checkpointing), size, accumulate_grad_batches=accumulation)
    assert len(module.steps) == 1
    assert_same_tensors(module.steps[0], expected_gradients(Net(), WEIGHT, Items()), rtol=1e-4, atol=1e-6)
    assert int(module.net.first.record.tokens) == 16 * TOKENS


def test_manual_optimization(tmp_path: Path) -> None:
    module = fitted(tmp_path, Module(manual=True), 16)
    assert_same_tensors(module.steps[0], expected_gradients(Net(), WEIGHT, Items()), rtol=1e-4, atol=1e-6)


def test_bf16(tmp_path: Path) -> None:
    module = fitted(tmp_path, Module(), 16, precision="bf16-mixed")
    expected, name = expected_gradients(Net(), WEIGHT, Items()), "first.gates.0.sim_matrix"
    found = module.steps[0][name]
    assert torch.linalg.vector_norm(found - expected[name]) < 0.05 * torch.linalg.vector_norm(expected[name])


def test_gradient_scaler(tmp_path: Path) -> None:
    """fp16's scaler around fp32 arithmetic; the precision plugin unscales before the optimizer."""
    plugin = lightning.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    module = fitted(tmp_path, Module(), 16, plugins=[plugin])
    assert_same_tensors(module.steps[0], expected_gradients(Net(), WEIGHT, Items()), rtol=1e-4, atol=1e-6)


class Watch(lightning.Callback):
    def __init__(self) -> None:
        self.tokens: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.tokens.append([int(layer.record.tokens) for layer in (pl_module.net.first, pl_module.net.second)])


def test_evaluation_and_prediction_are_not_recorded(tmp_path: Path) -> None:
    """With a sanity check first and validations between the training batches."""
    callback, watch, module = DynMoECallback(100), Watch(), Module()
    trainer = trainer_of(tmp_path, callback, watch, num_sanity_val_steps=2, val_check_interval=1, max_epochs=2)
    trainer.fit(module, loader(), loader(seed=1))
    assert watch.tokens == [[batch * 4 * TOKENS] * 2 for batch in range(1, 9)]
    assert callback.controller is not None
    assert callback.controller.steps == 8
    trainer.validate(module, loader(seed=1), verbose=False)
    trainer.predict(module, loader(seed=1))
    module.train().net(x=Items().x)
    assert watch.tokens[-1] == [int(module.net.first.record.tokens)] * 2


class Log(lightning.loggers.logger.Logger):
    name, version = "log", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_logs(tmp_path: Path) -> None:
    """It logs at steps 2 and 4 of four, each of two batches, and waits for the device at no other."""
    log, callback = Log(), DynMoECallback(2, WEIGHT)
    options = {"logger": log, "log_every_n_steps": 2, "accumulate_grad_batches": 2, "max_epochs": 2}
    trainer_of(tmp_path, callback, **options).fit(Module(), loader())
    lines = [line for _, line in log.lines if "moe/aux" in line]
    assert len(lines) == 2
    assert all("loss" in line for line in lines)
    events = [(e.step, e.layer, e.action) for e in callback.events]
    assert events
    for step, line in zip((2, 4), lines, strict=True):
        for layer in ("net.first", "net.second"):
            bins = [value for name, value in line.items() if name.startswith(f"moe/{layer}/k_histogram/")]
            assert sum(bins) == pytest.approx(1, abs=1e-5)
            assert line[f"moe/{layer}/unrouted"] == pytest.approx(bins[0])
            for action in ("grown", "pruned"):
                assert line[f"moe/{layer}/{action}"] == events.count((step, layer, action))


def test_a_budget_is_held_and_logged(tmp_path: Path) -> None:
    log, module = Log(), Module(lr=0.001, budget={"target_k": 1.5})
    options = {"logger": log, "log_every_n_steps": 1, "accumulate_grad_batches": 2, "max_epochs": 20}
    trainer_of(tmp_path, DynMoECallback(1000, WEIGHT), **options).fit(module, loader())
    lines = [line for _, line in log.lines if "moe/aux" in line]
    for layer in ("first", "second"):
        k = [line[f"moe/net.{layer}/k"] for line in lines]
        assert k[0] < 0.8
        assert sum(k[-20:]) / 20 == pytest.approx(1.5, rel=0.05)
        assert lines[-1][f"moe/net.{layer}/target_k"] == 1.5
        assert lines[-1][f"moe/net.{layer}/shift"] == pytest.approx(
            float(getattr(module.net, layer).gates[0].budget_shift)
        )


def state_of(module: Module, trainer: Any, callback: Any) -> dict[str, Any]:
    controller = callback.controller.state_dict()
    moments = trainer.optimizers[0].state_dict()["state"]
    tensors = {f"{i}/{n}": v for i, s in moments.items() for n, v in s.items()}
    return {"tensors": {**module.state_dict(), **tensors, **controller["tensors"]}, "values": controller["values"]}


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same_tensors(found["tensors"], expected["tensors"])
    assert found["values"] == expected["values"]


def run(folder: Path, epochs: int = 4, ckpt_path: Any = None, schedule: Any = 3, **given: Any) -> tuple[Any, ...]:
    """Two steps per epoch: with updates every three steps, an odd number of epochs ends inside a window."""
    save = lightning.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    module, callback = Module(), DynMoECallback(schedule, WEIGHT, max_new_experts=2)
    trainer = trainer_of(folder, save, callback, max_epochs=epochs, enable_checkpointing=True, **given)
    trainer.fit(module, loader(8), ckpt_path=ckpt_path)
    return module, trainer, callback


def test_resume_is_bitwise(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole")
    assert {event.step for event in expected[2].events} == {3, 6}
    for epoch in (0, 1):
        found = run(tmp_path / f"resumed{epoch}", ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_same_state(state_of(*found), state_of(*expected))
    other = run(tmp_path / "other", ckpt_path=tmp_path / "whole" / "epoch=1.ckpt", schedule={"every": 5})
    assert other[2].controller.steps == 8
    assert {event.step for event in other[2].events} <= {3, 5}


def test_resume_of_a_run_without_the_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path)
    trainer.fit(Module(), loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with caplog.at_level("WARNING", "dynmoe_tutel"):
        _, _, callback = run(tmp_path, epochs=2, ckpt_path=tmp_path / "plain.ckpt")
    assert "step 4 was written without DynMoECallback: the adaptive process starts anew" in caplog.text
    assert callback.controller.steps == 2
    caplog.clear()
    with caplog.at_level("WARNING", "dynmoe_tutel"):
        run(tmp_path / "whole", epochs=1)
        run(tmp_path / "resumed", epochs=2, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert not caplog.text


def test_fitting_on_continues(tmp_path: Path) -> None:
    """A second fit begins in the middle of a window, with new optimizers from Lightning."""
    module, trainer, callback = run(tmp_path, epochs=2)
    before = list(callback.events)
    assert {event.step for event in before} == {3}
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(8))
    assert callback.controller.steps == 8
    assert callback.events[: len(before)] == before
    assert {event.step for event in callback.events} == {3, 6}
    assert int(module.net.first.record.tokens) == 2 * 8 * TOKENS


def test_two_trainers_do_not_disturb_each_other(tmp_path: Path) -> None:
    alone = state_of(*run(tmp_path / "0"))

    class TrainAnother(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer_of(tmp_path / "1", DynMoECallback(2)).fit(Module(), loader(seed=1))

    module, callback = Module(), DynMoECallback(3, WEIGHT, max_new_experts=2)
    trainer = trainer_of(tmp_path, callback, TrainAnother(), max_epochs=4)
    trainer.fit(module, loader(8))
    assert_same_state(state_of(module, trainer, callback), alone)


def test_after_an_exception_the_layers_are_left_alone(tmp_path: Path) -> None:
    class Fail(lightning.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("failed")

    module = Module()
    with pytest.raises(RuntimeError, match="failed"):
        trainer_of(tmp_path, DynMoECallback(3), Fail()).fit(module, loader())
    assert not module.net.first._forward_hooks
    assert not module.net.first.record_routing


def test_what_it_refuses(tmp_path: Path) -> None:
    class Dense(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"must have a dynmoe_tutel\.MoELayer .* got a Dense without one"):
        trainer_of(tmp_path, DynMoECallback(3)).fit(Dense(), loader())
    with pytest.raises(ValueError, match="unknown option 'pacience'"):
        DynMoECallback(pacience=2)
    with pytest.raises(ValueError, match="schedule must be a Schedule"):
        DynMoECallback(schedule="often")
    with pytest.raises(ValueError, match="aux_weight must be a number"):
        DynMoECallback(aux_weight=-1)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `DynMoECallback`"):
        trainer_of(tmp_path, DynMoECallback(3), DynMoECallback(3)).fit(Module(), loader())
    trainer = trainer_of(tmp_path, DynMoECallback(3))
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ValueError, match="FSDPStrategy splits the parameters"):
        trainer.fit(Module(), loader())


class TestAverages:
    """Lightning's callbacks that average weights, with their defaults, beside growth and pruning."""

    def fitted(self, folder: Path, average: Any, epochs: int = 4) -> tuple[Module, Any, list[Any]]:
        """The module and the trainer after `fit`, and the cosines of grown vectors before the weights are replaced."""
        module, seen = Module(lr=0.005), []

        class Look(lightning.Callback):
            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                averaged = average._average_model
                averaged = getattr(averaged, "module", averaged)
                for name in ("first", "second"):
                    live, old = getattr(pl_module.net, name), getattr(averaged.net, name)
                    grown = {e.slot for e in callback.events if e.layer == f"net.{name}" and e.action == "grown"}
                    for slot in [s for s in sorted(grown) if bool(live.gates[0].active()[s])]:
                        w, v = (each.gates[0].sim_matrix[:, slot].detach() for each in (old, live))
                        seen.append(float(torch.cosine_similarity(w, v, dim=0)))
                    assert old.gates[0].experts_mask.tolist() == live.gates[0].experts_mask.tolist()
                    assert old.num_global_experts == live.num_global_experts

        callback = DynMoECallback(3, WEIGHT)
        trainer = trainer_of(folder, Look(), callback, average, max_epochs=epochs, num_sanity_val_steps=2)
        trainer.fit(module, loader(), loader(seed=1))
        assert {event.action for event in callback.events} >= {"grown"}
        return module, trainer, seen

    @pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
    def test_experts_are_those_of_the_module(self, name: str, tmp_path: Path) -> None:
        callbacks = pytest.importorskip("lightning.pytorch.callbacks")
        options = {"swa_lrs": 0.005, "swa_epoch_start": 1} if name == "StochasticWeightAveraging" else {}
        module, _, cosines = self.fitted(tmp_path, getattr(callbacks, name)(**options))
        assert cosines
        assert min(cosines) > 0.9
        for layer in (module.net.first, module.net.second):
            assert set(layer.gates[0].experts_mask.tolist()) <= {0.0, 1.0}
            assert int(layer.gates[0].active().sum()) == layer.num_global_experts

    def test_checkpoints_hold_the_average_whole_and_go_on(self, tmp_path: Path) -> None:
        from lightning.pytorch.callbacks import EMAWeightAveraging

        _, trainer, _ = self.fitted(tmp_path, EMAWeightAveraging(), 3)
        trainer.save_checkpoint(tmp_path / "average.ckpt")
        state = torch.load(tmp_path / "average.ckpt", weights_only=False)
        for part in ("state_dict", "current_model_state"):
            for name in ("net.first.", "net.second."):
                mask = state[part][f"{name}gates.0.experts_mask"]
                assert set(mask.tolist()) <= {0.0, 1.0}
                assert int(mask.sum()) == int(state[part][f"{name}_num_global_experts"])
        resumed = trainer_of(tmp_path, DynMoECallback(3, WEIGHT), EMAWeightAveraging(), max_epochs=5)
        module = Module()
        resumed.fit(module, loader(), ckpt_path=tmp_path / "average.ckpt")
        assert set(module.net.first.gates[0].experts_mask.tolist()) <= {0.0, 1.0}
