"""`OptimizerSteps`, with the wrappers of training loops around the optimizers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny import moe_layer
from torch import Tensor, nn

from dynmoe_tutel.integrations.optimizer_steps import OptimizerSteps

SGD = torch.optim.SGD


def with_gradients(module: nn.Module, value: float = 1.0) -> list[nn.Parameter]:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return list(module.parameters())


def watched(*optimizers: Any, layer: nn.Module) -> OptimizerSteps:
    return OptimizerSteps([layer], list(optimizers))


def test_each_step_counts_once_until_it_is_taken() -> None:
    layer = moe_layer()
    optimizer = SGD(with_gradients(layer))
    steps = watched(optimizer, optimizer, layer=layer)
    assert steps.take(7) == 0
    for _ in range(2):
        optimizer.step()
    assert [steps.take(7), steps.take(7)] == [2, 0]


def test_a_wrapped_optimizer_counts_once() -> None:
    accelerate, layer = pytest.importorskip("accelerate"), moe_layer()
    raw = SGD(with_gradients(layer))
    wrapped = accelerate.Accelerator(cpu=True).prepare(raw)
    steps = watched(wrapped, raw, layer=layer)
    wrapped.step()
    assert steps.take(7) == 1
    raw.step()
    assert steps.take(7) == 1


def test_a_schedule_of_the_learning_rate_counts_nothing() -> None:
    layer = moe_layer()
    optimizer = SGD(with_gradients(layer))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    steps = watched(optimizer, layer=layer)
    optimizer.step()
    schedule.step()
    assert steps.take(7) == 1


def test_a_step_within_a_step_counts_once() -> None:
    """torch calls the hooks at the class's own `step` and at the one that it inherits."""

    class Mine(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    layer = moe_layer()
    torch.optim.Adam(with_gradients(layer))
    optimizer = Mine(layer.parameters())
    steps = watched(optimizer, layer=layer)
    optimizer.step()
    assert steps.take(7) == 1


def test_after_a_step_that_raised_the_next_batch_counts() -> None:
    class Failing(SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise torch.OutOfMemoryError("out of memory")
            return super().step(closure)

    layer = moe_layer()
    optimizer = Failing(with_gradients(layer))
    steps = watched(optimizer, layer=layer)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert steps.take(7) == 0
    optimizer.fails = False
    optimizer.step()
    assert steps.take(7) == 1


def test_a_closure_that_runs_several_times_is_one_step() -> None:
    layer, calls = moe_layer(), []
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.01, max_iter=3)
    steps = watched(optimizer, layer=layer)
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss: Tensor = layer(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(calls) > 1
    assert steps.take(7) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(fused: bool) -> None:
    """A fused optimizer is called and skips the step by itself."""
    layer = moe_layer()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    steps = watched(optimizer, layer=layer)
    taken = []
    for value in (float("inf"), 1.0, float("nan"), 1.0):
        before = [parameter.detach().clone() for parameter in with_gradients(layer, value)]
        scaler.step(optimizer)
        scaler.update()
        taken.append(steps.take(7))
        moved = any(not torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))
        assert moved == (value == 1.0)
    assert taken == [0, 1, 0, 1]


def test_several_optimizers_count_as_the_one_with_most_steps() -> None:
    """Two that share a layer take turns at a batch: its router and its experts."""
    layer = moe_layer()
    with_gradients(layer)
    router, experts = SGD(layer.gates.parameters()), SGD(layer.experts.parameters())
    steps = watched(router, experts, layer=layer)
    router.step()
    experts.step()
    assert steps.take(7) == 1
    for _ in range(5):
        router.step()
    experts.step()
    assert steps.take(7) == 5


def test_an_optimizer_without_the_layer_counts_nothing_until_it_gets_it() -> None:
    layer, head = moe_layer(), nn.Linear(2, 2)
    optimizer = SGD(with_gradients(head))
    steps = watched(optimizer, layer=layer)
    optimizer.step()
    assert steps.take(7) == 0
    optimizer.add_param_group({"params": with_gradients(layer)})
    optimizer.step()
    assert steps.take(7) == 1


class NotOfTorch:
    state: dict[Any, Any] = {}  # noqa: RUF012

    def step(self) -> None:
        pass


def test_without_an_optimizer_of_torch_the_host_counts() -> None:
    assert watched(NotOfTorch(), layer=moe_layer()).take(3) == 3
    assert OptimizerSteps([moe_layer()], None).take(3) == 3


def test_the_hooks_end_with_it_and_stay_behind_in_copies() -> None:
    layer = moe_layer()
    optimizer = SGD(layer.parameters())
    steps = watched(optimizer, layer=layer)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not copied._optimizer_step_post_hooks
    steps.close()
    assert not optimizer._optimizer_step_post_hooks
    steps = watched(optimizer, layer=layer)
    del steps
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
