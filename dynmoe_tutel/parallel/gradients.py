"""Gradient averaging under expert parallelism: recipes for DDP, FSDP2 and plain all-reduce.

`gradient_norm` measures and clips what is averaged here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .collectives import wire_device, world_size
from .placement import Placement

_NONE, _STRIDED, _SPARSE = range(3)  # what a rank has as the gradient of a parameter


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters of experts that are divided over ranks: each is on one rank of its group only.

    Parameters that all experts share, such as the slope of an activation, are not among them: every rank has them.
    """
    for prefix, layer in _divided_layers(model):
        for name, parameter in _of_slots(layer):
            yield f"{prefix}.experts.{name}".lstrip("."), parameter


def placements_of_experts(model: nn.Module) -> dict[int, Placement]:
    """By the id of each parameter of divided experts, the placement of its layer."""
    return {id(parameter): layer.placement for _, layer in _divided_layers(model) for _, parameter in _of_slots(layer)}


def ignore_experts_in_ddp(model: nn.Module) -> None:
    """Make DistributedDataParallel ignore the divided experts; earlier ignored parameters stay ignored.

    Buffers of the experts are ignored too. Call it before `DistributedDataParallel(model)`, and
    `average_gradients(..., dense=False)` once before each optimizer step.
    """
    names = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *(name for name, _ in expert_parameters(model))]
    for prefix, layer in _divided_layers(model):
        names += [f"{prefix}.experts.{name}".lstrip(".") for name, _ in layer.experts.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(dict.fromkeys(names)))


@torch.no_grad()
def average_gradients(
    model: nn.Module,
    group: Any = None,
    expert_data_group: Any = None,
    *,
    dense: bool = True,
    parameters: Iterable[nn.Parameter] | None = None,
) -> None:
    """Turn gradients into those of the mean loss over all ranks of `group` (None: all ranks).

    Call it on all ranks, once before each optimizer step: after the last backward that accumulates into it.

    Gradients of parameters that all ranks hold are averaged over `group`; `dense=False` skips them (DDP or FSDP has
    averaged them). Gradients of divided experts are already summed over their own group; they are summed over
    `expert_data_group`, the ranks that hold the same experts (None: none), and divided by the size of `group`. Of the
    model's parameters only `parameters` are averaged (None: all).

    A gradient that is None on some ranks only counts as zeros there: afterwards all ranks have it. One that is None on
    all ranks stays None.

    Raises ValueError on every rank if a gradient to be summed is sparse, or if `expert_data_group` is not the group
    of an expert's copies.
    """
    ranks, placements = world_size(group), placements_of_experts(model)
    chosen = None if parameters is None else {id(parameter) for parameter in parameters}
    named = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if (dense or id(parameter) in placements) and (chosen is None or id(parameter) in chosen)
    ]
    averaged = [placements[id(p)] for _, p in named if id(p) in placements]
    check_expert_data_group(averaged, placements.values(), group, expert_data_group)
    alone = {key for key, placement in placements.items() if placement.ranks == ranks}  # without copies
    summed = [(name, parameter) for name, parameter in named if id(parameter) not in alone]
    if ranks > 1 and summed:
        _complete_gradients(summed, group)
    for _, parameter in named:
        if parameter.grad is None:
            continue
        if ranks > 1 and id(parameter) not in alone:
            dist.all_reduce(parameter.grad, group=expert_data_group if id(parameter) in placements else group)
        parameter.grad /= ranks


def copies_of_experts(placement: Placement, group: Any) -> int:
    """How many ranks of `group` (None: all) hold the same expert; ValueError if the ranks that divide do not fit in."""
    ranks = world_size(group)
    if ranks % placement.ranks:
        raise ValueError(
            f"group has {ranks} ranks, and a layer's experts are divided over {placement.ranks}: give the group of all "
            "ranks that train the model (None: all of the job)"
        )
    return ranks // placement.ranks


def check_expert_data_group(
    averaged: Iterable[Placement], of_model: Iterable[Placement], group: Any, expert_data_group: Any
) -> None:
    """ValueError unless `expert_data_group` has as many ranks as the experts of `averaged` have copies.

    A group of several ranks must be that of some experts of the model. None stands for a group of one rank.
    """
    copies = {copies_of_experts(placement, group) for placement in averaged}
    given = 1 if expert_data_group is None else world_size(expert_data_group)
    if copies and given not in {1, *(copies_of_experts(placement, group) for placement in of_model)}:
        raise ValueError(
            f"expert_data_group has {given} ranks, and no expert has as many copies in group: leave it out where "
            "every expert is on one rank, or give the ranks that hold the same experts"
        )
    if copies <= {1, given}:
        return
    what = "None" if expert_data_group is None else f"a group of {given} ranks"
    raise ValueError(
        f"expert_data_group is {what}, and divided experts have copies on {_numbers(copies - {1})} ranks: give the "
        "ranks that hold the same experts, such as mesh['data'].get_group() of a mesh ('data', 'experts')"
    )


def _divided_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The named layers of `model` whose experts are divided over ranks."""
    for prefix, module in model.named_modules():
        placement = getattr(module, "placement", None)
        if isinstance(placement, Placement) and placement.ranks > 1:
            yield prefix, module


def _of_slots(layer: Any) -> list[tuple[str, nn.Parameter]]:
    """The named parameters of a layer's experts that hold slots of this rank; all, where experts do not say which."""
    named = list(layer.experts.named_parameters())
    access = getattr(layer, "expert_slots", None)
    if access is None:
        return named
    held = {id(p) for slot in range(layer.placement.slots) for p, _ in access.slot_parameters(slot)}
    return [(name, parameter) for name, parameter in named if id(parameter) in held]


def _complete_gradients(named: list[tuple[str, nn.Parameter]], group: Any) -> None:
    """Give zeros to parameters without a gradient that have one on another rank of `group`; ValueError if sparse.

    One collective of an integer a parameter: every rank then sums the same gradients in the same order. Waits for the
    device.
    """
    here = [_NONE if p.grad is None else _STRIDED if p.grad.layout is torch.strided else _SPARSE for _, p in named]
    anywhere = torch.tensor(here, dtype=torch.int32, device=wire_device(group))
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=group)
    kinds = anywhere.tolist()
    if _SPARSE in kinds:
        refuse_sparse(named[kinds.index(_SPARSE)][0])
    for (_, parameter), kind in zip(named, kinds, strict=True):
        if parameter.grad is None and kind != _NONE:
            parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))


def refuse_sparse(name: str) -> None:
    """ValueError: the gradient of this parameter is sparse."""
    raise ValueError(
        f"the gradient of {name} is sparse, which is not summed over ranks: give its module sparse=False, or average "
        "and clip it apart"
    )


def _numbers(values: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(values)))
