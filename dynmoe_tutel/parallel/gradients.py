"""Gradient averaging under expert parallelism: recipes for DDP, FSDP2 and plain all-reduce."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .placement import Placement


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters of experts that are divided over ranks: each is on one rank of its group only."""
    for prefix, module in model.named_modules():
        placement = getattr(module, "placement", None)
        if isinstance(placement, Placement) and placement.ranks > 1:
            for name, parameter in module.experts.named_parameters():
                yield f"{prefix}.experts.{name}".lstrip("."), parameter


def ignore_experts_in_ddp(model: nn.Module) -> None:
    """Make DistributedDataParallel ignore the divided experts; earlier ignored parameters stay ignored.

    Call it before `DistributedDataParallel(model)`, and `average_gradients(..., dense=False)` after each backward.
    """
    names = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *(name for name, _ in expert_parameters(model))]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


@torch.no_grad()
def average_gradients(
    model: nn.Module, group: Any = None, expert_data_group: Any = None, *, dense: bool = True
) -> None:
    """Turn gradients into those of the mean loss over all ranks of `group` (None: all ranks).

    Gradients of parameters that all ranks hold are averaged over `group`; `dense=False` skips them (DDP or FSDP has
    averaged them). Gradients of divided experts are already summed over their own group; they are summed over
    `expert_data_group`, the ranks that hold the same experts (None: none), and divided by the size of `group`.
    """
    experts = {id(parameter) for _, parameter in expert_parameters(model)}
    ranks = dist.get_world_size(group)
    for parameter in model.parameters():
        if parameter.grad is None or not (dense or id(parameter) in experts):
            continue
        if id(parameter) not in experts:
            dist.all_reduce(parameter.grad, group=group)
        elif expert_data_group is not None:
            dist.all_reduce(parameter.grad, group=expert_data_group)
        parameter.grad /= ranks
