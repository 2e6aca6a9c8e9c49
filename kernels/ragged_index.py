"""Builds the index of the ragged assignment, in both directions, from a bitmask of each token's experts.

Inputs:  bits_TW int64; bit e % 64 of word e // 64 is set if the token activates expert e
Outputs, all int32: expert_offsets [E+1], token_offsets [T+1], token_of_row [A] (expert-major, token order inside an
expert), row_of_assignment [A] (token-major, expert order inside a token, -> row)

Prefix sums and compaction give the order of a stable sort by expert. With `capacity` >= 0 the two row arrays have that
static length; entries past A are -1 and must not be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operation import expect, expect_matrix, operation

MODULES = {"triton": "gpu.ragged_index"}
WORD = 64
MOST_ROWS = 2**31 - 1  # the limit of an int32 index
# multiplying eight 0/1 bytes by this puts their low bits, in order, into the top byte
_GATHER_LOW_BITS = 0x0102040810204080
_SUM_BYTES = 0x0101010101010101  # and this sums them there


def words(num_experts: int) -> int:
    """Number of int64 words that hold one bit per expert."""
    return max(1, -(-num_experts // WORD))


def block_tokens(num_experts: int) -> int:
    """Tokens per block of `threshold_gate` and of the index; a tile of block by experts fits in registers."""
    return max(16, min(64, 8192 >> max(num_experts - 1, 0).bit_length()))


def count_blocks(assigned_TE: Tensor) -> Tensor:
    """Assignments of each expert in each block of tokens, [ceil(T / block_tokens(E)) * E] int32, block-major.

    Flat, because torch.compile would make different graphs for one block and for several.
    """
    T, E = assigned_TE.shape
    size = block_tokens(E)
    blocks, rest = divmod(T, size)
    counts = assigned_TE.new_empty((blocks + (rest > 0), E), dtype=torch.int32)
    torch.sum(assigned_TE[: blocks * size].view(blocks, size, E), 1, dtype=torch.int32, out=counts[:blocks])
    if rest:
        torch.sum(assigned_TE[blocks * size :], 0, dtype=torch.int32, out=counts[blocks])
    return counts.view(-1)


def pack_bits(assigned_TE: Tensor) -> Tensor:
    """[T, E] bool to [T, ceil(E / 64)] int64, expert e in bit e % 64 of word e // 64."""
    if assigned_TE.dim() != 2 or assigned_TE.dtype != torch.bool:
        raise ValueError(f"assigned_TE must be bool [T, E], got {assigned_TE.dtype} {list(assigned_TE.shape)}")
    T, E = assigned_TE.shape
    octets = _by_eight(assigned_TE) * _GATHER_LOW_BITS >> 56
    if E % WORD == 0:
        return octets.to(torch.uint8).view(torch.int64)
    bytes_TB = octets.new_zeros((T, words(E) * 8), dtype=torch.uint8)
    bytes_TB[:, : octets.shape[1]] = octets
    return bytes_TB.view(torch.int64)


def count_of_token(assigned_TE: Tensor) -> Tensor:
    """Assignments of each token, [T] integer."""
    if assigned_TE.shape[1] > 127:  # the sum must fit into the top byte, a signed one
        return assigned_TE.sum(dim=1)
    octets = _by_eight(assigned_TE)
    return (octets.squeeze(1) if octets.shape[1] == 1 else octets.sum(dim=1)) * _SUM_BYTES >> 56


def without_expert(assigned_TE: Tensor) -> Tensor:
    """Whether a token has no assignment, [T] bool."""
    octets = _by_eight(assigned_TE)
    return (octets.squeeze(1) if octets.shape[1] == 1 else octets.amax(dim=1)) == 0


def put_rows(assigned_TE: Tensor, token_N: Tensor, rows_NE: Tensor) -> None:
    """Replace the rows `token_N` of bools, in place; where it can, eight at a time."""
    if assigned_TE.shape[1] % 8 == 0 and assigned_TE.is_contiguous() and assigned_TE.storage_offset() % 8 == 0:
        assigned_TE, rows_NE = assigned_TE.view(torch.int64), rows_NE.view(torch.int64)
    assigned_TE.index_copy_(0, token_N, rows_NE)


def _by_eight(assigned_TE: Tensor) -> Tensor:
    """[T, ceil(E / 8)] int64, eight experts in its bytes, 0 or 1."""
    T, E = assigned_TE.shape
    if E % 8 == 0 and assigned_TE.is_contiguous() and assigned_TE.storage_offset() % 8 == 0:
        return assigned_TE.view(torch.int64)
    padded = assigned_TE.new_zeros((T, -(-E // 8) * 8))
    padded[:, :E] = assigned_TE
    return padded.view(torch.int64)


def unpack_bits(bits_TW: Tensor, num_experts: int) -> Tensor:
    """[T, W] int64 to [T, E] bool, the inverse of `pack_bits`."""
    _check_bits(bits_TW, num_experts)
    T, W = bits_TW.shape
    shift = torch.arange(8, dtype=torch.uint8, device=bits_TW.device)
    octets = bits_TW.contiguous().view(torch.uint8).view(T, W * 8, 1)
    return ((octets >> shift) & 1).view(T, W * WORD)[:, :num_experts].to(torch.bool).contiguous()


def _offsets(counts: Tensor) -> Tensor:
    offsets = torch.zeros(counts.shape[0] + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
    return offsets


def _check_bits(bits_TW: Tensor, num_experts: int) -> int:
    T = bits_TW.shape[0] if bits_TW.dim() else 0
    meaning = f"[T, words of {num_experts} experts]"
    expect("bits_TW", bits_TW, (T, words(num_experts)), meaning, torch.int64)
    return T


def _check_index(bits_TW: Tensor, num_experts: int, capacity: int = -1, block_counts: Tensor | None = None) -> None:
    if num_experts < 1:
        raise ValueError(f"num_experts = {num_experts}: give at least 1")
    T = _check_bits(bits_TW, num_experts)
    if not -1 <= capacity <= MOST_ROWS:
        raise ValueError(
            f"capacity = {capacity}: give a number of rows from 0 to {MOST_ROWS}, or -1 for as many as are"
        )
    counts = -(-T // block_tokens(num_experts)) * num_experts
    expect("block_counts", block_counts, (counts,), "[blocks of tokens * E]", torch.int32)


def _check_bound(bits_TW: Tensor, margin_TE: Tensor, capacity: int) -> None:
    expect_matrix("margin_TE", margin_TE, "[T, E]")
    T = _check_bits(bits_TW, margin_TE.shape[1])
    expect("margin_TE", margin_TE, (T, margin_TE.shape[1]), "[T, E]")
    if capacity < 0:
        raise ValueError(f"capacity = {capacity}: give a number of assignments, 0 or more")


def _index_shapes(
    bits_TW: Tensor, num_experts: int, capacity: int = -1, block_counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size() if capacity < 0 else capacity
    shapes = ((num_experts + 1,), (bits_TW.shape[0] + 1,), (rows,), (rows,))
    expert_offsets, token_offsets, token_of_row, row_of_assignment = (
        bits_TW.new_empty(shape, dtype=torch.int32) for shape in shapes
    )
    return expert_offsets, token_offsets, token_of_row, row_of_assignment


@operation(check=_check_index, fake=_index_shapes, engines=MODULES)
def ragged_index(
    bits_TW: Tensor, num_experts: int, capacity: int = -1, block_counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both CSR directions of the assignment; see the head of this file.

    `block_counts` comes from `threshold_gate` for the same bits; without it a GPU counts for itself.
    """
    T = bits_TW.shape[0]
    assigned_TE = unpack_bits(bits_TW, num_experts)
    assigned_ET = assigned_TE.t().contiguous()
    expert_offsets = _offsets(assigned_ET.sum(dim=1, dtype=torch.int32))
    token_offsets = _offsets(assigned_TE.sum(dim=1, dtype=torch.int32))
    expert_A, token_A = assigned_ET.nonzero().unbind(1)
    A = token_A.shape[0]
    if capacity >= 0 and capacity < A:
        raise ValueError(f"capacity = {capacity} rows is less than the {A} assignments: bound them first")

    row_of_pair = torch.empty(T * num_experts, dtype=torch.int32, device=bits_TW.device)
    row_of_pair[token_A * num_experts + expert_A] = torch.arange(A, dtype=torch.int32, device=bits_TW.device)
    row_A = row_of_pair[assigned_TE.view(-1).nonzero().squeeze(1)]
    token_A = token_A.to(torch.int32)
    if capacity < 0:
        return expert_offsets, token_offsets, token_A, row_A
    token_of_row = token_A.new_full((capacity,), -1)
    row_of_assignment = token_A.new_full((capacity,), -1)
    token_of_row[:A], row_of_assignment[:A] = token_A, row_A
    return expert_offsets, token_offsets, token_of_row, row_of_assignment


def _bound_shapes(bits_TW: Tensor, margin_TE: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(bits_TW), bits_TW.new_empty((), dtype=torch.int64)


@operation(check=_check_bound, fake=_bound_shapes, engines=MODULES)
def bound_assignments(bits_TW: Tensor, margin_TE: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Keep at most `capacity` assignments: drop those of the smallest margins, later ones first among equals.

    Returns the bits [T, W] that stay and the number dropped, [] int64. Deterministic.
    """
    assigned_TE = unpack_bits(bits_TW, margin_TE.shape[1])
    pair_A = assigned_TE.view(-1).nonzero().squeeze(1)
    excess = pair_A.shape[0] - capacity
    dropped = torch.tensor(max(excess, 0), dtype=torch.int64, device=bits_TW.device)
    if excess <= 0:
        return bits_TW.clone(), dropped
    margin_A = margin_TE.reshape(-1)[pair_A]
    # torch's deterministic mode refuses kthvalue on a GPU
    limit = margin_A.topk(excess, largest=False, sorted=False).values.max()
    nan_A = margin_A.isnan()  # as in topk, NaN ranks above +inf and equals NaN
    below = torch.where(limit.isnan(), ~nan_A, margin_A < limit)
    equal = torch.where(limit.isnan(), nan_A, margin_A == limit).nonzero().squeeze(1)
    assigned_TE.view(-1)[pair_A[below]] = False
    assigned_TE.view(-1)[pair_A[equal[equal.shape[0] - (excess - int(below.sum())) :]]] = False
    return pack_bits(assigned_TE), dropped
