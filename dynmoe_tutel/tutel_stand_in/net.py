"""`tutel.net` for training scripts, over torch.distributed: collectives, their gradients, process groups.

Without a process group, or in a group of one, every collective returns its input. `group=None` means all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "all_gather",
    "all_to_all",
    "all_to_all_single",
    "allreduce_backward",
    "allreduce_forward",
    "barrier",
    "create_groups_from_world",
    "create_standalone_group",
    "get_world_rank",
    "get_world_size",
    "reduce_scatter",
    "simple_all_gather",
    "simple_all_reduce",
    "simple_all_to_all",
    "simple_reduce_scatter",
    "simple_split",
    "spatial_split",
]

_Operation = Callable[..., Tensor]
_SUM = dist.ReduceOp.SUM


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size(group: Any = None) -> int:
    """Ranks of `group`; 1 without a process group."""
    return dist.get_world_size(group) if _initialized() else 1


def get_world_rank(group: Any = None) -> int:
    """This process's rank in `group`; 0 without a process group."""
    return dist.get_rank(group) if _initialized() else 0


def barrier(group: Any = None) -> None:
    """Wait for all ranks of `group`."""
    if get_world_size(group) > 1:
        dist.barrier(group=group)


# Collectives without a gradient


def simple_all_reduce(input: Tensor, group: Any = None, op: Any = _SUM, inplace: bool = False) -> Tensor:
    """The sum (or `op`) over the ranks, in a new tensor unless `inplace`."""
    if get_world_size(group) == 1:
        return input
    output = input if inplace else input.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(output, op=op, group=group)
    return output


def simple_all_to_all(input: Tensor, group: Any = None, background: bool = False) -> Any:
    """Slice r of dimension 0 goes to rank r; with `background`, (output, a function that waits for it)."""
    input = input.contiguous()
    world_size = get_world_size(group)
    if world_size == 1:
        return (input, lambda *_: None) if background else input
    _check_divides(input, 0, world_size)
    output = torch.empty_like(input)
    work = dist.all_to_all_single(output, input, group=group, async_op=background)
    return (output, work.wait) if background else output


def simple_split(input: Tensor, group: Any = None) -> Tensor:
    """This rank's slice of dimension 0."""
    world_size = get_world_size(group)
    if world_size == 1:
        return input
    _check_divides(input, 0, world_size)
    return input.contiguous().chunk(world_size, dim=0)[get_world_rank(group)]


def simple_reduce_scatter(input: Tensor, group: Any = None, op: Any = _SUM) -> Tensor:
    """This rank's slice of dimension 0 of the sum (or `op`) over the ranks."""
    world_size = get_world_size(group)
    if world_size == 1:
        return input
    _check_divides(input, 0, world_size)
    if not input.is_cuda:  # Gloo has no reduce-scatter in every version of torch
        return simple_split(simple_all_reduce(input, group, op), group)
    slices = list(input.contiguous().chunk(world_size, dim=0))
    output = torch.empty_like(slices[0])
    dist.reduce_scatter(output, slices, op=op, group=group)
    return output


def simple_all_gather(input: Tensor, group: Any = None) -> Tensor:
    """Concatenate the ranks' tensors, of equal shapes, along dimension 0."""
    world_size = get_world_size(group)
    if world_size == 1:
        return input
    input = input.contiguous() if input.dim() else input.reshape(1)
    parts = [torch.empty_like(input) for _ in range(world_size)]
    dist.all_gather(parts, input, group=group)
    return torch.cat(parts)


def _check_divides(input: Tensor, dim: int, world_size: int) -> None:
    if input.dim() == 0 or input.shape[dim] % world_size:
        raise ValueError(
            f"input has shape {list(input.shape)}: dimension {dim} must be a multiple of the {world_size} ranks"
        )


# Collectives with a gradient


class _AllToAll(torch.autograd.Function):
    """Split along `output_dim`, exchange, concatenate along `input_dim`; the backward does the reverse."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, input_dim: int, output_dim: int, group: Any) -> Tensor:
        ctx.dims, ctx.group = (output_dim, input_dim), group
        slices = torch.stack(input.chunk(get_world_size(group), dim=output_dim))
        return torch.cat(simple_all_to_all(slices, group).unbind(0), dim=input_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _AllToAll.apply(grads[0], *ctx.dims, ctx.group), None, None, None


class _AllToAllSingle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any) -> Tensor:
        ctx.group = group
        output = simple_all_to_all(input, group)
        return output.view_as(output) if output is input else output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _AllToAllSingle.apply(grads[0], ctx.group), None


class _Collective(torch.autograd.Function):
    """`forward_of` in the forward, `backward_of` in the backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, forward_of: _Operation, backward_of: _Operation) -> Tensor:
        ctx.backward_of = backward_of
        output = forward_of(input)
        return output.view_as(output) if output is input else output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.backward_of(grads[0]), None, None


def _same(input: Tensor) -> Tensor:
    return input


def _along(input: Tensor, dim: int, forward_of: _Operation, backward_of: _Operation, group: Any) -> Tensor:
    """Apply a collective over dimension 0 to `dim`."""
    if get_world_size(group) == 1:
        return input
    moved = _Collective.apply(
        input.transpose(0, dim), lambda x: forward_of(x, group), lambda dy: backward_of(dy, group)
    )
    return moved.transpose(0, dim)


def all_to_all(
    input: Tensor, input_dim: int, output_dim: int, group: Any = None, background: bool = False, use_2dh: bool = False
) -> Any:
    """Split along `output_dim` over the ranks, exchange, concatenate along `input_dim`. With `background`, returns a
    function that returns the result. `use_2dh` takes all ranks: it changes Tutel's network path, not the result."""
    group = None if use_2dh else group
    world_size = get_world_size(group)
    output = input
    if input_dim != output_dim and world_size > 1:
        _check_divides(input, output_dim, world_size)
        output = _AllToAll.apply(input, input_dim, output_dim, group)
    return (lambda *_: output) if background else output


def all_to_all_single(input: Tensor, group: Any = None) -> Tensor:
    """`simple_all_to_all` with a gradient."""
    return _AllToAllSingle.apply(input, group)


def all_gather(input: Tensor, dim: int, fused: bool = False, group: Any = None) -> Tensor:
    """Concatenate the ranks' tensors along `dim`. A rank's gradient is its slice of its own output's gradient or, if
    `fused`, of the sum over all ranks."""
    return _along(input, dim, simple_all_gather, simple_reduce_scatter if fused else simple_split, group)


def reduce_scatter(input: Tensor, dim: int, group: Any = None) -> Tensor:
    """This rank's slice, along `dim`, of the sum over the ranks; the backward gathers gradients."""
    return _along(input, dim, simple_reduce_scatter, simple_all_gather, group)


def spatial_split(input: Tensor, dim: int, group: Any = None) -> Tensor:
    """This rank's slice along `dim`; the backward gathers gradients."""
    return _along(input, dim, simple_split, simple_all_gather, group)


def allreduce_forward(input: Tensor, op: Any = _SUM, group: Any = None) -> Tensor:
    """The sum (or `op`) over the ranks; the gradient passes unchanged."""
    return _Collective.apply(input, lambda x: simple_all_reduce(x, group, op), _same)


def allreduce_backward(input: Tensor, op: Any = _SUM, group: Any = None) -> Tensor:
    """The input; its gradient is the sum (or `op`) over the ranks."""
    return _Collective.apply(input, _same, lambda dy: simple_all_reduce(dy, group, op))


# Process groups


@dataclass
class ParallelEnvironment:
    """`group_count` groups of `model_size` neighbouring ranks; `data_group` has one rank from each group.

    `local_device` is None if no backend was given; the groups are None in a single process.
    """

    global_size: int
    global_rank: int
    group_count: int
    data_rank: int
    model_size: int
    model_rank: int
    local_device: torch.device | None
    data_group: Any
    model_group: Any
    global_group: Any
    is_distributed: bool
    dist_print: Callable[..., None]
    is_cuda: bool = False


_environments: dict[Any, tuple[str | None, ParallelEnvironment]] = {}  # by (process group of all ranks, group_count)


def create_groups_from_world(
    group_count: int, include_init: str | None = None, parent_group: Any = None
) -> ParallelEnvironment:
    """Divide all ranks into `group_count` groups (-n: groups of n ranks); returns the same object for the same count.

    `include_init` is a backend ("nccl", "gloo"): it initialises torch.distributed, once, if the environment names
    ranks (RANK and WORLD_SIZE, or mpiexec's). Raises ValueError for another backend, for "nccl" without a GPU, or if
    the count does not divide the ranks.
    """
    if include_init not in (None, "nccl", "gloo"):
        raise ValueError(f"backend = {include_init!r}: allowed are 'nccl' and 'gloo'")
    if include_init == "nccl" and not torch.cuda.is_available():
        raise ValueError("backend = 'nccl' needs a GPU, and torch sees none: give 'gloo'")
    if 1 < get_world_size(parent_group) < get_world_size():
        raise ValueError("parent_group is a part of the ranks: give None, only all ranks can be divided")
    if include_init and not _initialized():
        _initialize(include_init, os.environ)
    world = dist.group.WORLD if _initialized() else None
    backend = include_init or next((b for (w, _), (b, _) in _environments.items() if w is world and b), None)
    known = _environments.get((world, group_count))
    if known is None or known[0] != backend:
        known = _environments[world, group_count] = (backend, _divide(group_count, backend))
    return known[1]


def create_standalone_group() -> Any:
    """A group of this rank alone; None without a process group."""
    return dist.new_group(ranks=[get_world_rank()]) if _initialized() else None


def _timeout() -> timedelta:
    return timedelta(seconds=int(os.environ.get("TUTEL_GLOBAL_TIMEOUT_SEC", "86400")))


def _initialize(backend: str, environment: Mapping[str, str]) -> None:
    if "LOCAL_RANK" not in environment and "OMPI_COMM_WORLD_SIZE" in environment:
        address, port = environment.get("MASTER_ADDR", "127.0.0.1"), environment.get("MASTER_PORT", "23456")
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{port}",
            rank=int(environment["OMPI_COMM_WORLD_RANK"]),
            world_size=int(environment["OMPI_COMM_WORLD_SIZE"]),
            timeout=_timeout(),
        )
    elif {"RANK", "WORLD_SIZE"} <= environment.keys() and (
        environment["WORLD_SIZE"] != "1" or {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys()
    ):
        dist.init_process_group(backend, timeout=_timeout())


def _local_rank(environment: Mapping[str, str]) -> int:
    text = environment.get("LOCAL_RANK", environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    return min(int(text), torch.cuda.device_count() - 1)


def _divide(group_count: int, backend: str | None) -> ParallelEnvironment:
    size, rank = get_world_size(), get_world_rank()
    count = group_count if group_count >= 0 else size // -group_count
    if count < 1 or size % count:
        raise ValueError(f"group_count = {group_count}: give a divisor of the {size} ranks, or -n for groups of n")
    inner = size // count
    device = {"gloo": torch.device("cpu"), None: None}.get(backend)
    if backend == "nccl":
        device = torch.device("cuda", _local_rank(os.environ))
        torch.cuda.set_device(device)
    whole = dist.group.WORLD if _initialized() else None
    model_group = data_group = whole
    if whole is not None:
        if count > 1:
            model_group = _own_group([list(range(i * inner, (i + 1) * inner)) for i in range(count)], rank)
        if inner > 1:
            data_group = _own_group([list(range(i, size, inner)) for i in range(inner)], rank)
    return ParallelEnvironment(
        global_size=size,
        global_rank=rank,
        group_count=count,
        data_rank=rank // inner,
        model_size=inner,
        model_rank=rank % inner,
        local_device=device,
        data_group=data_group,
        model_group=model_group,
        global_group=whole,
        is_distributed=whole is not None,
        dist_print=print if rank == 0 else _no_print,
        is_cuda=device is not None and device.type == "cuda",
    )


def _own_group(groups: list[list[int]], rank: int) -> Any:
    """Make every group, as every rank must, and return the one with `rank`."""
    made = [dist.new_group(ranks=ranks, timeout=_timeout()) for ranks in groups]
    return next(group for ranks, group in zip(groups, made, strict=True) if rank in ranks)


def _no_print(*_: object, **__: object) -> None:
    """`dist_print` on all ranks but the first."""
