"""Which optimizer steps of a Lightning run count: automatic, manual, of the raw optimizer, of several optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_lightning import WEIGHT, Log, Module, lightning, loader, trainer_of
from tiny import moe_layer
from torch import Tensor, nn

from dynmoe_tutel.integrations.lightning import DynMoECallback

WARNING = "no optimizer step was counted in this epoch"


class Raw(Module):
    """Steps its optimizers by itself: `how` says how it gets at them."""

    def __init__(self, how: str, repeats: int = 1) -> None:
        super().__init__(manual=True)
        self.how, self.repeats = how, repeats

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=self.how != "raw")
        inner = optimizer.optimizer if self.how == "inside" else optimizer
        for _ in range(self.repeats):
            inner.zero_grad()
            self.manual_backward(self.net(**batch)["loss"])
            inner.step()


def steps_of(folder: Path, module: Any, **given: Any) -> int:
    callback = DynMoECallback(3, WEIGHT)
    trainer_of(folder, callback, **given).fit(module, loader())
    assert callback.controller is not None
    return callback.controller.steps


@pytest.mark.parametrize("how", ["wrapped", "raw", "inside"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_each_step_of_manual_optimization_counts(
    how: str, repeats: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert steps_of(tmp_path, Raw(how, repeats), max_epochs=2) == 8 * repeats
    assert WARNING not in caplog.text


def test_a_raw_optimizer_trains_as_the_wrapped_one(tmp_path: Path) -> None:
    """The same events, weights and log lines."""
    ends = []
    for how in ("wrapped", "raw"):
        module, log, callback = Raw(how), Log(), DynMoECallback(3, WEIGHT)
        trainer_of(tmp_path, callback, max_epochs=2, logger=log, log_every_n_steps=2).fit(module, loader())
        moe = [{name: value for name, value in line.items() if "moe" in name} for _, line in log.lines]
        ends.append((callback.events, [line for line in moe if line], dict(module.state_dict())))
    assert ends[0][0] == ends[1][0] != []
    assert ends[0][1] == ends[1][1] != []
    assert all(torch.equal(ends[1][2][name], value) for name, value in ends[0][2].items())


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 8), (2, 4), (3, 4)])
def test_accumulated_batches_are_one_step(accumulate: int, steps: int, tmp_path: Path) -> None:
    assert steps_of(tmp_path, Module(), max_epochs=2, accumulate_grad_batches=accumulate) == steps


def test_lbfgs_counts_its_steps(tmp_path: Path) -> None:
    class Newton(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    assert steps_of(tmp_path, Newton()) == 4


def test_a_skipped_step_is_none(tmp_path: Path) -> None:
    """A GradScaler finds an infinite gradient in the second of four batches."""

    class Infinite(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.steps.append({})

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    plugin = lightning.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    module = Infinite()
    assert steps_of(tmp_path, module, plugins=[plugin]) == 3
    assert len(module.steps) == 4


class Two(lightning.LightningModule):
    """A generator with MoE layers, and a discriminator that takes turns with it, each with its optimizer."""

    def __init__(self, turns: tuple[int, int], shared: bool = False, raw: bool = False) -> None:
        super().__init__()
        self.net, self.critic = moe_layer(), moe_layer() if shared else nn.Linear(8, 8)
        self.automatic_optimization, self.turns, self.raw = False, turns, raw

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        for part, optimizer, turns in zip(
            (self.net, self.critic), self.optimizers(use_pl_optimizer=not self.raw), self.turns, strict=True
        ):
            for _ in range(turns):
                optimizer.zero_grad()
                self.manual_backward(part(batch["x"]).square().mean())
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.net, self.critic)]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("turns", "shared", "steps"), [((1, 5), False, 4), ((1, 1), True, 4), ((1, 5), True, 20)])
def test_of_two_optimizers(raw: bool, turns: tuple[int, int], shared: bool, steps: int, tmp_path: Path) -> None:
    """That of a part without MoE layers does not count; where both have some, the one with most steps does."""
    assert steps_of(tmp_path, Two(turns, shared, raw)) == steps


def test_an_optimizer_that_lightning_does_not_know_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, after the first epoch."""

    class Hidden(Raw):
        def configure_optimizers(self) -> Any:
            self.hidden = torch.optim.Adam(self.net.parameters(), lr=0.05)

        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return self.hidden

    with caplog.at_level("WARNING", "dynmoe_tutel"):
        assert steps_of(tmp_path, Hidden("wrapped"), max_epochs=3) == 0
    assert caplog.text.count(WARNING) == 1
    assert "return it from configure_optimizers" in caplog.text


def test_frozen_layers_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Frozen(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.net.head.parameters(), lr=0.05)

    with caplog.at_level("WARNING", "dynmoe_tutel"):
        assert steps_of(tmp_path, Frozen()) == 0
    assert WARNING in caplog.text


def test_without_adaptive_layers_nothing_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Frozen(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.net.head.parameters(), lr=0.05)

    with caplog.at_level("WARNING", "dynmoe_tutel"):
        trainer_of(tmp_path, DynMoECallback(None, WEIGHT)).fit(Frozen(gate="top"), loader())
    assert not caplog.text
