"""Tutel's capacity factor on a ragged assignment: which rows an expert of limited capacity takes and which it drops.

A token's picks are its experts by falling score. Tutel fills an expert with tokens that pick it first, in token order
(or, batch-prioritised, by falling best score), then with tokens that pick it second, and so on. Rows beyond `capacity`
are dropped; the token's other weights do not change. The bound on rows between two ranks is here too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .kernels import bound_assignments, pack_bits, ragged_index, unpack_bits
from .routing import COMBINE_GRADIENTS, Capacity, Routing, dropping_margins
from .validation import positive_int


def largest(count: int, group: Any) -> int:
    """The largest `count` among the ranks of `group`; None: `count` itself, without communication."""
    if group is None or dist.get_world_size(group) == 1:
        return count
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    value = torch.tensor(count, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return int(value)


def picks(routing: Routing) -> Tensor:
    """Each token's experts by falling score (ties by expert): [T, K] int64, K = max k_t, padded with -1."""
    k_T = routing.k_per_token
    K = int(k_T.max()) if k_T.numel() else 0
    score_TE = routing.scores.detach().nan_to_num(0.0).masked_fill(~routing.assigned, -math.inf)
    expert_TK = score_TE.argsort(dim=1, descending=True, stable=True)[:, :K]
    return expert_TK.masked_fill(torch.arange(K, device=k_T.device) >= k_T.unsqueeze(1), -1)


def locations(expert_TK: Tensor, num_experts: int, importance_T: Tensor | None = None) -> Tensor:
    """The position of each pick in its expert's queue, [T, K] int64 (0 where the pick is -1).

    First picks enter the queues first, then second picks, ...; each in token order, or by falling `importance_T`.
    """
    T, K = expert_TK.shape
    place_TK = torch.zeros_like(expert_TK)
    taken_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_TK.device)
    order_T = None if importance_T is None else importance_T.argsort(descending=True, stable=True)
    for j in range(K):
        expert_T = expert_TK[:, j]
        picked_TE = torch.zeros((T, num_experts + 1), dtype=torch.int64, device=expert_TK.device)
        picked_TE.scatter_(1, expert_T.remainder(num_experts + 1).unsqueeze(1), 1)  # -1 goes to the last column
        picked_TE = picked_TE[:, :num_experts]
        if order_T is None:
            before_TE = picked_TE.cumsum(dim=0)
        else:
            before_TE = torch.empty_like(picked_TE).index_copy_(0, order_T, picked_TE[order_T].cumsum(dim=0))
        place_TK[:, j] = ((before_TE - 1 + taken_E) * picked_TE).sum(dim=1)
        taken_E += picked_TE.sum(dim=0)
    return place_TK


def expert_capacity(
    factor: float,
    num_tokens: int,
    num_experts: int,
    k: int,
    load: int,
    *,
    alignment: int = 1,
    group: Any = None,
    inequivalent_tokens: bool = False,
) -> int:
    """Rows that each expert has room for, at least 1; the same on every rank of `group`.

    `factor` > 0: k * int(factor * ceil(T / E)); 0: the largest load; < 0: the smaller of both, with -factor.
    `num_tokens` is T (with `inequivalent_tokens` the largest over the ranks), `num_experts` E (all slots), `k` the
    largest k_t, `load` the load of the fullest expert. Rounded up to a multiple of `alignment`. Source: Tutel 0.3.
    """
    positive_int("alignment", alignment)
    if inequivalent_tokens:
        num_tokens = largest(num_tokens, group)
    fair = -(-num_tokens // num_experts)
    if factor > 0:
        capacity = largest(k, group) * int(factor * fair)
    else:
        capacity = largest(load, group)
        if factor < 0:
            capacity = min(capacity, largest(k, group) * int(-factor * fair))
    return -(-max(capacity, 1) // alignment) * alignment


def room_for(
    routing: Routing, factor: float, alignment: int, group: Any = None, inequivalent_tokens: bool = False
) -> int:
    """`expert_capacity` for a routing. Waits for the device."""
    k, load = (int(n.max()) if n.numel() else 0 for n in (routing.k_per_token, routing.counts))
    return expert_capacity(
        factor,
        routing.num_tokens,
        routing.num_experts,
        k,
        load,
        alignment=alignment,
        group=group,
        inequivalent_tokens=inequivalent_tokens,
    )


def combine_weights(routing: Routing, combine_gradient: str) -> Tensor:
    """The combine weight of every (token, expert), [T, E], 0 without assignment; gradient as of `Routing.row_gates`."""
    if routing.weights is not None:
        return routing.weights * routing.assigned
    if combine_gradient not in COMBINE_GRADIENTS:
        raise ValueError(f"combine_gradient = {combine_gradient!r}: allowed are 'mean' and 'normalized'")
    gate_TE = routing.assigned.to(routing.scores.dtype)
    if routing.thresholds is not None:
        gate_TE = routing.straight_through() + gate_TE * routing.unrouted.unsqueeze(1)
    k_T1 = gate_TE.sum(dim=1, keepdim=True)
    if combine_gradient == "mean":
        k_T1 = k_T1.detach()
    return gate_TE / k_T1.clamp(min=1)


def bits_of_picks(expert_TK: Tensor, kept_TK: Tensor, num_experts: int) -> Tensor:
    """The bitmask [T, ceil(E / 64)] of the picks that are kept; `expert_TK` is -1 for no pick."""
    kept_TE = torch.zeros((len(expert_TK), num_experts + 1), dtype=torch.bool, device=expert_TK.device)
    kept_TE.scatter_(1, expert_TK.remainder(num_experts + 1).masked_fill(~kept_TK, num_experts), True)
    return pack_bits(kept_TE[:, :num_experts].contiguous())


def drop_beyond_capacity(
    routing: Routing, capacity: int, combine_gradient: str = "mean", *, batch_prioritized: bool = False
) -> Routing:
    """The routing without the rows that find their expert full; `dropped` counts them.

    Weights do not change, as in Tutel: a token that loses one of two experts gets half of the other.
    """
    expert_TK = picks(routing)
    E = routing.num_experts
    best_T = None
    if batch_prioritized:
        best_T = routing.scores.detach().masked_fill(~routing.assigned, -math.inf).amax(dim=1)
    kept_TK = (expert_TK >= 0) & (locations(expert_TK, E, best_T) < capacity)
    kept = Routing.from_bits(
        bits_of_picks(expert_TK, kept_TK, E),
        routing.scores,
        unrouted=routing.unrouted,
        thresholds=routing.thresholds,
        weights=combine_weights(routing, combine_gradient),
        token_mask=routing.token_mask,
    )
    return replace(kept, dropped=(routing.num_assignments - kept.num_assignments).long(), aux=routing.aux)


def pair_capacity(capacity: Capacity, routing: Routing, ranks: int) -> int | None:
    """The most assignments that a rank may send to one rank; None: unbounded."""
    T, E = routing.scores.shape
    if capacity == "exact":
        return None
    most = T * (E // ranks)
    return most if isinstance(capacity, str) else min(most, math.ceil(capacity * T / ranks))


def bounded_pairs(routing: Routing, ranks: int, capacity: Capacity) -> Routing:
    """The routing with at most ceil(capacity * T / R) assignments to each rank; drops as `dropping_margins` says.

    `dropped` counts them; a token's mean is over the assignments that it keeps.
    """
    bound = pair_capacity(capacity, routing, ranks)
    assert bound is not None
    E = routing.num_experts
    margin_TE = dropping_margins(routing.bits, routing.scores, routing.thresholds, routing.unrouted, routing.shift)
    dropped = torch.zeros((), dtype=torch.int64, device=margin_TE.device)
    kept = []
    for assigned, margin in zip(routing.assigned.chunk(ranks, dim=1), margin_TE.chunk(ranks, dim=1), strict=True):
        bits_TW, lost = bound_assignments(pack_bits(assigned.contiguous()), margin.contiguous(), bound)
        kept.append(unpack_bits(bits_TW, E // ranks))
        dropped = dropped + lost
    bits_TW = pack_bits(torch.cat(kept, dim=1))
    index = ragged_index(bits_TW, E, ranks * bound)
    offsets, token_offsets, token_of_row, row_of_assignment = index
    if routing.dropped is not None:
        dropped = dropped + routing.dropped
    return replace(
        routing,
        bits=bits_TW,
        expert_offsets=offsets,
        token_offsets=token_offsets,
        token_of_row=token_of_row,
        row_of_assignment=row_of_assignment,
        dropped=dropped,
    )


class LateCount:
    """Copies a count to the host asynchronously and reads the copy at a later call."""

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[type[LateCount], tuple[()]]:
        """A copy starts anew: an event of a GPU can be neither copied nor pickled."""
        return LateCount, ()

    def above_zero(self, count: Tensor) -> bool:
        """Whether `count` was above 0 at an earlier call; as `value`."""
        return (self.value(count) or 0) > 0

    def value(self, count: Tensor) -> int | None:
        """What `count`, [] on a GPU, was at an earlier call; None before it arrives, or in a graph capture. No wait."""
        with torch.cuda.device(count.device):
            if torch.cuda.is_current_stream_capturing() or (self._copied is not None and not self._copied.query()):
                return None
            value = None if self._copied is None or self._host is None else int(self._host)
            if self._host is None:
                self._host = torch.zeros((), dtype=count.dtype, pin_memory=True)
            self._host.copy_(count, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return value
