"""The norm of all gradients where ranks divide experts, and clipping by it.

A rank alone sees the gradients of its own experts only: its norm, and the factor that it would clip by, would be others
than those of the other ranks, and parameters that all ranks hold would drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .collectives import gathered, wire_device, world_size
from .gradients import copies_of_experts, placements_of_experts, refuse_sparse
from .placement import Placement


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Any = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Tensor:
    """Scale the gradients by min(1, max_norm / (norm + 1e-6)), equally on all ranks; returns the norm before that.

    As `torch.nn.utils.clip_grad_norm_`, with the norm of `grad_norm`, and the model instead of its parameters. Call it
    on all ranks of `group`, after `average_gradients`. `max_norm` = inf leaves the gradients as they are.

    Raises ValueError if `max_norm` is not above 0; else what `grad_norm` raises.
    """
    limit = _above_zero("max_norm", max_norm)
    chosen = _chosen(model, parameters)
    norm = grad_norm(model, norm_type, error_if_nonfinite, foreach, group=group, parameters=chosen)
    if limit < math.inf:
        for alike in _alike(chosen, _mesh):  # torch mixes no tensors of several meshes
            torch.nn.utils.clip_grads_with_norm_(alike, limit, norm, foreach)
    return norm


@torch.no_grad()
def grad_norm(
    model: nn.Module,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Any = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Tensor:
    """The norm of all gradients as one vector: 0-dim, float32 (float64 for float64 parameters), bitwise equal on ranks.

    Each divided expert counts once, whatever its number of copies, and each parameter that all ranks hold once. A
    gradient that is None counts as zero. Gradients of less precision are summed in float32, those that FSDP2 has
    sharded are whole. Only `parameters` count (None: all of the model's). Call it on all ranks of `group` (None: all),
    after `average_gradients`. Where no parameter is divided it is the norm of this process, without communication.

    `norm_type` is p of the p-norm, or inf. `foreach=False` takes the norms one by one; the result is the same.

    Raises ValueError if `norm_type` is not above 0 or a gradient is sparse; RuntimeError on every rank if
    `error_if_nonfinite` and the norm is inf or NaN.
    """
    power = _above_zero("norm_type", norm_type)
    chosen = _chosen(model, parameters)
    _refuse_sparse(model, chosen)
    placements = placements_of_experts(model)
    divided = world_size(group) > 1 and any(id(parameter) in placements for parameter in chosen)
    ranks: Any = dist.group.WORLD if divided and group is None else group
    dtype = torch.float64 if any(p.dtype in (torch.float64, torch.complex128) for p in chosen) else torch.float32
    device = next((p.grad.device for p in chosen if p.grad is not None), torch.device("cpu"))
    norms: list[Tensor] = []

    def place(parameter: nn.Parameter) -> Any:
        grad = cast(Tensor, parameter.grad)
        return _mesh(parameter), placements.get(id(parameter)), grad.device, grad.dtype

    for alike in _alike(chosen, place):
        own = _norms([p.grad for p in alike if p.grad is not None], power, foreach)
        if not divided or _counts_here(placements.get(id(alike[0])), ranks):
            norms += [norm.to(device, dtype) for norm in own]
    norm = torch.linalg.vector_norm(torch.stack(norms), power) if norms else torch.zeros((), dtype=dtype, device=device)
    if divided:
        of_ranks = gathered(norm.reshape(1).to(wire_device(ranks)), ranks)
        norm = torch.linalg.vector_norm(of_ranks, power).to(device)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"the norm of order {power:g} of the gradients is {float(norm)}, so they cannot be clipped: look for the "
            "cause, or give error_if_nonfinite=False"
        )
    return norm


def _chosen(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> list[nn.Parameter]:
    """The parameters to measure, without repetition; ValueError if `model` is not a module."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be the module that holds the MoE layers, got {type(model).__name__}: parameters alone do not "
            "say which of them are divided over ranks (parameters= restricts the norm to some of the model's)"
        )
    given = model.parameters() if parameters is None else parameters
    return list({id(parameter): parameter for parameter in given}.values())


def _above_zero(name: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not found > 0:
        raise ValueError(f"{name} = {value!r}: give a number above 0, or inf")
    return found


def _refuse_sparse(model: nn.Module, chosen: list[nn.Parameter]) -> None:
    sparse = {id(p) for p in chosen if p.grad is not None and p.grad.layout is not torch.strided}
    if sparse:
        refuse_sparse(next((name for name, p in model.named_parameters() if id(p) in sparse), "a parameter"))


def _counts_here(placement: Placement | None, group: Any) -> bool:
    """Whether this rank's share of the norm has parameters of this placement (None: held by all ranks).

    What has copies counts where the first rank of `group` has its copy.
    """
    first = dist.get_global_rank(group, 0)
    if placement is None:
        return dist.get_rank() == first
    copies_of_experts(placement, group)  # refuses a group that is too small
    return first in dist.get_process_group_ranks(placement.group)


def _mesh(parameter: nn.Parameter) -> Any:
    """The device mesh over which the gradient is sharded (a DTensor); None for a plain tensor."""
    return getattr(parameter.grad, "device_mesh", None)


def _alike(chosen: list[nn.Parameter], key: Callable[[nn.Parameter], Any]) -> list[list[nn.Parameter]]:
    """Parameters with a gradient, in lists of equal `key`; in the same order on every rank."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in chosen:
        if parameter.grad is not None and parameter.grad.numel():
            found.setdefault(key(parameter), []).append(parameter)
    return list(found.values())


def _norms(grads: list[Tensor], power: float, foreach: bool | None) -> list[Tensor]:
    """The norm of each of these alike gradients, in at least float32; of the whole gradient where it is sharded."""
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    if hasattr(grads[0], "full_tensor"):
        total = torch.nn.utils.get_total_norm([grad.to(dtype) for grad in grads], power, foreach=foreach)
        return [cast(Any, total).full_tensor()]
    if foreach is False:
        return [torch.linalg.vector_norm(grad, power, dtype=dtype) for grad in grads]
    return list(torch._foreach_norm(grads, power, dtype=dtype))
