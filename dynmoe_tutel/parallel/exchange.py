"""Experts divided over the ranks of a process group: who gets which token, and what travels.

A token travels once to every rank that holds one of its experts, as its row and a bitmask of its experts there; the
rank returns one partial sum a row, and the sender adds the partial sums in the order of the ranks. Backward, the
gradient of a row comes back with that of the gate values of its assignments.

R ranks, L slots a rank, N rows sent, M rows received, A assignments. Every rank must run the same forwards and
backwards in the same order; a rank with no token, or without an active expert, takes part with nothing to send.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..capacity import pair_capacity
from ..kernels import pack_bits, ragged_index
from ..routing import Capacity, Routing
from .collectives import Pending, Wire


class _Blocks:
    """A packed list of items by rank, `counts` of each, and the same in equal blocks of `size`, zeros behind."""

    def __init__(self, count_R: Tensor, size: int) -> None:
        R = count_R.shape[0]
        start_R = count_R.cumsum(0) - count_R
        place_C = torch.arange(size, device=count_R.device)
        self._held = (place_C < count_R.unsqueeze(1)).flatten()
        self._source = (start_R.unsqueeze(1) + place_C).flatten().masked_fill(~self._held, 0)
        item_N = torch.arange(R * size, device=count_R.device)
        rank_N = torch.searchsorted(start_R + count_R, item_N, right=True)
        self._packed = rank_N < R
        rank_N = rank_N.clamp(max=R - 1)
        self._target = (rank_N * size + item_N - start_R[rank_N]).masked_fill(~self._packed, 0)

    def spread(self, x: Tensor) -> Tensor:
        """Packed [R * size, ...] to blocks."""
        return _taken(x, self._source, self._held)

    def pack(self, x: Tensor) -> Tensor:
        """Blocks [R * size, ...] to packed."""
        return _taken(x, self._target, self._packed)


def _taken(x: Tensor, index_N: Tensor, held_N: Tensor) -> Tensor:
    if not len(x):
        return x
    return x.index_select(0, index_N).masked_fill(~held_N.view(-1, *[1] * (x.dim() - 1)), 0)


@dataclass
class _Link:
    """How many items go to each rank and come from it; `own` and `theirs` lay equal blocks out on the two sides."""

    wire: Wire
    sent: list[int]
    received: list[int]
    own: _Blocks | None = None
    theirs: _Blocks | None = None

    def there(self, x: Tensor, backward: bool = False) -> Pending:
        x = x if self.own is None else self.own.spread(x)
        return self.wire.start(x, self.sent, self.received, backward=backward)

    def arrived(self, x: Tensor) -> Tensor:
        return x if self.theirs is None else self.theirs.pack(x)

    def back(self, x: Tensor, backward: bool = False) -> Pending:
        return self.wire.start(x, self.received, self.sent, backward=backward)

    def returned(self, x: Tensor) -> Tensor:
        return x if self.own is None else self.own.pack(x)


@dataclass
class _Chunk:
    """Tokens that travel together."""

    by_rank: Routing  # ranks in the place of experts
    here: Routing  # what came, to the slots of this rank
    rows: _Link
    gates: _Link


class _There(torch.autograd.Function):
    """Rows and gate values of all chunks set off to the experts; one node, so that all ranks come back in one order.

    The values of the results are there once `started` was waited for. Gate values of top-any gates are ones, and only
    their gradients travel. `anchor` wants a gradient, so that the backward runs where nothing else does.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Any, chunks: list[_Chunk], started: list[list[Pending]], *tensors: Tensor) -> Any:
        ctx.chunks, results = chunks, []
        for i, chunk in enumerate(chunks):
            rows, gates = tensors[2 * i : 2 * i + 2]
            pending = [chunk.rows.there(rows)]
            results.append(pending[0].out)
            if chunk.here.weights is None:
                results.append(gates.new_ones(sum(chunk.gates.received)))
            else:
                pending.append(chunk.gates.there(gates))
                results.append(pending[1].out)
            started.append(pending)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        links = [link for chunk in ctx.chunks for link in (chunk.rows, chunk.gates)]
        pending = [link.back(grad, True) for link, grad in zip(links, grads, strict=True)]
        found = [link.returned(p.wait()) for link, p in zip(links, pending, strict=True)]
        return None, None, None, *found


class _Back(torch.autograd.Function):
    """Partial sums of all chunks at their senders; `started` are their collectives, which set off before."""

    @staticmethod
    def forward(ctx: Any, anchor: Any, chunks: list[_Chunk], started: list[Pending], *sums: Tensor) -> Any:
        ctx.chunks = chunks
        return tuple(chunk.rows.returned(p.wait()) for chunk, p in zip(chunks, started, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        pending = [chunk.rows.there(grad, True) for chunk, grad in zip(ctx.chunks, grads, strict=True)]
        return None, None, None, *[p.wait() for p in pending]


def through_ranks(
    experts: Any, wire: Wire, x_TD: Tensor, routing: Routing, combine_gradient: str, capacity: Capacity, degree: int = 1
) -> Tensor:
    """The mean (or weighted sum) of each token's experts, wherever they are: [T, output_dim] in the experts' dtype.

    `experts` hold this rank's slots. In `degree` chunks of tokens, the rows of later chunks travel while those of one
    are computed; a bounded capacity has one chunk. Collective over the ranks of `wire`.
    """
    x_TD = x_TD.to(experts.compute_dtype(x_TD))
    if capacity != "exact":
        wire.check_tokens(x_TD.shape[0], x_TD.device)
    bounds = _bounds(x_TD.shape[0], degree if capacity == "exact" else 1)
    gate_A, count_NR = _gates_by_rank(routing, routing.row_gates(combine_gradient), wire.size, bounds)
    chunks = _chunks(experts.slots, wire, routing, bounds, count_NR, pair_capacity(capacity, routing, wire.size))
    anchor = torch.zeros((), device=x_TD.device, requires_grad=torch.is_grad_enabled())
    tensors: list[Tensor] = []
    gates = gate_A.split([sum(chunk.gates.sent) for chunk in chunks])
    for chunk, gate, (first, last) in zip(chunks, gates, bounds, strict=True):
        tensors += [chunk.by_rank.dispatch(x_TD[first:last]), gate]
    setting_off: list[list[Pending]] = []
    arrived = _There.apply(anchor, chunks, setting_off, *tensors)
    sums, returning = [], []
    for i, chunk in enumerate(chunks):
        for pending in setting_off[i]:
            pending.wait()
        rows, gates_j = arrived[2 * i], chunk.gates.arrived(arrived[2 * i + 1])
        sums.append(_partial_sums(experts, chunk.here, rows, gates_j))
        returning.append(chunk.rows.back(sums[-1].detach()))
    returned = _Back.apply(anchor, chunks, returning, *sums)
    dtype = torch.promote_types(returned[0].dtype, torch.float32)  # rounded once
    y_TO = torch.cat([chunk.by_rank.sum(rows.to(dtype)) for chunk, rows in zip(chunks, returned, strict=True)])
    if routing.weights is None:
        y_TO = y_TO / routing.k_per_token.clamp(min=1).unsqueeze(1)
    return y_TO.to(returned[0].dtype)


def _partial_sums(experts: Any, here: Routing, rows_MD: Tensor, gate_J: Tensor) -> Tensor:
    """One sum a received row of its experts here, [M, output_dim]; gate values by row and expert."""
    order_J = here.row_of_assignment.long()
    order_J = order_J.masked_fill(order_J < 0, gate_J.shape[0])  # what lies behind the assignments: the last place
    gate_B = gate_J.new_zeros(gate_J.shape[0] + 1).index_copy(0, order_J, gate_J)
    return here.sum(experts(rows_MD, here, gate_B[:-1]))


def _bounds(T: int, chunks: int) -> list[tuple[int, int]]:
    """First and last token of each chunk; every rank has as many, empty ones among them."""
    edges = [T * i // chunks for i in range(chunks + 1)]
    return list(pairwise(edges))


def _gates_by_rank(
    routing: Routing, gate_A: Tensor, ranks: int, bounds: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Gate values by (chunk, rank, token, expert), the order in which their receivers have them; counts [chunks, R]."""
    T, E = routing.scores.shape
    row_A = torch.arange(gate_A.shape[0], device=gate_A.device)
    expert_A = torch.searchsorted(routing.expert_offsets[1:].long(), row_A, right=True)
    token_A = routing.token_of_row.long().clamp(min=0)
    last_N = torch.tensor([last for _, last in bounds], device=gate_A.device)
    chunk_A = torch.searchsorted(last_N, token_A, right=True)
    pair_A = chunk_A * ranks + expert_A // (E // ranks)
    end = len(bounds) * ranks
    pair_A = pair_A.masked_fill(expert_A >= E, end)  # behind the assignments
    order_A = ((pair_A * max(T, 1) + token_A) * (E + 1) + expert_A).argsort()
    count = torch.zeros(end + 1, dtype=torch.int64, device=gate_A.device)
    count = count.index_add_(0, pair_A, torch.ones_like(pair_A))
    return gate_A.index_select(0, order_A), count[:end].view(len(bounds), ranks)


def _chunks(
    local: int, wire: Wire, routing: Routing, bounds: list[tuple[int, int]], count_NR: Tensor, bound: int | None
) -> list[_Chunk]:
    """Who sends what to whom: the bitmasks travel here, and, unless `bound` fixes them, the counts before them."""
    R = wire.size
    block_TRL = routing.assigned.view(-1, R, local)
    rank_bits_TW = pack_bits(block_TRL.any(dim=2))
    fixed_rows = None if bound is None else min(bound, routing.num_tokens)
    room = None if fixed_rows is None else R * fixed_rows
    by_ranks = [_indexed(rank_bits_TW[first:last], R, routing, room) for first, last in bounds]
    if bound is None:
        rows_NR = torch.stack([by_rank.counts for by_rank in by_ranks])
        own = torch.stack([rows_NR, count_NR.int()], dim=2).transpose(0, 1).contiguous()  # [R, chunks, 2] int32
        theirs = wire.start(own, [1] * R, [1] * R).wait()
        sent, received = torch.stack([own, theirs]).permute(0, 2, 3, 1).tolist()  # [chunks][2][R]
    else:
        sent = received = [[[fixed_rows] * R, [bound] * R]]
    pending = []
    for i, (by_rank, (first, last)) in enumerate(zip(by_ranks, bounds, strict=True)):
        blocks = None if fixed_rows is None else _Blocks(by_rank.counts.long(), fixed_rows)
        rows = _Link(wire, sent[i][0], received[i][0], blocks)
        wire.traffic.rows += sum(sent[i][0]) - sent[i][0][wire.rank]
        n_N = torch.arange(by_rank.token_of_row.shape[0], device=rank_bits_TW.device)
        rank_N = torch.searchsorted(by_rank.expert_offsets[1:].long(), n_N, right=True).clamp(max=R - 1)
        token_N = by_rank.token_of_row.long().clamp(min=0)
        bits_NW = pack_bits(block_TRL[first:last][token_N, rank_N])
        pending.append((rows, rows.there(bits_NW)))
    found = []
    for i, (by_rank, (rows, bits)) in enumerate(zip(by_ranks, pending, strict=True)):
        here = _indexed(bits.wait(), local, routing, None if bound is None else R * bound, weighted=True)
        own_gates = their_gates = None
        if bound is not None:
            assert fixed_rows is not None
            from_R = here.token_offsets[::fixed_rows].diff().long() if fixed_rows else count_NR[0] * 0
            own_gates, their_gates = _Blocks(count_NR[i], bound), _Blocks(from_R, bound)
        found.append(_Chunk(by_rank, here, rows, _Link(wire, sent[i][1], received[i][1], own_gates, their_gates)))
    return found


def _indexed(bits_NW: Tensor, experts: int, routing: Routing, capacity: int | None, weighted: bool = False) -> Routing:
    """Tokens by bitmask alone; `weighted`, where the combine weights of `routing` come as gate values of rows."""
    offsets, token_offsets, token_of_row, row_of_assignment = ragged_index(
        bits_NW, experts, -1 if capacity is None else capacity
    )
    scores = routing.scores.new_zeros(len(bits_NW), experts)
    unrouted = torch.zeros(len(bits_NW), dtype=torch.bool, device=bits_NW.device)
    weights = scores if weighted and routing.weights is not None else None
    return Routing(bits_NW, scores, offsets, token_offsets, token_of_row, row_of_assignment, unrouted, weights=weights)
