"""Three exchanges of the same routed tokens, over torch.distributed, and what counts their bytes.

All take the gate and this rank's experts (a block of slots) of one layer and give its output: same gate, same expert
kernels, same index kernels; they differ in what travels. See `cost_model` for what that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynmoe_tutel import kernels
from dynmoe_tutel.capacity import largest
from dynmoe_tutel.experts import Experts
from dynmoe_tutel.gates import Gate
from dynmoe_tutel.parallel.exchange import Call
from dynmoe_tutel.parallel.placement import Placement
from dynmoe_tutel.parallel.rank_exchange import RankExchange
from dynmoe_tutel.routing import PaddedRows, Routing


def _all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent))
    return out


class _Exchange(torch.autograd.Function):
    """Rows to the ranks that `sent` says; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        ctx.splits = (received, sent)
        return _all_to_all(x, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _all_to_all(grads[0], *ctx.splits), None, None


class _Gated(torch.autograd.Function):
    """Rows times their gate values of 1: nothing to compute but the gradient of the gate."""

    @staticmethod
    def forward(ctx: Any, rows_AD: Tensor, gate_A: Tensor) -> Tensor:
        ctx.save_for_backward(rows_AD)
        return rows_AD.view_as(rows_AD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (rows_AD,) = ctx.saved_tensors
        return grads[0], torch.linalg.vecdot(rows_AD.float(), grads[0].float())


def _counts(sent_N: Tensor) -> Tensor:
    """The counts that other ranks sent this one."""
    out = torch.empty_like(sent_N)
    dist.all_to_all_single(out, sent_N)
    return out


def once_per_rank(gate: Gate, experts: Experts, x_TD: Tensor) -> Tensor:
    """The package's own: a token goes once to each rank that holds one of its experts; a partial sum returns."""
    exchange = RankExchange(Placement.over(gate.slots, dist.group.WORLD), gate.num_experts)
    call = Call("exact", 0.0, "mean", (x_TD.shape[1],))
    return exchange(experts, x_TD, gate(x_TD), call)


def _through(experts: Experts, rows_MD: Tensor, expert_M: Tensor) -> Tensor:
    """Each row's expert output, in the order of the rows."""
    bits = kernels.pack_bits(torch.nn.functional.one_hot(expert_M, experts.local_slots).bool())
    here = Routing.from_bits(bits, rows_MD.new_zeros((rows_MD.shape[0], experts.local_slots)))
    return here.sum(experts(rows_MD, here, rows_MD.new_ones(rows_MD.shape[0])))


def per_expert(gate: Gate, experts: Experts, x_TD: Tensor) -> Tensor:
    """Dispatch one row per assignment, and combine its result."""
    R, local = dist.get_world_size(), experts.local_slots
    routing = gate(x_TD)
    sent_RE = routing.counts.long().view(R, local)
    received_RE = _counts(sent_RE)
    sent, received = sent_RE.sum(dim=1).tolist(), received_RE.sum(dim=1).tolist()
    rows_MD = _Exchange.apply(routing.dispatch(x_TD), sent, received)  # by expert, so by rank
    expert_M = torch.arange(local).repeat(R).repeat_interleave(received_RE.flatten())
    rows_AD = _Exchange.apply(_through(experts, rows_MD, expert_M), received, sent)
    return routing.combine(_Gated.apply(rows_AD, routing.row_gates("mean")))


def padded(gate: Gate, experts: Experts, x_TD: Tensor) -> Tensor:
    """Tutel's: dispatch and combine [E, C, D], C the largest load of all ranks; experts compute the padding too."""
    R, local = dist.get_world_size(), experts.local_slots
    routing = gate(x_TD)
    capacity = max(1, largest(int(routing.counts.max()), dist.group.WORLD))
    place = PaddedRows(routing, capacity)
    splits = [local * capacity] * R
    padded_MD = _Exchange.apply(place.pad(routing.dispatch(x_TD)).flatten(0, 1), splits, splits)
    expert_M = torch.arange(local).repeat_interleave(capacity).repeat(R)
    results = _Exchange.apply(_through(experts, padded_MD, expert_M), splits, splits)
    rows_AD = place.unpad(results.view(R * local, capacity, -1))
    return routing.combine(_Gated.apply(rows_AD, routing.row_gates("mean")))


RUN = {"once per rank": once_per_rank, "per expert": per_expert, "padded": padded}


class WireCounter(TorchDispatchMode):
    """Bytes that this rank hands to each rank in collectives, read off the calls of torch.distributed themselves.

    What stays on the rank is not counted; an all-reduce counts as its tensor handed to every other rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rank = dist.get_rank()
        self.bytes_R = torch.zeros(dist.get_world_size(), dtype=torch.int64)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        R = len(self.bytes_R)
        if name == "alltoall_base_":
            sent, splits = args[1], args[4]
            size = sent.numel() * sent.element_size()
            rows = torch.tensor(splits or [1] * R)
            bytes_R = rows * (size // max(1, int(rows.sum())))
        elif name == "allreduce_":
            bytes_R = torch.full((R,), sum(t.numel() * t.element_size() for t in args[0]))
        elif name in ("barrier", "monitored_barrier_"):
            return
        else:
            raise RuntimeError(f"{name}: a collective whose bytes are not counted yet")
        bytes_R[self.rank] = 0
        self.bytes_R += bytes_R
