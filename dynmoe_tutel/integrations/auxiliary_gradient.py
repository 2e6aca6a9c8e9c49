"""Adds the gradient of the MoE layers' auxiliary loss to the backward that the host runs anyway.

Each call of a layer in training adds the gradient of weight * l_aux at the layer's output. The loss that the host
computes, scales and logs stays the task's alone. Nothing is kept between forwards: a layer that is called twice counts
twice, a layer that is not called does not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_tutel.forwards import in_backward, is_training
from dynmoe_tutel.layer import MoELayer
from dynmoe_tutel.temporary_hooks import HookOwner, TemporaryHook


class _WithGradient(torch.autograd.Function):
    """Returns y unchanged; in the backward, `term` gets a gradient of 1, independent of y's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, term: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, torch.ones((), dtype=torch.float32, device=dy.device)


class _AddGradient(TemporaryHook):
    """Hook of a layer: adds the gradient of `factor` * l_aux, and l_aux and 1 to `sums` [2].

    `owner` is closed when another takes over the layer: a gradient that is added twice would count twice.
    """

    def __init__(self, name: str, factor: Tensor | None, sums: Tensor, owner: weakref.ref[Any]) -> None:
        self.name, self.factor, self.sums, self.owner = name, factor, sums, owner

    def __call__(self, layer: nn.Module, inputs: Any, y: Any) -> Any:
        if not layer.training:
            return None
        if not isinstance(y, Tensor):
            raise ValueError(
                f"the result_func of {self.name or 'the layer'} returns {type(y).__name__}: return a tensor, through "
                "which the gradient of the auxiliary loss can pass"
            )
        l_aux: Tensor | None = getattr(y, "l_aux", None)
        if l_aux is None:  # SKIP_MOE
            return None
        if is_training(layer) and not in_backward():
            with torch.no_grad():
                self.sums.add_(torch.stack([l_aux, torch.ones_like(l_aux)]))
        if self.factor is None or not l_aux.requires_grad:
            return None
        y = _WithGradient.apply(y, self.factor * l_aux)
        y.l_aux = l_aux
        return y

    def counts(self) -> Iterable[Tensor]:
        return (self.sums,)


def _owners(layers: Mapping[str, MoELayer]) -> list[Any]:
    """Those that add a gradient at one of the layers."""
    hooks = [hook for layer in layers.values() for hook in layer._forward_hooks.values()]
    owners = [hook.owner() for hook in hooks if isinstance(hook, _AddGradient)]
    return [owner for owner in owners if owner is not None]


class AuxiliaryGradient(HookOwner):
    """Adds the gradient of `weight` * l_aux at the output of every call of the layers in training.

    It does so until `close`, the end of a `with` block, or its own end, and once a layer: what an interrupted training
    left at one of the layers is closed first. That is the `owner` of the earlier object (anything with a `close`; held
    weakly; None: the object itself). Copies of a layer lack the gradient.

    `set_factor` gives the host's scaling of its loss, which then applies to the auxiliary loss too. The sums of l_aux
    for the log stay on the layers' devices.
    """

    def __init__(self, layers: Mapping[str, MoELayer], weight: float, owner: Any = None) -> None:
        for earlier in _owners(layers):
            earlier.close()
        self.weight = weight
        devices = {name: layer._num_global_experts.device for name, layer in layers.items()}
        self._factors = {
            device: torch.full((), weight, dtype=torch.float32, device=device) for device in devices.values()
        }
        # by layer: [sum of l_aux, calls]
        self._sums = {name: torch.zeros(2, dtype=torch.float32, device=device) for name, device in devices.items()}
        held = weakref.ref(self if owner is None else owner)
        factors = {name: None if weight == 0 else self._factors[device] for name, device in devices.items()}
        hooks = {name: _AddGradient(name, factors[name], self._sums[name], held) for name in layers}
        self._own(layer.register_forward_hook(hooks[name]) for name, layer in layers.items())

    def set_factor(self, factor: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """Set the host's factor on its loss for the next forwards: `factor`, times the scale of `scaler`."""
        for value in self._factors.values():
            value.fill_(self.weight * factor)
            if scaler is not None:
                value.copy_(scaler.scale(value))

    def means(self) -> dict[str, float]:
        """By layer, the mean l_aux a call since `reset`, for layers that were called. Waits for the device."""
        read = {name: value.tolist() for name, value in self._sums.items()}
        return {name: total / calls for name, (total, calls) in read.items() if calls > 0}

    def reset(self) -> None:
        """Forget the sums."""
        for value in self._sums.values():
            value.zero_()

    def all_reduce(self, group: Any = None) -> None:
        """Sum over the ranks of `group`, which must all call it; does nothing without torch.distributed."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            flat = torch.cat(list(self._sums.values()))
            dist.all_reduce(flat, group=group)
            for value, total in zip(self._sums.values(), flat.split(2), strict=True):
                value.copy_(total)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, copied."""
        return {name: value.clone() for name, value in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved sums."""
        for name, value in self._sums.items():
            value.copy_(state[name])
