"""Lightning runs that an exception ends, and what comes after them on the same model."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lightning import (
    WEIGHT,
    DynMoECallback,
    Module,
    assert_same_state,
    lightning,
    loader,
    state_of,
    trainer_of,
)
from tiny import Items, assert_same_tensors
from torch import Tensor
from torch.utils.data import DataLoader


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Lightning ignores SIGINT after it has caught a KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class Raise(lightning.Callback):
    """Raises at the end of batch 1, and, with `again`, when it hears of the exception."""

    def __init__(self, error: BaseException, again: bool = False) -> None:
        self.error, self.again = error, again

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise self.error

    def on_exception(self, *args: Any) -> None:
        if self.again:
            raise RuntimeError("failed again")


class Full(Module):
    """Is out of memory in the third batch's step."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        if batch_idx == 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().training_step(batch, batch_idx)


class Broken(Items):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == 9:
            raise OSError("a file cannot be read")
        return super().__getitem__(index)


def interrupted(folder: Path, where: str) -> tuple[Any, Any, Any]:
    """A module, trainer and callback whose fit was interrupted in the middle of a record window."""
    callback = DynMoECallback(3, WEIGHT, max_new_experts=2)
    others: list[Any] = []
    error: type[BaseException] = SystemExit
    if where == "Ctrl-C":
        others = [Raise(KeyboardInterrupt())]
    elif where == "unheard":
        others, error = [Raise(ValueError("bad"), again=True)], RuntimeError
    elif where == "step":
        error = torch.OutOfMemoryError
    elif where == "data loader":
        error = OSError
    module = Full() if where == "step" else Module()
    callbacks = [*others, callback] if where == "unheard" else [callback, *others]
    trainer = trainer_of(folder, *callbacks)
    data = DataLoader(Broken(), batch_size=4) if where == "data loader" else loader()
    with pytest.raises(error):
        trainer.fit(module, data)
    trainer.callbacks = [callback]
    return module, trainer, callback


def fitted(module: Module, folder: Path, callback: Any = None) -> dict[str, Any]:
    callback = callback or DynMoECallback(3, WEIGHT)
    trainer = trainer_of(folder, callback, max_epochs=2)
    trainer.fit(module, loader())
    return state_of(module, trainer, callback)


@pytest.mark.parametrize("where", ["Ctrl-C", "step", "data loader", "unheard"])
@pytest.mark.parametrize("again", ["new callback", "same callback"])
def test_a_training_after_it_is_a_fresh_start(where: str, again: str, tmp_path: Path) -> None:
    module, _, callback = interrupted(tmp_path, where)
    assert (where == "unheard") == bool(module.net.first._forward_hooks)
    weights = copy.deepcopy(module.net.state_dict())
    second, third = Module(), Module()
    second.net, _ = module.net, third.net.load_state_dict(weights)
    expected = fitted(third, tmp_path / "fresh", DynMoECallback(3, WEIGHT, max_new_experts=2 if "same" in again else 1))
    assert_same_state(fitted(second, tmp_path / "new", callback if "same" in again else None), expected)
    assert not module.net.first._forward_hooks
    assert not module.net.first.gates[0]._forward_hooks


def test_fitting_on_with_the_same_trainer_goes_on(tmp_path: Path) -> None:
    """It is the same training: Lightning's counts go on, and so do the controller's, in its window."""
    module, trainer, callback = interrupted(tmp_path, "Ctrl-C")
    assert callback.controller.steps == 2
    tokens = int(module.net.first.record.tokens)
    module.net.train()(x=Items().x)
    assert int(module.net.first.record.tokens) == tokens, "nothing is recorded in between"
    trainer.fit(module, loader())
    assert callback.controller.steps == trainer.global_step > 2


@pytest.mark.parametrize("where", ["Ctrl-C", "unheard"])
def test_tests_after_it_change_nothing(where: str, tmp_path: Path) -> None:
    module, trainer, _ = interrupted(tmp_path, where)
    module.test_step = module.validation_step  # type: ignore[method-assign]
    before = copy.deepcopy(module.net.state_dict())
    record = {name: torch.as_tensor(v) for name, v in module.net.first.record.state_dict().items()}
    trainer.validate(module, loader(seed=1), verbose=False)
    trainer.test(module, loader(seed=1), verbose=False)
    trainer.predict(module, loader(seed=1))
    assert_same_tensors(dict(module.net.state_dict()), dict(before))
    after = {name: torch.as_tensor(v) for name, v in module.net.first.record.state_dict().items()}
    assert_same_tensors(after, record)
    assert not module.net.first._forward_hooks, "trainer.test ends what was left, too"


def test_an_error_in_the_sanity_check(tmp_path: Path) -> None:
    class Bad(Module):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            raise ValueError("a bad batch")

    module = Bad()
    with pytest.raises(ValueError, match="a bad batch"):
        trainer_of(tmp_path, DynMoECallback(3), num_sanity_val_steps=1).fit(module, loader(), loader(seed=1))
    assert not module.net.first._forward_hooks
    assert not module.net.first.record_routing
