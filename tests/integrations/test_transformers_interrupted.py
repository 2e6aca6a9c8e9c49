"""`transformers.Trainer` runs that an exception ends, and what comes after them on the same model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_trainers import WEIGHT, assert_same_state, state_of, trainer_of, transformers, with_callback
from tiny import Items, Net, assert_same_tensors
from torch import Tensor, nn

from dynmoe_tutel.integrations.transformers import DynMoECallback

BEGUN = {"schedule": 3, "max_new_experts": 2}


class At(transformers.TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def fail(error: BaseException) -> Callable[..., None]:
    def raise_it(*_: Any) -> None:
        raise error

    return raise_it


class Broken(Items):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == 5:
            raise OSError("a file cannot be read")
        return super().__getitem__(index)


def interrupted(model: nn.Module, folder: Path, where: str) -> Any:
    """A Trainer whose training of the model was interrupted in the middle of a record window."""
    items = Broken() if where == "data loader" else Items()
    trainer = trainer_of(model, folder, items)
    callback = with_callback(trainer, **BEGUN)
    error: type[BaseException] = KeyboardInterrupt
    if where == "callback":
        trainer.add_callback(At(2, fail(KeyboardInterrupt())))
    elif where == "data loader":
        error = OSError
    elif where == "forward":
        error = torch.OutOfMemoryError
        hook = fail(torch.OutOfMemoryError("out of memory"))
        trainer.add_callback(At(2, lambda: handles.append(model.second.register_forward_pre_hook(hook))))
    elif where == "backward":
        hook = fail(KeyboardInterrupt())
        trainer.add_callback(At(2, lambda: handles.append(model.head.weight.register_hook(hook))))
    handles: list[Any] = []
    with pytest.raises(error):
        trainer.train()
    for handle in handles:
        handle.remove()
    trainer.train_dataset = Items()
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, At)]
    return trainer, callback


def trained(trainer: Any, callback: Any) -> dict[str, Any]:
    transformers.set_seed(0)
    trainer.train()
    return state_of(trainer, callback)


def fresh(weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    model = Net()
    model.load_state_dict(weights)
    trainer = trainer_of(model, folder)
    return trained(trainer, with_callback(trainer))


@pytest.mark.parametrize(
    ("where", "again"),
    [
        *((where, "new trainer") for where in ("callback", "forward", "backward", "data loader")),
        ("callback", "same trainer"),
        ("callback", "new callback"),
    ],
)
def test_a_training_after_it_is_a_fresh_start(where: str, again: str, tmp_path: Path) -> None:
    """Bitwise: no gradient of the auxiliary loss counts twice, and no record has forwards of before."""
    model = Net()
    old, callback = interrupted(model, tmp_path / "old", where)
    weights = copy.deepcopy(model.state_dict())
    if again == "same trainer":
        callback._options["max_new_experts"] = 1
        old.optimizer, old.lr_scheduler = None, None
        found = trained(old, callback)
    elif again == "new callback":
        old.remove_callback(callback)
        old.optimizer, old.lr_scheduler = None, None
        found = trained(old, with_callback(old))
    else:
        trainer = trainer_of(model, tmp_path / "new")
        found = trained(trainer, with_callback(trainer))
    assert_same_state(found, fresh(weights, tmp_path / "fresh"))


@pytest.mark.parametrize("where", ["callback", "forward", "data loader"])
def test_it_leaves_nothing_on_the_model(where: str, tmp_path: Path) -> None:
    """A training without the callback, or a loop of one's own, comes next."""
    model = Net()
    trainer, callback = interrupted(model, tmp_path / "old", where)
    for layer in (model.first, model.second):
        assert not layer._forward_hooks
        assert not layer.gates[0]._forward_hooks
        assert not layer.record_routing
    weights = copy.deepcopy(model.state_dict())
    ends = []
    for net in (model, Net()):
        net.load_state_dict(weights)
        other = trainer_of(net, tmp_path / "new")
        transformers.set_seed(0)
        other.train()
        ends.append(dict(net.state_dict()))
    assert_same_tensors(*ends)
    assert callback.controller.steps >= 1
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


def test_what_its_callback_left_is_taken_over(tmp_path: Path) -> None:
    """Also where nothing told the callback of the end, since `train` was called past it."""
    model = Net()
    trainer = trainer_of(model, tmp_path)
    with_callback(trainer, **BEGUN)
    trainer.add_callback(At(2, fail(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        type(trainer).train(trainer)
    assert model.first._forward_hooks
    weights = copy.deepcopy(model.state_dict())
    second = trainer_of(model, tmp_path / "new")
    found = trained(second, with_callback(second))
    assert_same_state(found, fresh(weights, tmp_path / "fresh"))
    assert not model.first._forward_hooks


def pickled(model: nn.Module) -> nn.Module:
    saved: nn.Module = pickle.loads(pickle.dumps(model))
    return saved


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, saved])
def test_a_copy_in_mid_training_belongs_to_no_training(copied: Any, tmp_path: Path) -> None:
    """A forward and backward of the copy change neither the records and sums of the training nor its own loss."""
    model, copies = Net(), []

    def take() -> None:
        other = copied(model)
        if copied is copy.copy:
            other._modules = {name: copy.copy(module) for name, module in model.named_children()}
        before = [float(v) for v in callback._training.auxiliary._sums["first"]]
        other.train()
        other.first(Items().x).sum()
        assert not other.first._forward_hooks
        if copied is not copy.copy:
            assert not other.first.gates[0]._forward_hooks
            copies.append(other)
        assert [float(v) for v in callback._training.auxiliary._sums["first"]] == before

    trainer = trainer_of(model, tmp_path)
    callback = with_callback(trainer)
    trainer.add_callback(At(2, take))
    transformers.set_seed(0)
    trainer.train()
    if copied is copy.copy:  # it shares the record
        return
    assert_same_state(state_of(trainer, callback), fresh(dict(Net().state_dict()), tmp_path / "fresh"))
    other = trainer_of(copies[0], tmp_path / "copy", max_steps=1)
    with_callback(other)
    other.train()


def test_two_trainings_of_one_model_at_once_are_refused(tmp_path: Path) -> None:
    model = Net()

    def train_it_too() -> None:
        inner = trainer_of(model, tmp_path / "inner", max_steps=1)
        with_callback(inner)
        inner.train()

    trainer = trainer_of(model, tmp_path)
    with_callback(trainer)
    trainer.add_callback(At(2, train_it_too))
    with pytest.raises(RuntimeError, match="another DynMoECallback has taken over the layers"):
        trainer.train()
    assert not model.first._forward_hooks


def test_another_trainer_cannot_use_the_callback(tmp_path: Path) -> None:
    model = Net()
    callback = with_callback(trainer_of(model, tmp_path))
    other = trainer_of(model, tmp_path, callbacks=[callback])
    with pytest.raises(ValueError, match="made for another Trainer: make one for each"):
        other.train()
    assert not model.first._forward_hooks


def test_a_with_block_detaches(tmp_path: Path) -> None:
    trainer = trainer_of(Net(), tmp_path)
    with DynMoECallback(trainer, schedule=3, aux_weight=WEIGHT) as callback:
        trainer.add_callback(callback)
        trainer.add_callback(At(2, fail(KeyboardInterrupt())))
        with pytest.raises(KeyboardInterrupt):
            type(trainer).train(trainer)
        assert trainer.model.first._forward_hooks
    assert not trainer.model.first._forward_hooks
