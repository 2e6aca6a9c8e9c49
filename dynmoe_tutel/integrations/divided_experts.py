"""Gradients of divided experts inside a host's training loop: averaged once a step, clipped by one norm over all ranks.

While a model trains, `DividedGradients` stands in for methods of the host that see a rank's own experts only; `close`
puts them back. A model without divided experts needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynmoe_tutel.parallel import average_gradients, clip_grad_norm_, expert_parameters
from dynmoe_tutel.parallel.collectives import wire_device
from dynmoe_tutel.parallel.gradients import check_expert_data_group, placements_of_experts


def has_divided_experts(model: nn.Module) -> bool:
    """Whether ranks divide experts of the model."""
    return any(True for _ in expert_parameters(model))


class DividedGradients:
    """The gradients of a model with divided experts, of one training, until `close`.

    `wrapped` is the model as the host calls it. Where it is wrapped by DistributedDataParallel, that averages what all
    ranks hold; else `average_once` does.

    Raises ValueError if `expert_data_group` is not of the experts' copies, or DistributedDataParallel would average the
    experts.
    """

    def __init__(self, model: nn.Module, wrapped: nn.Module, expert_data_group: Any = None) -> None:
        placements = placements_of_experts(model).values()
        check_expert_data_group(placements, placements, None, expert_data_group)
        ddp = next((module for module in wrapped.modules() if isinstance(module, DistributedDataParallel)), None)
        if ddp is not None:
            _refuse_averaged_by(ddp)
        self._model, self._expert_data_group, self._dense = model, expert_data_group, ddp is None
        self._averaged: set[Any] = set()  # the parameters of steps that have begun
        self._put_back: list[Callable[[], None]] = []

    def average_once(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Average the gradients of these parameters (None: all), unless that was done since the last `step_follows`."""
        chosen = None if parameters is None else list(parameters)
        key = None if chosen is None else frozenset(map(id, chosen))
        if key not in self._averaged:
            average_gradients(self._model, None, self._expert_data_group, dense=self._dense, parameters=chosen)
            self._averaged.add(key)

    def step_follows(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Say that an optimizer steps with these gradients now: the next ones are averaged again."""
        self._averaged.discard(None if parameters is None else frozenset(map(id, parameters)))

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of these parameters by their norm over all ranks, which is returned."""
        return clip_grad_norm_(self._model, max_norm, norm_type, parameters=parameters)

    def share_overflow(self, scaler: torch.amp.GradScaler) -> None:
        """Make `scaler` find an overflow on all ranks where one has it, as torch's ShardedGradScaler does.

        All ranks then skip the same steps and keep the same scale.
        """
        own = scaler._unscale_grads_

        def unscale(optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> dict[Any, Tensor]:
            found: dict[Any, Tensor] = own(optimizer, inv_scale, found_inf, allow_fp16)
            if not found:  # no gradient on this rank
                found[found_inf.device] = found_inf
            device = wire_device(None)
            anywhere = torch.stack([value.to(device) for value in found.values()]).amax(dim=0)
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
            for value in found.values():
                value.copy_(anywhere)
            return found

        self.stand_in(scaler, "_unscale_grads_", unscale)

    def refuse_saving(self, host: Any, method: str) -> None:
        """Make the host's method that writes checkpoints raise ValueError."""

        def refuse(*_: Any, **__: Any) -> None:
            raise ValueError(f"{type(host).__name__}.{method} {WRITES_ONE_RANK}")

        self.stand_in(host, method, refuse)

    def stand_in(self, host: Any, method: str, function: Callable[..., Any]) -> None:
        """Call `function` instead of the host object's method, until `close`."""
        self._put_back.append(replaced(host, method, function))

    def close(self) -> None:
        """Put the host's methods back."""
        while self._put_back:
            self._put_back.pop()()


WRITES_ONE_RANK = (
    "would write the experts of rank 0 alone, and they are divided over ranks: turn the host's checkpoints off, and "
    "call dynmoe_tutel.checkpoint.distributed.save on all ranks, for example from a callback of your own"
)


def replaced(host: Any, method: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Set a method of one object; returns a function that puts back what was there."""
    before = vars(host).get(method)
    setattr(host, method, function)

    def put_back() -> None:
        if before is None:
            delattr(host, method)
        else:
            setattr(host, method, before)

    return put_back


def _refuse_averaged_by(ddp: DistributedDataParallel) -> None:
    averaged = [name for name, _ in expert_parameters(ddp.module) if name not in ddp.parameters_to_ignore]
    if averaged:
        raise ValueError(
            f"DistributedDataParallel averages {averaged[0]}, of which each rank holds another expert: call "
            "dynmoe_tutel.parallel.ignore_experts_in_ddp(model) before the model is wrapped"
        )
