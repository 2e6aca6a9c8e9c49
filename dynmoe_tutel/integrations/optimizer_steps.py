"""`OptimizerSteps`: counts the steps of optimizers where they happen, however a training loop calls them.

Wrappers (Lightning's, Accelerate's, a GradScaler, a schedule of the learning rate) all end in the `step` of the torch
optimizer, whose hooks torch calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe_tutel.adaptive.optimizer_state import optimizer_list
from dynmoe_tutel.temporary_hooks import HookOwner


class _Steps:
    """Both hooks of one optimizer. `made` steps that changed one of the layers' parameters."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers, self.made, self.depth = layers, 0, 0

    def begin(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.depth += 1

    def end(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.depth -= 1
        if self.depth <= 0 and not _was_skipped(optimizer) and self._owns(optimizer):
            self.made += 1  # torch calls hooks for an inherited step within a step too

    def _owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Now: groups are added to optimizers, and parameters of layers replaced, while they train."""
        own = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])


class OptimizerSteps(HookOwner):
    """Counts steps of those `optimizers` (one, several or None) that own a parameter of the `layers`, until `close`.

    A step that a GradScaler skips is none, also where a fused optimizer skips it on the device.
    """

    def __init__(self, layers: Iterable[nn.Module], optimizers: Any) -> None:
        modules, handles = list(layers), []
        self._counts: list[_Steps] = []
        for optimizer in _watchable(optimizer_list(optimizers)):
            steps = _Steps(modules)
            handles += [optimizer.register_step_pre_hook(steps.begin), optimizer.register_step_post_hook(steps.end)]
            self._counts.append(steps)
        self._own(handles)

    def take(self, otherwise: int) -> int:
        """The steps since the last call: the most that one optimizer made, since they take turns at one batch.

        `otherwise` if no optimizer is one of torch, whose steps could be counted.
        """
        if not self._counts:
            return otherwise
        made = max(steps.made for steps in self._counts)
        for steps in self._counts:
            steps.made = steps.depth = 0
        return made


def _watchable(optimizers: Iterable[Any]) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside the wrappers, each once."""
    seen = set()
    for optimizer in optimizers:
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer
        if hasattr(optimizer, "_optimizer_step_post_hooks") and id(optimizer) not in seen:
            seen.add(id(optimizer))
            yield optimizer


def _was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this step did nothing: a GradScaler hands its finding to optimizers that skip steps by themselves."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and bool(found_inf)
