"""`tutel.net`, continued: parameters that are divided over the ranks, and tensors of unequal sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .net import (
    all_gather,
    get_world_rank,
    get_world_size,
    simple_all_gather,
    simple_all_to_all,
    simple_reduce_scatter,
    simple_split,
)

__all__ = ["TutelDistributedOptimizer", "batch_all_gather_v", "batch_all_to_all_v", "zero_gather", "zero_scatter"]


def zero_gather(input: Tensor, full_shape: Sequence[int] | None = None, group: Any = None) -> Tensor:
    """The ranks' parts of a parameter, concatenated and without padding, in `full_shape` (default: n times dimension 0
    of `input`). The backward gives each rank the sum, over the ranks, of its part's gradients."""
    shape = list(full_shape or (input.shape[0] * get_world_size(group), *input.shape[1:]))
    return all_gather(input, 0, fused=True, group=group).reshape(-1)[: torch.Size(shape).numel()].view(shape)


def zero_scatter(input: Tensor, scatter_fn: Callable[..., Tensor], group: Any = None) -> tuple[Tensor, torch.Size]:
    """(this rank's part, the shape of `input`): `scatter_fn` (`simple_split`, `simple_reduce_scatter`) of all elements,
    padded with zeros to a multiple of the ranks."""
    flat, ranks = input.reshape(-1), get_world_size(group)
    if behind := -flat.numel() % ranks:
        flat = torch.cat([flat, flat.new_zeros(behind)])
    return scatter_fn(flat, group=group), input.shape


class TutelDistributedOptimizer:
    """Divides the shared parameters over the ranks of `group`: each updates a part, as ZeRO does, and keeps its state.

    Expert parameters of a MoE layer are each rank's own. Gradients of shared parameters are summed over the ranks, or
    averaged with `average_shared`. Call `warp_local` first; `local_optim` is then the optimizer of this rank's parts.
    """

    def __init__(self, params: Iterable[Tensor], group: Any = None, average_shared: bool = False) -> None:
        given = list(params)
        self.params = [p for p in given if not hasattr(p, "_tutel_expert")]
        self.expert_params = [p for p in given if hasattr(p, "_tutel_expert")]
        self.group, self.average_shared = group, average_shared
        self.local_optim: torch.optim.Optimizer | None = None

    @torch.no_grad()
    def warp_local(
        self, local_optim: Callable[..., torch.optim.Optimizer], *args: Any, **kwargs: Any
    ) -> TutelDistributedOptimizer:
        """Make `local_optim(parameters, *args, **kwargs)` of this rank's parts and experts; returns itself."""
        self.virt_params = [self._part(p).clone() for p in self.params]
        self.local_optim = local_optim([*self.virt_params, *self.expert_params], *args, **kwargs)
        return self

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        for parameter in (*self.params, *self.expert_params):
            if parameter.grad is not None:
                parameter.grad.detach_().zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Reduce gradients, update this rank's parts and experts, gather the parts. All ranks must call it."""
        if self.local_optim is None:
            raise RuntimeError("no optimizer to step: call warp_local(torch.optim.SGD, lr=...) first")
        ranks = get_world_size(self.group)
        for parameter, part in zip(self.params, self.virt_params, strict=True):
            part.copy_(self._part(parameter))
            part.grad = None
            if parameter.grad is not None:
                grad = parameter.grad / ranks if self.average_shared else parameter.grad
                part.grad = zero_scatter(grad, simple_reduce_scatter, self.group)[0]
        self.local_optim.step()
        for parameter, part in zip(self.params, self.virt_params, strict=True):
            whole = simple_all_gather(part, self.group)
            parameter.copy_(whole.view(-1)[: parameter.numel()].view(parameter.shape))

    def _part(self, parameter: Tensor) -> Tensor:
        return zero_scatter(parameter.detach(), simple_split, self.group)[0]


def batch_all_to_all_v(
    datas: Sequence[Tensor], partition_sizes: Tensor | Sequence[int], group: Any = None
) -> tuple[list[Tensor], Tensor]:
    """(received tensors, flat; elements received from each rank [R] int64): the first `partition_sizes[0]` elements of
    each tensor go to rank 0, the next `partition_sizes[1]` to rank 1, and so on."""
    flat = [data.contiguous().view(-1) for data in datas]
    sizes_R = torch.as_tensor(partition_sizes, dtype=torch.int64, device=flat[0].device)
    if sizes_R.numel() != get_world_size(group):
        raise ValueError(f"partition_sizes has {sizes_R.numel()} entries: give one for each of the ranks")
    received_R = simple_all_to_all(sizes_R, group)
    if get_world_size(group) == 1:
        return flat, received_R
    sent, received = sizes_R.tolist(), received_R.tolist()
    if any(data.numel() != sum(sent) for data in flat):
        raise ValueError(f"datas have {[data.numel() for data in flat]} elements, and partition_sizes {sum(sent)}")
    outputs = [data.new_empty(sum(received)) for data in flat]
    for output, data in zip(outputs, flat, strict=True):
        dist.all_to_all_single(output, data, received, sent, group=group)
    return outputs, received_R


def batch_all_gather_v(datas: Sequence[Tensor], group: Any = None) -> tuple[list[Tensor], Tensor]:
    """(each tensor's elements of all ranks, concatenated; elements of each rank [R] int64): ranks may have different
    numbers of elements, the same in every tensor of a rank."""
    flat = [data.contiguous().view(-1) for data in datas]
    if any(data.numel() != flat[0].numel() for data in flat):
        raise ValueError(f"datas have {[data.numel() for data in flat]} elements: give tensors of one size")
    sizes_R = simple_all_gather(torch.tensor([flat[0].numel()], device=flat[0].device), group)
    if get_world_size(group) == 1:
        return flat, sizes_R
    sizes, own = sizes_R.tolist(), get_world_rank(group)
    outputs = []
    for data in flat:
        padded = data.new_zeros(max(*sizes, 1))
        padded[: sizes[own]] = data
        parts = simple_all_gather(padded, group).chunk(len(sizes))
        outputs.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return outputs, sizes_R
