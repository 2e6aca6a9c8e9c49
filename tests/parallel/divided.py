"""Experts divided over real ranks in the plainest way, for what controller, rebalance and checkpoints do with them.

Every rank sees all tokens and all gates, computes its own slots densely, and the ranks add up. Slots, attributes and
slot surgery are those of an expert-parallel layer: slot e on rank e // local_slots of `group`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe_tutel import MoELayer


class _Gather(torch.autograd.Function):
    """[T, n] of every rank behind one another; backward, each rank's rows get the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        ctx.group, ctx.rows = group, slice(dist.get_rank(group) * len(own), (dist.get_rank(group) + 1) * len(own))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.rows], None


class _Sum(torch.autograd.Function):
    """The sum over the ranks, of which each rank uses its own rows; backward, the gradients of all ranks add up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group, total = group, own.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class DividedLayer(MoELayer):
    """A layer over the ranks of `group` (None: all); drawn as one process draws it."""

    def __init__(self, *arguments: Any, group: Any = None, **options: Any) -> None:
        super().__init__(*arguments, group=group, **options)
        self.record_group = None  # all ranks

    def _start(self, experts: Any) -> int:
        start = super()._start(experts)
        self.world_size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        return start

    def _make_experts(self, config: Any, generator: torch.Generator | None) -> Any:
        experts = super()._make_experts(config, generator)
        self.local_slots = experts.slots = self.slots // self.world_size
        first = self.rank * self.local_slots
        for name, parameter in list(experts.named_parameters()):
            own = parameter.detach()[first : first + self.local_slots].clone()
            setattr(experts, name, nn.Parameter(own))
        return experts

    @property
    def expert_slots(self) -> Any:
        return _Slots(self)

    def _through_experts(self, x_TD: Tensor, routing: Any, combine_gradient: str) -> Tensor:
        e_A = torch.repeat_interleave(torch.arange(self.slots), routing.counts)
        gate_TE = torch.zeros(len(x_TD), self.slots).index_put(
            (routing.token_of_row.long(), e_A), routing.row_gates(combine_gradient)
        )
        # as many tokens on every rank
        x, gate = (_Gather.apply(t, self.group) for t in (x_TD, gate_TE))
        total = torch.zeros_like(x)
        experts = self.experts
        for slot in range(self.local_slots):
            h = F.gelu(x @ experts.batched_fc1_w[slot].t() + experts.batched_fc1_bias[slot])
            y = h @ experts.batched_fc2_w[slot] + experts.batched_fc2_bias[slot]
            total = total + gate[:, self.rank * self.local_slots + slot].unsqueeze(1) * y
        total = _Sum.apply(total, self.group)
        own = total[self.rank * len(x_TD) : (self.rank + 1) * len(x_TD)]
        return own / routing.k_per_token.clamp(min=1).unsqueeze(1)


class _Slots:
    def __init__(self, layer: DividedLayer) -> None:
        self.layer, self.group = layer, layer.group or dist.group.WORLD

    def slot_parameters(self, slot: int) -> list[Any]:
        owner, local = divmod(slot, self.layer.local_slots)
        return [(p, (local,)) for p in self.layer.experts.parameters()] if owner == self.layer.rank else []

    @torch.no_grad()
    def copy_slot(self, target: int, sources: list[int]) -> None:
        means = [
            torch.stack([self._sent(p, source) for source in sources]).mean(dim=0)
            for p in self.layer.experts.parameters()
        ]
        for (parameter, index), mean in zip(self.slot_parameters(target), means, strict=False):
            parameter[index] = mean

    def _sent(self, parameter: Tensor, slot: int) -> Tensor:
        owner, local = divmod(slot, self.layer.local_slots)
        row = parameter.detach()[local].clone()
        dist.broadcast(row, dist.get_global_rank(self.group, owner), group=self.group)
        return row

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator) -> None:
        owner, local = divmod(slot, self.layer.local_slots)
        before = [p[local].clone() for p in self.layer.experts.parameters()]
        self.layer.experts.reset_slot(local, generator)  # every rank draws, one keeps
        for parameter, row in zip(self.layer.experts.parameters(), before, strict=True):
            if owner != self.layer.rank:
                parameter[local] = row
