"""Rows of the ragged assignment: copies of tokens to rows, sums of rows to tokens, gate values and their gradient.

`segment_sum` adds a token's rows by ascending expert in fp32. A program works on whole tokens, so a token's sum does
not depend on others. The kernels read the number of rows on the device, so unused rows cost nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Index
from . import tiles
from .launch import kernel
from .sizes import cdiv, power_of_two

TILE = 2048  # elements per tile of tokens or rows by columns: 16 bytes a load and thread, twice in half precision
WARPS = 4
MOST_COLUMNS = 2048
UNROLL = 4  # rows of a token that are loaded together
PROGRAMS = 16  # per multiprocessor, for the kernels that walk the rows
GATE_ROWS = 256
GATE_TOKENS, GATE_ASSIGNMENTS = 32, 16


@kernel
def segment_sum_kernel(
    rows, token_offsets, row_of_assignment, out, T, D, stride_r,
    MEAN: tl.constexpr, UNROLL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = sum, or mean (MEAN), of the rows of token t, in the order of row_of_assignment; 0 without rows.

    In: rows [R, D] with stride_r, token_offsets [T+1], row_of_assignment [R]. Out: [T, D].
    Grid: (blocks of tokens, blocks of columns). Bytes: each of the A rows once, the output once.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t_mask, d_mask = t < T, d < D
    start = tl.load(token_offsets + t, mask=t_mask, other=0)
    k = tl.load(token_offsets + 1 + t, mask=t_mask, other=0) - start
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, tl.max(k, axis=0), UNROLL):
        for i in tl.static_range(UNROLL):
            mask = first + i < k
            row = tl.load(row_of_assignment + start + first + i, mask=mask, other=0).to(tl.int64)
            at = rows + (row * stride_r)[:, None] + d[None, :]
            acc += tl.load(at, mask=mask[:, None] & d_mask[None, :], other=0.0).to(tl.float32)
    if MEAN:
        acc = tl.div_rn(acc, tl.broadcast_to(tl.maximum(k, 1).to(tl.float32)[:, None], (BLOCK_T, BLOCK_D)))
    at = out + t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=t_mask[:, None] & d_mask[None, :])


@kernel(do_not_specialize=["R"])
def token_rows_kernel(
    x, token_offsets, token_of_row, out, T, D, R, stride_x,
    OVER_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[row] = x of the row's token, over the token's number of rows (OVER_K); unused rows are not written.

    In: x [T, D] with stride_x, token_offsets [T+1], token_of_row [R]. Out: [R, D].
    Grid: (programs that walk the blocks of rows, blocks of columns). Bytes: A rows read and written.
    """
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    A = tl.minimum(tl.load(token_offsets + T), R)
    for block in range(tl.program_id(0), tl.cdiv(A, BLOCK_R), tl.num_programs(0)):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        r_mask = row < A
        mask = r_mask[:, None] & (d < D)[None, :]
        t = tl.load(token_of_row + row, mask=r_mask, other=0)
        value = tl.load(x + (t.to(tl.int64) * stride_x)[:, None] + d[None, :], mask=mask, other=0.0)
        if OVER_K:
            k = tl.load(token_offsets + 1 + t, mask=r_mask, other=0) - tl.load(token_offsets + t, mask=r_mask, other=0)
            over = tl.broadcast_to(tl.maximum(k, 1).to(tl.float32)[:, None], (BLOCK_R, BLOCK_D))
            value = tl.div_rn(value.to(tl.float32), over)
        tl.store(out + row.to(tl.int64)[:, None] * D + d[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _expert_of(row, mask, expert_offsets, E, STEPS: tl.constexpr):
    """The expert of each row, by bisection: the number of experts whose rows end at or before it."""
    low = row * 0
    high = low + E
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        before = (tl.load(expert_offsets + 1 + middle, mask=mask & (middle < E), other=2147483647) <= row) & (
            low < high
        )
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@kernel(do_not_specialize=["R"])
def row_values_kernel(
    value, expert_offsets, token_of_row, out, E, R, stride_t, stride_e, STEPS: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """out[row] = value[token, expert] of the row, 1 for unused rows.

    In: value [T, E], expert_offsets [E+1], token_of_row [R]. Out: [R]. Grid: programs that walk the rows. Bytes: 12 R.
    """
    A = tl.load(expert_offsets + E)
    for block in range(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < A) & (row < R)
        t = tl.load(token_of_row + row, mask=mask, other=0).to(tl.int64)
        e = _expert_of(row, mask, expert_offsets, E, STEPS).to(tl.int64)
        gate = tl.load(value + t * stride_t + e * stride_e, mask=mask, other=1.0)
        tl.store(out + row, gate, mask=row < R)


@kernel
def row_values_backward_kernel(
    d_gate, unrouted, expert_offsets, token_offsets, row_of_assignment, out, T, E,
    STRAIGHT: tl.constexpr, CENTRED: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[t, e] = d_gate of the row, minus the mean over the token's rows (CENTRED), 0 if unrouted (STRAIGHT).

    In: d_gate [R], unrouted [T] bool and the index. Out: [T, E], at assignments only. Grid: blocks of tokens.
    Bytes: 12 A + 5 T; d_gate twice if centred.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_K)
    start = tl.load(token_offsets + t, mask=t < T, other=0)
    k = tl.load(token_offsets + 1 + t, mask=t < T, other=0) - start
    most = tl.max(k, axis=0)
    mean = tl.zeros((BLOCK_T,), tl.float32)
    if CENTRED:
        for first in range(0, most, BLOCK_K):
            mask = (first + j)[None, :] < k[:, None]
            row = tl.load(row_of_assignment + start[:, None] + (first + j)[None, :], mask=mask, other=0)
            mean += tl.sum(tl.load(d_gate + row, mask=mask, other=0.0).to(tl.float32), axis=1)
        mean = tl.div_rn(mean, tl.maximum(k, 1).to(tl.float32))
    if STRAIGHT:
        passes = tl.load(unrouted + t, mask=t < T, other=0) == 0
    for first in range(0, most, BLOCK_K):
        mask = (first + j)[None, :] < k[:, None]
        row = tl.load(row_of_assignment + start[:, None] + (first + j)[None, :], mask=mask, other=0)
        grad = tl.load(d_gate + row, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        if STRAIGHT:
            grad = tl.where(passes[:, None], grad, 0.0)
        e = _expert_of(row, mask, expert_offsets, E, STEPS)
        tl.store(out + t.to(tl.int64)[:, None] * E + e, grad.to(out.dtype.element_ty), mask=mask)


def _rows_contiguous(x: Tensor) -> Tensor:
    """x [., D] with stride 1 along D."""
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(D: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = power_of_two(D, 16, MOST_COLUMNS)
    return TILE // columns, columns


def _sum(rows_AD: Tensor, token_offsets: Tensor, row_of_assignment: Tensor, mean: bool, dtype: torch.dtype) -> Tensor:
    T, D = token_offsets.shape[0] - 1, rows_AD.shape[1]
    y_TD = rows_AD.new_empty((T, D), dtype=dtype)
    if T == 0 or D == 0:
        return y_TD
    rows_AD = _rows_contiguous(rows_AD)
    block_t, block_d = _tile(D)
    segment_sum_kernel[(cdiv(T, block_t), cdiv(D, block_d))](
        rows_AD,
        token_offsets,
        row_of_assignment,
        y_TD,
        T,
        D,
        rows_AD.stride(0),
        MEAN=mean,
        UNROLL=UNROLL,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=WARPS,
    )
    return y_TD


def segment_sum(
    rows_AD: Tensor, token_offsets: Tensor, row_of_assignment: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """As `kernels.dispatch_combine.segment_sum`: in fp32, or rounded once to `dtype`."""
    return _sum(rows_AD, token_offsets, row_of_assignment, False, dtype or torch.float32)


def _token_rows(x_TD: Tensor, token_offsets: Tensor, token_of_row: Tensor, over_k: bool) -> Tensor:
    (T, D), R = x_TD.shape, token_of_row.shape[0]
    rows_AD = x_TD.new_empty((R, D))
    if R == 0 or D == 0 or T == 0:
        return rows_AD
    x_TD = _rows_contiguous(x_TD)
    block_r, block_d = _tile(D)
    programs = min(cdiv(R, block_r), PROGRAMS * tiles.processors(x_TD.device))
    token_rows_kernel[(programs, cdiv(D, block_d))](
        x_TD,
        token_offsets,
        token_of_row,
        rows_AD,
        T,
        D,
        R,
        x_TD.stride(0),
        OVER_K=over_k,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=WARPS,
    )
    return rows_AD


def dispatch(x_TD: Tensor, token_offsets: Tensor, token_of_row: Tensor, row_of_assignment: Tensor) -> Tensor:
    return _token_rows(x_TD, token_offsets, token_of_row, False)


def combine(
    rows_AD: Tensor, token_offsets: Tensor, token_of_row: Tensor, row_of_assignment: Tensor, mean: bool
) -> Tensor:
    return _sum(rows_AD, token_offsets, row_of_assignment, mean, rows_AD.dtype)


def combine_backward(d_y_TD: Tensor, token_offsets: Tensor, token_of_row: Tensor, mean: bool) -> Tensor:
    return _token_rows(d_y_TD, token_offsets, token_of_row, mean)


def row_gates(value_TE: Tensor, threshold_E: Tensor | None, unrouted_T: Tensor, index: Index, centred: bool) -> Tensor:
    R, E = index.rows, value_TE.shape[1]
    if threshold_E is not None or R == 0:
        return value_TE.new_ones((R,))
    gate_A = value_TE.new_empty((R,))
    programs = min(cdiv(R, GATE_ROWS), PROGRAMS * tiles.processors(value_TE.device))
    row_values_kernel[(programs,)](
        value_TE,
        index.expert_offsets,
        index.token_of_row,
        gate_A,
        E,
        R,
        *value_TE.stride(),
        STEPS=E.bit_length(),
        BLOCK_R=GATE_ROWS,
        num_warps=WARPS,
    )
    return gate_A


def row_gates_backward(
    d_gate_A: Tensor, unrouted_T: Tensor, index: Index, straight_through: bool, centred: bool
) -> Tensor:
    T, E = unrouted_T.shape[0], index.experts
    d_value_TE = d_gate_A.new_zeros((T, E))
    if T == 0:
        return d_value_TE
    row_values_backward_kernel[(cdiv(T, GATE_TOKENS),)](
        d_gate_A.contiguous(),
        unrouted_T.contiguous(),
        index.expert_offsets,
        index.token_offsets,
        index.row_of_assignment,
        d_value_TE,
        T,
        E,
        STRAIGHT=straight_through,
        CENTRED=centred and straight_through,
        STEPS=E.bit_length(),
        BLOCK_T=GATE_TOKENS,
        BLOCK_K=GATE_ASSIGNMENTS,
        num_warps=WARPS,
    )
    return d_value_TE
