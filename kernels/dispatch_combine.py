"""Rows of the ragged assignment: tokens to rows (`dispatch`), rows to tokens (`combine`), gate values to rows.

A row is one assignment, in expert-major order. `ragged_index` makes the index arrays. Row arrays may be longer than
A = expert_offsets[-1] (bounded capacity); rows past A are unused and never read.

`combine` is a segment sum in a fixed order (a token's rows by ascending expert), so two runs are bitwise equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import Index, expect_index
from .operation import expect, expect_matrix, keep, kept, operation

MODULES = {"triton": "gpu.dispatch_combine"}


def segment_sum(rows_AD: Tensor, token_offsets: Tensor, row_of_assignment: Tensor) -> Tensor:
    """Sum of each token's rows, [T, D]; half-precision rows are summed in fp32, so that the caller rounds once."""
    T, D = token_offsets.shape[0] - 1, rows_AD.shape[1]
    A = int(token_offsets[-1])
    rows_AD = rows_AD[:A].to(torch.promote_types(rows_AD.dtype, torch.float32))
    if T == 0 or A == 0 or D == 0:
        return rows_AD.new_zeros((T, D))
    order = row_of_assignment[:A]
    return F.embedding_bag(order, rows_AD.contiguous(), token_offsets, mode="sum", include_last_offset=True)


def gather_rows(x_TD: Tensor, token_of_row: Tensor, A: int) -> Tensor:
    """x of each row's token, [rows, D]; rows past A stay uninitialised."""
    if token_of_row.shape[0] == A:
        return x_TD.index_select(0, token_of_row)
    rows_AD = x_TD.new_empty((token_of_row.shape[0], x_TD.shape[1]))
    torch.index_select(x_TD, 0, token_of_row[:A], out=rows_AD[:A])
    return rows_AD


def _check_dispatch(x_TD: Tensor, token_offsets: Tensor, token_of_row: Tensor, row_of_assignment: Tensor) -> None:
    expect_matrix("x_TD", x_TD, "[T, D]")
    expect_index(x_TD.shape[0], None, (None, token_offsets, token_of_row, row_of_assignment))


def _dispatch_shape(x_TD: Tensor, token_offsets: Tensor, token_of_row: Tensor, row_of_assignment: Tensor) -> Tensor:
    return x_TD.new_empty((token_of_row.shape[0], x_TD.shape[1]))


def _dispatch_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _dispatch_backward(ctx: Any, d_rows_AD: Tensor) -> tuple[Any, ...]:
    return (combine(d_rows_AD, *ctx.saved_tensors, False),)


@operation(
    check=_check_dispatch, fake=_dispatch_shape, engines=MODULES, context=_dispatch_context, backward=_dispatch_backward
)
def dispatch(x_TD: Tensor, token_offsets: Tensor, token_of_row: Tensor, row_of_assignment: Tensor) -> Tensor:
    """Token rows to expert rows: [T, D] to [rows, D]."""
    return gather_rows(x_TD, token_of_row, int(token_offsets[-1]))


def _check_combine(
    rows_AD: Tensor, token_offsets: Tensor, token_of_row: Tensor, row_of_assignment: Tensor, mean: bool
) -> None:
    expect_matrix("rows_AD", rows_AD, "[rows, D]")
    rows = expect_index(token_offsets.numel() - 1, None, (None, token_offsets, token_of_row, row_of_assignment))
    expect("rows_AD", rows_AD, (rows, rows_AD.shape[1]), "[rows, D]")


def _combine_shape(rows_AD: Tensor, token_offsets: Tensor, *_: Any) -> Tensor:
    return rows_AD.new_empty((token_offsets.shape[0] - 1, rows_AD.shape[1]))


def _combine_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, token_offsets, token_of_row, _, ctx.mean = inputs
    ctx.save_for_backward(token_offsets, token_of_row)


def _combine_backward(ctx: Any, d_y_TD: Tensor) -> tuple[Any, ...]:
    return (combine_backward(d_y_TD, *ctx.saved_tensors, ctx.mean),)


@operation(
    check=_check_combine, fake=_combine_shape, engines=MODULES, context=_combine_context, backward=_combine_backward
)
def combine(
    rows_AD: Tensor, token_offsets: Tensor, token_of_row: Tensor, row_of_assignment: Tensor, mean: bool
) -> Tensor:
    """Expert rows back to token rows, [rows, D] to [T, D]: each token's sum or mean, 0 for a token without rows."""
    y_TD = segment_sum(rows_AD, token_offsets, row_of_assignment)
    if mean:
        y_TD.div_(_k_or_one(token_offsets))
    return y_TD.to(rows_AD.dtype)


def _k_or_one(token_offsets: Tensor) -> Tensor:
    """max(k_t, 1), [T, 1] int32."""
    return token_offsets.diff().clamp_(min=1).unsqueeze(1)


def _combine_backward_shape(d_y_TD: Tensor, token_offsets: Tensor, token_of_row: Tensor, mean: bool) -> Tensor:
    return d_y_TD.new_empty((token_of_row.shape[0], d_y_TD.shape[1]))


@operation(fake=_combine_backward_shape, engines=MODULES)
def combine_backward(d_y_TD: Tensor, token_offsets: Tensor, token_of_row: Tensor, mean: bool) -> Tensor:
    """Gradient of the rows, [rows, D]: the gradient of the row's token, divided by k_t for the mean."""
    if mean:
        d_y_TD = d_y_TD / _k_or_one(token_offsets)
    return gather_rows(d_y_TD, token_of_row, int(token_offsets[-1]))


def _pair_of_row(num_experts: int, expert_offsets: Tensor, token_of_row: Tensor) -> Tensor:
    """t * E + e of each row, [A] int64."""
    A = int(expert_offsets[-1])
    expert_E = torch.arange(num_experts, device=token_of_row.device)
    expert_A = expert_E.repeat_interleave(expert_offsets.diff(), output_size=A)
    return token_of_row[:A].long() * num_experts + expert_A


def _check_row_gates(
    value_TE: Tensor, threshold_E: Tensor | None, unrouted_T: Tensor, index: Index, centred: bool
) -> None:
    expect_matrix("value_TE", value_TE, "[T, E]")
    T, E = value_TE.shape
    expect("threshold_E", threshold_E, (E,), "[E]")
    expect("unrouted_T", unrouted_T, (T,), "[T]", torch.bool)
    index.check(T, E)


def _row_gates_shape(value_TE: Tensor, threshold_E: Any, unrouted_T: Tensor, index: Index, centred: bool) -> Tensor:
    return value_TE.new_empty((index.rows,))


def _row_gates_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, threshold_E, unrouted_T, index, ctx.centred = inputs
    ctx.straight_through = threshold_E is not None
    keep(ctx, unrouted_T, index)


def _row_gates_backward(ctx: Any, d_gate_A: Tensor) -> tuple[Any, ...]:
    d_value_TE = row_gates_backward(d_gate_A, *kept(ctx), ctx.straight_through, ctx.centred)
    return d_value_TE, -d_value_TE.sum(dim=0) if ctx.straight_through else None


@operation(
    check=_check_row_gates,
    fake=_row_gates_shape,
    engines=MODULES,
    context=_row_gates_context,
    backward=_row_gates_backward,
)
def row_gates(value_TE: Tensor, threshold_E: Tensor | None, unrouted_T: Tensor, index: Index, centred: bool) -> Tensor:
    """The gate value of each row, [rows]; the router learns through it.

    With `threshold_E` (top-any): value_TE are scores and every gate is 1. The gate's gradient goes straight through to
    the row's score and, negated, to its expert's threshold. A fallback row (`unrouted_T`) passes no gradient. `centred`
    subtracts the mean over the token's rows, which is <dy, y> / k of the "normalized" gradient.
    Without `threshold_E` (fixed k): value_TE are combine weights, gathered by row.
    """
    gate_A = value_TE.new_ones((index.rows,))
    if threshold_E is None:
        pair_A = _pair_of_row(value_TE.shape[1], index.expert_offsets, index.token_of_row)
        gate_A[: pair_A.shape[0]] = value_TE.reshape(-1)[pair_A]
    return gate_A


def _row_gates_backward_shape(d_gate_A: Tensor, unrouted_T: Tensor, index: Index, *_: Any) -> Tensor:
    return d_gate_A.new_empty((unrouted_T.shape[0], index.experts))


@operation(fake=_row_gates_backward_shape, engines=MODULES)
def row_gates_backward(
    d_gate_A: Tensor, unrouted_T: Tensor, index: Index, straight_through: bool, centred: bool
) -> Tensor:
    """Gradient of value_TE, [T, E]; zero outside assignments."""
    T, E = unrouted_T.shape[0], index.experts
    d_value_TE = d_gate_A.new_zeros((T, E))
    pair_A = _pair_of_row(E, index.expert_offsets, index.token_of_row)
    A = pair_A.shape[0]
    d_pair_A = d_gate_A[:A]
    if straight_through:
        token_A = index.token_of_row[:A]
        if centred:
            total_T1 = segment_sum(d_gate_A.unsqueeze(1), index.token_offsets, index.row_of_assignment)
            mean_T = total_T1.div_(_k_or_one(index.token_offsets)).squeeze(1)
            d_pair_A = d_pair_A - mean_T.index_select(0, token_A)
        d_pair_A = d_pair_A.masked_fill(unrouted_T.index_select(0, token_A), 0)
    d_value_TE.view(-1)[pair_A] = d_pair_A
    return d_value_TE
