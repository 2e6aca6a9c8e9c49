"""Sums over the experts' rows that need no matrix product: gradients of biases and of gates.

Sums are fp32 and in a fixed order: within a tile, then over the tiles of an expert.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..operands import Index
from . import tiles
from .gemm_kernels import expert_rows, pointer, row_tiles
from .launch import kernel
from .sizes import block_experts, cdiv

BLOCK_ROWS = 64
BLOCK_COLUMNS = 128


@kernel
def tile_rows_sum_kernel(
    d_rows, token_of_row, token_offsets, gate, offsets, parts, E, N, stride_dr,
    FROM_TOKENS: tl.constexpr, GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """parts[tile_m] = sum of a tile's rows, each times its gate (GATE); `expert_sum_kernel` then sums the tiles.

    In: d_rows [R, N], or the tokens' [T, N], divided by k_t (FROM_TOKENS); gate [R]. Out: [tiles_m, N] fp32
    Grid: (persistent over tiles, blocks of N). Bytes: d_rows once.
    """
    tiles_E = row_tiles(offsets, E, BLOCK_M, BLOCK_E)
    ends_E = tl.cumsum(tiles_E, axis=0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    for tile_m in range(tl.program_id(0), tl.sum(tiles_E, axis=0), tl.num_programs(0)):
        _, start, stop = expert_rows(tile_m, tiles_E, ends_E, offsets, BLOCK_M)
        row = start + tl.arange(0, BLOCK_M)
        m_mask = row < stop
        source = row.to(tl.int64)
        if FROM_TOKENS:
            source = tl.load(token_of_row + row, mask=m_mask, other=0).to(tl.int64)
        at = source[:, None] * stride_dr + n[None, :]
        d_row = tl.load(d_rows + at, mask=m_mask[:, None] & n_mask[None, :], other=0.0).to(tl.float32)
        if FROM_TOKENS:
            k = tl.load(token_offsets + source + 1) - tl.load(token_offsets + source)
            d_row /= tl.maximum(k, 1).to(tl.float32)[:, None]
        if GATE:
            d_row *= tl.load(gate + row, mask=m_mask, other=0.0).to(tl.float32)[:, None]
        at = (tl.zeros((), tl.int64) + tile_m) * N + n
        tl.store(parts + at, tl.sum(d_row, axis=0), mask=n_mask)


@kernel
def expert_sum_kernel(parts, offsets, out, E, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """out[e] = sum of parts [tiles_m, N] over the expert's tiles, in order. Grid: (E, blocks of N)."""
    tiles_E = row_tiles(offsets, E, BLOCK_M, BLOCK_E)
    e = tl.program_id(0)
    first = tl.sum(tl.where(tl.arange(0, BLOCK_E) < e, tiles_E, 0), axis=0)
    last = first + tl.sum(tl.where(tl.arange(0, BLOCK_E) == e, tiles_E, 0), axis=0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    at = parts + first.to(tl.int64) * N + n
    for _ in range(first, last):
        acc += tl.load(at, mask=n < N, other=0.0)
        at += N
    tl.store(out + e.to(tl.int64) * N + n, acc.to(out.dtype.element_ty), mask=n < N)


@kernel
def row_gate_gradient_kernel(
    parts, d_rows, bias, offsets, out, E, K, TILES_N, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[row] = sum of the row's partial sums + <d_row, bias of its expert>.

    In: parts [R, TILES_N] fp32, d_rows [R, K], bias [E, K]. Out: [R]. Grid: persistent. Bytes: parts, d_rows once.
    """
    tiles_E = row_tiles(offsets, E, BLOCK_M, BLOCK_E)
    ends_E = tl.cumsum(tiles_E, axis=0)
    t = tl.arange(0, BLOCK_T)
    for tile_m in range(tl.program_id(0), tl.sum(tiles_E, axis=0), tl.num_programs(0)):
        e, start, stop = expert_rows(tile_m, tiles_E, ends_E, offsets, BLOCK_M)
        row = start + tl.arange(0, BLOCK_M)
        m_mask = row < stop
        row64 = row.to(tl.int64)
        acc = tl.zeros((BLOCK_M,), tl.float32)
        for t0 in range(0, TILES_N, BLOCK_T):
            at = row64[:, None] * TILES_N + t0 + t[None, :]
            acc += tl.sum(tl.load(parts + at, mask=m_mask[:, None] & (t0 + t < TILES_N)[None, :], other=0.0), axis=1)
        if BIAS:
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                b = tl.load(bias + e.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
                at = row64[:, None] * K + k[None, :]
                d_row = tl.load(d_rows + at, mask=m_mask[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
                acc += tl.sum(d_row * b[None, :], axis=1)
        tl.store(out + row, acc.to(out.dtype.element_ty), mask=m_mask)


def sum_tiles(parts_MN: Tensor, expert_offsets: Tensor, like_EN: Tensor, block_m: int) -> Tensor:
    """The gradient [E, N] of a bias, from the partial sums of tiles of `block_m` rows."""
    out_EN = torch.empty_like(like_EN, memory_format=torch.contiguous_format)
    E, N = out_EN.shape
    if parts_MN.shape[0] == 0:
        return out_EN.zero_()
    if E * N:
        expert_sum_kernel[(E, cdiv(N, BLOCK_COLUMNS))](
            parts_MN, expert_offsets, out_EN, E, N, BLOCK_M=block_m, BLOCK_N=BLOCK_COLUMNS, BLOCK_E=block_experts(E)
        )
    return out_EN


def bias_gradient(
    d_rows: Tensor, gate_A: Tensor | None, index: Index, like_EN: Tensor, *, from_tokens: bool = False
) -> Tensor:
    """Each expert's sum of rows times gates, [E, N]; with `from_tokens` the rows are tokens' gradients over k_t."""
    R, (E, N) = index.rows, like_EN.shape
    most = cdiv(R, BLOCK_ROWS) + E
    parts_MN = d_rows.new_empty((most if R else 0, N), dtype=torch.float32)
    if R and N:
        tile_rows_sum_kernel[(min(most, 4 * tiles.processors(d_rows.device)), cdiv(N, BLOCK_COLUMNS))](
            d_rows,
            index.token_of_row,
            index.token_offsets,
            pointer(gate_A, d_rows),
            index.expert_offsets,
            parts_MN,
            E,
            N,
            d_rows.stride(0),
            FROM_TOKENS=from_tokens,
            GATE=gate_A is not None,
            BLOCK_M=BLOCK_ROWS,
            BLOCK_N=BLOCK_COLUMNS,
            BLOCK_E=block_experts(E),
            num_warps=8,  # with four, Triton 3.6 spills a tile and its addresses
        )
    return sum_tiles(parts_MN, index.expert_offsets, like_EN, BLOCK_ROWS)


def row_gate_gradient(
    parts_AN: Tensor, d_rows_AO: Tensor, bias_EO: Tensor | None, expert_offsets: Tensor, like_A: Tensor
) -> Tensor:
    """The gradient of each row's gate, [R]: the sum of its partial sums and of <d_row, its expert's bias>."""
    out_A = torch.empty_like(like_A)
    (R, O), E = d_rows_AO.shape, expert_offsets.shape[0] - 1
    if R:
        most = cdiv(R, BLOCK_ROWS) + E
        row_gate_gradient_kernel[(min(most, 4 * tiles.processors(like_A.device)),)](
            parts_AN,
            d_rows_AO,
            pointer(bias_EO, d_rows_AO),
            expert_offsets,
            out_A,
            E,
            O,
            parts_AN.shape[1],
            BIAS=bias_EO is not None,
            BLOCK_M=BLOCK_ROWS,
            BLOCK_K=64,
            BLOCK_T=16,
            BLOCK_E=block_experts(E),
        )
    return out_A
