"""`RankExchange`: dispatch and combine between the ranks of a process group that hold the experts.

A token is sent once to every rank that holds one of its experts: its row and a bitmask of its experts there. That
rank returns one partial sum a row, and the sender adds the partial sums in rank order. In the backward, the gradients
of a row and of the gate values of its assignments come back together.

R ranks, L slots a rank, N rows sent, M rows received, A assignments. Every rank must run the same forwards and
backwards in the same order; a rank without tokens or active experts takes part with nothing to send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..capacity import bounded_pairs, pair_capacity
from ..experts import Experts, make_block, make_experts, slots_of, takes_context
from ..initialization import seed_of
from ..kernels import pack_bits, ragged_index
from ..parts import unwrapped
from ..routing import Routing
from .collectives import Pending, Wire, check_alike, copy_from_first, shared_seed, values_of_ranks
from .exchange import Call, as_tokens, within_factor
from .placement import Placement
from .slots import ShardedSlots, SlotAccess


class RankExchange:
    """Exchange with experts divided over the ranks of a process group; `wire` counts the traffic."""

    adaptive_degree, valid_rs = 1, [0, 1]

    def __init__(self, placement: Placement, start: int) -> None:
        self.placement, self.start = placement, start
        self.wire = Wire(placement.group)
        self.seed: int | None = None  # of the experts of rank 0, known to all ranks

    def __reduce__(self) -> Any:
        """Without the collectives, which belong to a process: a copy has its own, with its counts at zero."""
        return RankExchange, (self.placement, self.start)

    def use_adaptive_degree(self, degree: int) -> None:
        """Ignored: experts are not split."""

    def agree(self, gates: nn.ModuleList, own: dict[str, Any]) -> None:
        """Copy the gates of rank 0; ValueError if ranks build different layers."""
        check_alike("moe_layer over the ranks of group", own, self.placement.group)
        copy_from_first(gates, self.placement.group)

    def make_experts(self, config: Mapping[str, Any], model_dim: int, generator: torch.Generator | None) -> Any:
        """This rank's block of slots, of those that one process would draw; with unlike seeds, as in Tutel, its own."""
        place = self.placement
        seeds = values_of_ranks(seed_of(generator), place.group)
        if generator is None or None in seeds:
            if any(seed is not None for seed in seeds):
                raise ValueError(f"seeds of the experts are {seeds} on the ranks of group: give all ranks one, or none")
            generator = torch.Generator().manual_seed(shared_seed(place.group))
            seeds = [generator.initial_seed()]
        self.seed = seeds[0]
        if len(set(seeds)) > 1 and (config.get("type") != "custom" or takes_context(config.get("module"))):
            return make_experts(config, model_dim, place.local, generator=generator)
        return make_block(config, model_dim, place.slots, place.first, place.local, generator)

    def bounded(self, routing: Routing, call: Call) -> Routing:
        """Bound the assignments from one rank to another by the layer's capacity, or drop by Tutel's factor."""
        if call.capacity_factor:
            return within_factor(routing, call, self.placement.group)
        if isinstance(call.capacity, str):
            return routing
        return bounded_pairs(routing, self.placement.ranks, call.capacity)

    def __call__(self, experts: Any, x_TD: Tensor, routing: Routing, call: Call) -> Tensor:
        """Dispatch, experts, combine; collective over the ranks.

        Tokens go in `call.degree` chunks: later chunks are sent while one is computed. A bounded capacity has one
        chunk.
        """
        x_TD, exact = x_TD.to(unwrapped(experts, Experts).compute_dtype(x_TD)), call.capacity == "exact"
        self.wire.set_mode(experts.training)
        if not exact:
            self.wire.check_tokens(x_TD.shape[0], x_TD.device)
        bounds = _bounds(x_TD.shape[0], call.degree if exact else 1)
        gate_A, count_NR = _gates_by_rank(routing, call.combine_gradient, self.placement.ranks, bounds)
        bound = pair_capacity(call.capacity, routing, self.placement.ranks)
        flight = _InFlight(_chunks(self.placement.local, self.wire, routing, bounds, count_NR, bound))
        anchor = torch.zeros((), device=x_TD.device, requires_grad=torch.is_grad_enabled())
        tensors: list[Tensor] = []
        gates = gate_A.split([sum(chunk.gates.sent) for chunk in flight.chunks])
        for chunk, gate, (first, last) in zip(flight.chunks, gates, bounds, strict=True):
            tensors += [chunk.by_rank.dispatch(x_TD[first:last]), gate]
        arrived = _Dispatch.apply(anchor, flight, *tensors)
        sums = []
        for i, chunk in enumerate(flight.chunks):
            for pending in flight.dispatched[i]:
                pending.wait()
            rows, gates_j = arrived[2 * i], chunk.gates.unblocked(arrived[2 * i + 1])
            sums.append(_partial_sums(experts, chunk.here, rows, gates_j, call.token_shape))
            flight.returning.append(chunk.rows.send_back(sums[-1].detach()))
        returned = _Combine.apply(anchor, flight, *sums)
        dtype = torch.promote_types(returned[0].dtype, torch.float32)  # rounded once
        parts = [chunk.by_rank.sum(rows.to(dtype)) for chunk, rows in zip(flight.chunks, returned, strict=True)]
        y_TO = torch.cat(parts)
        if routing.weights is None:
            y_TO = y_TO / routing.k_per_token.clamp(min=1).unsqueeze(1)
        return as_tokens(y_TO.to(returned[0].dtype), x_TD.shape[1], call.token_shape)

    def slots(self, experts: Any) -> SlotAccess:
        """Access to the slots through messages between the ranks."""
        return ShardedSlots(slots_of(experts), self.placement)

    def reset_experts(self, experts: Any) -> None:
        """By their own method, which keeps to this rank's slots."""
        unwrapped(experts, Experts).reset_parameters()


class _Blocks:
    """Converts items by rank between packed (`count_R` each) and blocks of `size`, zero-padded."""

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
class _Splits:
    """How many items to send to and receive from each rank; `own` and `theirs` lay out equal blocks on both sides."""

    wire: Wire
    sent: list[int]
    received: list[int]
    own: _Blocks | None = None
    theirs: _Blocks | None = None

    def send(self, x: Tensor, backward: bool = False) -> Pending:
        """Send items to the ranks of their experts."""
        x = x if self.own is None else self.own.spread(x)
        return self.wire.start(x, self.sent, self.received, backward=backward)

    def unblocked(self, x: Tensor) -> Tensor:
        """Received items, packed."""
        return x if self.theirs is None else self.theirs.pack(x)

    def send_back(self, x: Tensor, backward: bool = False) -> Pending:
        """Send results for received items to their senders."""
        return self.wire.start(x, self.received, self.sent, backward=backward)

    def received_back(self, x: Tensor) -> Tensor:
        """Results received through `send_back`, packed."""
        return x if self.own is None else self.own.pack(x)


@dataclass
class _Chunk:
    """Tokens that are sent together."""

    by_rank: Routing  # from tokens to ranks, as if ranks were experts
    here: Routing  # from received rows to this rank's slots
    rows: _Splits
    gates: _Splits


@dataclass
class _InFlight:
    """What both autograd functions share: the chunks of one forward and its running collectives."""

    chunks: list[_Chunk]
    dispatched: list[list[Pending]] = field(default_factory=list)
    returning: list[Pending] = field(default_factory=list)


class _Dispatch(torch.autograd.Function):
    """Dispatch rows and gate values of all chunks; one node, so that all ranks run the backward in the same order.

    The results are valid after waiting for `flight.dispatched`. Gate values of top-any gates are ones: only their
    gradients are sent. `anchor` requires a gradient, so that the backward runs even if nothing else does.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Any, flight: _InFlight, *tensors: Tensor) -> Any:
        ctx.chunks, results = flight.chunks, []
        for i, chunk in enumerate(flight.chunks):
            rows, gates = tensors[2 * i : 2 * i + 2]
            pending = [chunk.rows.send(rows)]
            results.append(pending[0].out)
            if chunk.here.weights is None:
                results.append(gates.new_ones(sum(chunk.gates.received)))
            else:
                pending.append(chunk.gates.send(gates))
                results.append(pending[1].out)
            flight.dispatched.append(pending)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        splits = [each for chunk in ctx.chunks for each in (chunk.rows, chunk.gates)]
        pending = [each.send_back(grad, True) for each, grad in zip(splits, grads, strict=True)]
        found = [each.received_back(p.wait()) for each, p in zip(splits, pending, strict=True)]
        return None, None, *found


class _Combine(torch.autograd.Function):
    """Return partial sums of all chunks to their senders; `flight.returning` holds the collectives, already started."""

    @staticmethod
    def forward(ctx: Any, anchor: Any, flight: _InFlight, *sums: Tensor) -> Any:
        ctx.chunks = flight.chunks
        pairs = zip(flight.chunks, flight.returning, strict=True)
        return tuple(chunk.rows.received_back(p.wait()) for chunk, p in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        pending = [chunk.rows.send(grad, True) for chunk, grad in zip(ctx.chunks, grads, strict=True)]
        return None, None, *[p.wait() for p in pending]


def _partial_sums(experts: Any, here: Routing, rows_MD: Tensor, gate_J: Tensor, token_shape: tuple[int, ...]) -> Tensor:
    """Sum each received row's experts on this rank, [M, output_dim]; `gate_J` is ordered by row, then expert."""
    order_J = here.row_of_assignment.long()
    order_J = order_J.masked_fill(order_J < 0, gate_J.shape[0])  # -1 (unused capacity) -> spare slot at the end
    gate_B = gate_J.new_zeros(gate_J.shape[0] + 1).index_copy(0, order_J, gate_J)
    return here.sum(experts(rows_MD, here, gate_B[:-1], token_shape))


def _bounds(T: int, chunks: int) -> list[tuple[int, int]]:
    """(first, end) of each chunk's tokens; every rank has the same number of chunks, some possibly empty."""
    edges = [T * i // chunks for i in range(chunks + 1)]
    return list(pairwise(edges))


def _gates_by_rank(
    routing: Routing, combine_gradient: str, ranks: int, bounds: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Gate values by (chunk, rank, token, expert), the receivers' order; counts [chunks, R]."""
    gate_A = routing.row_gates(combine_gradient)
    T, E = routing.scores.shape
    row_A = torch.arange(gate_A.shape[0], device=gate_A.device)
    expert_A = torch.searchsorted(routing.expert_offsets[1:].long(), row_A, right=True)
    token_A = routing.token_of_row.long().clamp(min=0)
    last_N = torch.tensor([last for _, last in bounds], device=gate_A.device)
    chunk_A = torch.searchsorted(last_N, token_A, right=True)
    pair_A = chunk_A * ranks + expert_A // (E // ranks)
    end = len(bounds) * ranks
    pair_A = pair_A.masked_fill(expert_A >= E, end)  # rows without an assignment
    order_A = ((pair_A * max(T, 1) + token_A) * (E + 1) + expert_A).argsort()
    count = torch.zeros(end + 1, dtype=torch.int64, device=gate_A.device)
    count = count.index_add_(0, pair_A, torch.ones_like(pair_A))
    return gate_A.index_select(0, order_A), count[:end].view(len(bounds), ranks)


def _chunks(
    local: int, wire: Wire, routing: Routing, bounds: list[tuple[int, int]], count_NR: Tensor, bound: int | None
) -> list[_Chunk]:
    """Plan who sends what to whom: exchange the counts, unless `bound` fixes them, then the bitmasks."""
    R = wire.size
    block_TRL = routing.assigned.view(-1, R, local)
    rank_bits_TW = pack_bits(block_TRL.any(dim=2))
    fixed_rows = None if bound is None else min(bound, routing.num_tokens)
    room = None if fixed_rows is None else R * fixed_rows
    by_ranks = [_indexed(rank_bits_TW[first:last], R, routing, room) for first, last in bounds]
    if bound is None:
        rows_NR = torch.stack([by_rank.counts for by_rank in by_ranks])
        own = (
            torch.stack([4 * rows_NR + wire.mode, count_NR.int()], dim=2).transpose(0, 1).contiguous()
        )  # [R, chunks, 2] int32
        theirs = wire.start(own, [1] * R, [1] * R).wait()
        sent, received = torch.stack([own, theirs]).permute(0, 2, 3, 1).tolist()  # [chunks][2][R]
        wire.check_modes([rows % 4 for rows in received[0][0]])
        for counts in (*sent, *received):
            counts[0] = [rows // 4 for rows in counts[0]]
    else:
        sent = received = [[[fixed_rows] * R, [bound] * R]]
    pending = []
    for i, (by_rank, (first, last)) in enumerate(zip(by_ranks, bounds, strict=True)):
        blocks = None if fixed_rows is None else _Blocks(by_rank.counts.long(), fixed_rows)
        rows = _Splits(wire, sent[i][0], received[i][0], blocks)
        wire.traffic.rows += sum(sent[i][0]) - sent[i][0][wire.rank]
        n_N = torch.arange(by_rank.token_of_row.shape[0], device=rank_bits_TW.device)
        rank_N = torch.searchsorted(by_rank.expert_offsets[1:].long(), n_N, right=True).clamp(max=R - 1)
        token_N = by_rank.token_of_row.long().clamp(min=0)
        bits_NW = pack_bits(block_TRL[first:last][token_N, rank_N])
        pending.append((rows, rows.send(bits_NW)))
    found = []
    for i, (by_rank, (rows, bits)) in enumerate(zip(by_ranks, pending, strict=True)):
        here = _indexed(bits.wait(), local, routing, None if bound is None else R * bound, weighted=True)
        own_gates = their_gates = None
        if bound is not None:
            assert fixed_rows is not None
            from_R = here.token_offsets[::fixed_rows].diff().long() if fixed_rows else count_NR[0] * 0
            own_gates, their_gates = _Blocks(count_NR[i], bound), _Blocks(from_R, bound)
        found.append(_Chunk(by_rank, here, rows, _Splits(wire, sent[i][1], received[i][1], own_gates, their_gates)))
    return found


def _indexed(bits_NW: Tensor, experts: int, routing: Routing, capacity: int | None, weighted: bool = False) -> Routing:
    """Routing from bitmasks alone; `weighted` if the combine weights of `routing` come as gate values of rows."""
    offsets, token_offsets, token_of_row, row_of_assignment = ragged_index(
        bits_NW, experts, -1 if capacity is None else capacity
    )
    scores = routing.scores.new_zeros(len(bits_NW), experts)
    unrouted = torch.zeros(len(bits_NW), dtype=torch.bool, device=bits_NW.device)
    weights = scores if weighted and routing.weights is not None else None
    return Routing(bits_NW, scores, offsets, token_offsets, token_of_row, row_of_assignment, unrouted, weights=weights)
