"""Gradients of the experts' weights and biases: products over the rows of each expert, cut into pieces of equal length.

Pieces cross the borders of experts, so every program has the same number of rows whatever the experts' loads. The host
chooses the number of pieces by shapes alone; which expert a piece holds, only the device knows. Sums are fp32 and in a
fixed order: within a piece, then over the pieces of an expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Index
from . import tiles
from .gemm_kernels import launch_options, precision
from .launch import kernel
from .proxy_fence import proxy_fence
from .sizes import block_experts, cdiv

PIECE_COST = 1200  # rows whose products take as long as one more piece: 16 bytes an element at 150 operations a byte
MOST_PIECES = 32
JOINED = (8, 128)  # elements of a program that joins pieces


@triton.jit
def piece_length(rows, pieces, BLOCK_K: tl.constexpr):
    """Rows of a piece when `rows` are cut into equal `pieces` of whole steps of BLOCK_K; the last may have fewer."""
    return tl.cdiv(tl.cdiv(rows, pieces), BLOCK_K) * BLOCK_K


@triton.jit
def _experts_in(first, last, offsets, E, BLOCK_E: tl.constexpr):
    """The range of experts with a row in first:last, and those without rows between or beside them."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets + e, mask=e < E, other=2147483647)
    stop = tl.load(offsets + 1 + e, mask=e < E, other=2147483647)
    before = (start < first) & (stop <= first)
    not_behind = (start < last) | (stop <= last)
    return tl.sum(before.to(tl.int32), axis=0), tl.sum(not_behind.to(tl.int32), axis=0)


@kernel
def weight_gradient_kernel(
    a_in, b_in, token_of_row, offsets, out, parts, sums, sum_parts,
    E, M, N, stride_am, stride_bm, stride_oe, stride_om, stride_on,
    A_FROM_TOKENS: tl.constexpr, B_FROM_TOKENS: tl.constexpr, SUMS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e] = A_e^T B_e, and sums[e] = colsum(A_e) (SUMS) over the rows of expert e; zero for an expert without rows.

    The rows of all experts are cut into as many equal pieces as the grid has (SPLIT if several), whatever the experts'
    loads. An expert inside one piece is written to `out`. What a piece has of any other goes to `parts`, for
    `join_pieces_kernel`: of an expert that began earlier to slot 2 p, of one that begins in piece p to slot 2 p + 1.
    In: A [R, M] and B [R, N], or the tokens' [T, .], which it gathers
    Out: [E, M, N], sums [E, M]; parts [2 P, M, N] and sum_parts [2 P, M] fp32
    Grid: (tiles of M * N, pieces). Bytes: A M / BLOCK_M times and B N / BLOCK_N times (from L2), the output once.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    blocks = tl.num_programs(0)
    piece = tl.program_id(1)
    rows = tl.load(offsets + E)
    length = piece_length(rows, tl.num_programs(1), BLOCK_K)
    first, last = piece * length, tl.minimum((piece + 1) * length, rows)
    e_first, e_last = _experts_in(first, last, offsets, E, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    ones = tl.full((BLOCK_K, 16), 1.0, tl.float32).to(a_in.dtype.element_ty)
    # The tile is the same for every expert. Only the compiler must not see it: it would keep all addresses in registers
    for work in range(e_first * blocks + tl.program_id(0), e_last * blocks, blocks):
        e, tile = work // blocks, work % blocks
        tile_m, tile_n = tile // tiles_n, tile % tiles_n
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_mask, n_mask = m < M, n < N
        mask = m_mask[:, None] & n_mask[None, :]
        start, stop = tl.load(offsets + e), tl.load(offsets + e + 1)
        end = tl.minimum(stop, last)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_M, 16), tl.float32)
        for row_k in range(tl.maximum(start, first), end, BLOCK_K):
            row = row_k + k
            inside = row < end
            a_row = row.to(tl.int64)
            b_row = a_row
            if A_FROM_TOKENS or B_FROM_TOKENS:
                token = tl.load(token_of_row + row, mask=inside, other=0).to(tl.int64)
                if A_FROM_TOKENS:
                    a_row = token
                if B_FROM_TOKENS:
                    b_row = token
            a_at = a_in + (a_row * stride_am)[:, None] + m[None, :]
            b_at = b_in + (b_row * stride_bm)[:, None] + n[None, :]
            if EVEN_M:
                a = tl.load(a_at, mask=inside[:, None], other=0.0)
            else:
                a = tl.load(a_at, mask=inside[:, None] & m_mask[None, :], other=0.0)
            if EVEN_N:
                b = tl.load(b_at, mask=inside[:, None], other=0.0)
            else:
                b = tl.load(b_at, mask=inside[:, None] & n_mask[None, :], other=0.0)
            proxy_fence(a, PRECISION)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
            if SUMS:
                total = tl.dot(tl.trans(a), ones, total, input_precision=PRECISION)
        column = tl.max(total, axis=1)  # all 16 are equal
        row0 = (tile_m * BLOCK_M).to(tl.int64)  # 64-bit bases and 32-bit offsets, as in `_tile_at`
        in_tile = tl.arange(0, BLOCK_M)
        whole = True
        if SPLIT:
            whole = (start >= first) & (stop <= last)
        if whole:
            base = e.to(tl.int64) * stride_oe + row0 * stride_om
            at = (in_tile * stride_om)[:, None] + (n * stride_on)[None, :]
            tl.store(out + base + at, acc.to(out.dtype.element_ty), mask=mask)
            if SUMS and tile_n == 0:
                tl.store(sums + e.to(tl.int64) * M + m, column.to(sums.dtype.element_ty), mask=m_mask)
        elif SPLIT:
            base = (2 * piece + (start >= first)).to(tl.int64) * M
            tl.store(parts + (base + row0) * N + (in_tile[:, None] * N + n[None, :]), acc, mask=mask)
            if SUMS and tile_n == 0:
                tl.store(sum_parts + base + m, column, mask=m_mask)


@kernel(do_not_specialize=["PIECES"])
def join_pieces_kernel(
    parts, sum_parts, offsets, out, sums, E, M, N, stride_oe, stride_om, stride_on, PIECES,
    SUMS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of the expert's parts, in the order of the pieces, and sums[e] (SUMS) that of its sum_parts.

    An expert inside one piece is there already. In: parts [2 PIECES, M, N], sum_parts [2 PIECES, M] fp32. Out:
    [E, M, N], sums [E, M]. Grid: (blocks of M, of N, E). Bytes: the parts of cut experts.
    """
    e = tl.program_id(2)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :].to(tl.int64)
    m_mask = m < M
    mask = m_mask[:, None] & (n < N)
    start, stop = tl.load(offsets + e), tl.load(offsets + e + 1)
    length = tl.maximum(piece_length(tl.load(offsets + E), PIECES, BLOCK_K), 1)
    first, last = start // length, (stop - 1) // length
    if (stop > start) & (first < last):
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for piece in range(first, last + 1):
            row = (2 * piece + (start >= piece * length)).to(tl.int64) * M + m
            acc += tl.load(parts + row[:, None] * N + n, mask=mask, other=0.0)
            if SUMS:
                total += tl.load(sum_parts + row, mask=m_mask & (tl.program_id(1) == 0), other=0.0)
        at = out + e.to(tl.int64) * stride_oe + m[:, None] * stride_om + n * stride_on
        tl.store(at, acc.to(out.dtype.element_ty), mask=mask)
        if SUMS:
            sum_at = sums + e.to(tl.int64) * M + m
            tl.store(sum_at, total.to(sums.dtype.element_ty), mask=m_mask & (tl.program_id(1) == 0))


def pieces_of(blocks: int, rows: int, places: int) -> int:
    """Into how many pieces to cut the rows of a product with `blocks` tiles, on a device with `places` for programs.

    The time is that of the last wave, and each further piece has sums to write and to read.
    """

    def cost(pieces: int) -> float:
        waves = -(-blocks * pieces // places)
        return waves * places * rows / (blocks * pieces) + PIECE_COST * (pieces - 1)

    return min(range(1, MOST_PIECES + 1), key=cost)


def weight_gradient(
    a: Tensor, b: Tensor, index: Index, like_EMN: Tensor, bias_EN: Tensor | None = None,
    *, a_from_tokens: bool = False, b_from_tokens: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """a_e^T b_e over the rows of each expert, like `like_EMN`, and b's sums, like `bias_EN` (empty if None)."""
    out_EMN = torch.empty_like(like_EMN)
    E, M, N = out_EMN.shape
    sums_EN = like_EMN.new_empty((0,), dtype=torch.float32) if bias_EN is None else bias_EN.new_empty((E, N))
    if index.rows == 0 or E * M * N == 0:
        return out_EMN.zero_(), sums_EN.zero_()
    target = out_EMN
    if bias_EN is not None or (out_EMN.stride(2) != 1 and out_EMN.stride(1) == 1):
        # the kernel sums its first operand; without sums, it writes along the contiguous dimension
        a, b, a_from_tokens, b_from_tokens = b, a, b_from_tokens, a_from_tokens
        target, M, N = out_EMN.transpose(1, 2), N, M
    config = tiles.gemm("weight_gradient", a.device, a.dtype, cdiv(index.rows, E), M, N)
    blocks = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    pieces = pieces_of(blocks, index.rows, tiles.processors(a.device) * config.programs)
    split = pieces > 1
    parts = a.new_empty((2 * pieces if split else 0, M, N), dtype=torch.float32)
    sum_parts = a.new_empty((2 * pieces if split and bias_EN is not None else 0, M), dtype=torch.float32)
    weight_gradient_kernel[(blocks, pieces)](
        a, b, index.token_of_row, index.expert_offsets, target, parts, sums_EN, sum_parts,
        E, M, N, a.stride(0), b.stride(0), *target.stride(),
        A_FROM_TOKENS=a_from_tokens,
        B_FROM_TOKENS=b_from_tokens,
        SUMS=bias_EN is not None,
        SPLIT=split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_E=block_experts(E),
        EVEN_M=M % config.block_m == 0,
        EVEN_N=N % config.block_n == 0,
        PRECISION=precision(a.dtype, tiles.architecture(a.device)),
        **launch_options(config, tiles.architecture(a.device), gathers=a_from_tokens or b_from_tokens),
    )  # fmt: skip
    if split:
        join_pieces_kernel[(cdiv(M, JOINED[0]), cdiv(N, JOINED[1]), E)](
            parts, sum_parts, index.expert_offsets, target, sums_EN, E, M, N, *target.stride(), pieces,
            SUMS=bias_EN is not None,
            BLOCK_K=config.block_k,
            BLOCK_M=JOINED[0],
            BLOCK_N=JOINED[1],
        )  # fmt: skip
    return out_EMN, sums_EN
