"""Expert networks on ragged rows: one GEMM per expert on contiguous rows, none for an expert without rows.

    h = x[token] @ w1[e] + b1[e]            pre-activation, [rows, H]
    a = act(h)        or, gated (GLU):      act(h) * u,  u = x[token] @ w3[e] + b3[e]
    row = (a @ w2[e] + b2[e]) * gate        the gate is 1 unless `apply_gate`

Weights are [E, in, out] with any strides: a transposed view keeps the [E, out, in] storage of a checkpoint.
The forward keeps x, the index and h (and u) for the backward, which recomputes a. Without `save` it keeps only x and
the index, and the backward recomputes h, u and a with the same bits. The gate gradient needs no expert output: with
dA = d_row @ w2^T, d_gate = <d_row, row / gate> = rowsum(dA * a) + <d_row, b2>.

Half precision: if the processor has no GEMM of that type, products run in fp32 and are rounded once.
This is the engine "torch"; see `operation` for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS, hidden_gradients, hidden_rows
from .dispatch_combine import segment_sum
from .operands import ExpertWeights, Index
from .operation import expect, expect_matrix, keep, kept, operation

LINEAR_MODULES = {"triton": "gpu.grouped_ffn", "grouped_mm": "grouped_mm"}
MODULES = LINEAR_MODULES | {"numba": "cpu.grouped_ffn"}


@lru_cache
def gemm_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which to multiply matrices of `dtype`: fp32 if the CPU has no instructions for that half type."""
    if device != "cpu":
        return dtype
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return torch.float32 if dtype in native and not native[dtype]() else dtype


# Experts with few rows share a block of at most this many elements: one gather and one activation per block.
BLOCK_ELEMENTS = 1 << 20

Segment = tuple[int, slice, slice]  # expert, its rows, its rows within the block


def blocks(expert_offsets: Tensor, width: int) -> Iterator[tuple[slice, list[Segment]]]:
    """Blocks of consecutive experts that have rows: (rows of the block, its segments); a row has `width` elements."""
    offsets = expert_offsets.tolist()
    limit = max(1, BLOCK_ELEMENTS // max(width, 1))
    first, segments = 0, list[Segment]()
    for e, (start, stop) in enumerate(pairwise(offsets)):
        if start == stop:
            continue
        if segments and stop - first > limit:
            yield slice(first, start), segments
            first, segments = start, []
        segments.append((e, slice(start, stop), slice(start - first, stop - first)))
    if segments:
        yield slice(first, offsets[-1]), segments


def unbind(weight: Tensor | None, num_experts: int) -> tuple[Any, ...]:
    """One matrix or vector per expert, or one None per expert."""
    return (None,) * num_experts if weight is None else weight.unbind(0)


def linear(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> None:
    """out = x @ w + b, in the dtype of `x`, rounded to that of `out`."""
    dtype = x.dtype
    target = out if out.dtype == dtype else out.new_empty(out.shape, dtype=dtype)
    if b is None:
        torch.mm(x, w.to(dtype), out=target)
    else:
        torch.addmm(b.to(dtype), x, w.to(dtype), out=target)
    if target is not out:
        out.copy_(target)


def add_product(x: Tensor, w: Tensor, out: Tensor) -> None:
    """out += x @ w, multiplied in the dtype of `x`."""
    if out.dtype == x.dtype:
        out.addmm_(x, w.to(x.dtype))
    else:
        out.add_(torch.mm(x, w.to(x.dtype)))


def _linear_block(x: Tensor, w: tuple[Any, ...], b: tuple[Any, ...], segments: list[Segment], out: Tensor) -> Tensor:
    """Write each expert's x @ w + b for the rows of a block to `out`, and return it."""
    for e, _, part in segments:
        linear(x[part], w[e], b[e], out[part])
    return out


def block_rows(rows_AH: Tensor, rows: slice, like: Tensor, width: int) -> Tensor:
    """These rows of `rows_AH`; if it is empty, new rows [rows, width] of the dtype of `like`.

    New rows get the cache-line alignment that they would have in the long array: rounding may depend on the address.
    """
    if rows_AH.shape[0]:
        return rows_AH[rows]
    line = 64 // like.dtype.itemsize
    first, size = rows.start * width % line, (rows.stop - rows.start) * width
    return like.new_empty((first + size,))[first:].view(-1, width)


def _check_ffn(x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights, activation: str, *_: Any) -> None:
    index.check(x_TD.shape[0], weights.check(x_TD, activation))
    expect("gate_A", gate_A, (index.rows,), "[rows]")


def _ffn_shapes(
    x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights, activation: str, apply_gate: bool, save: bool,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows_AO = x_TD.new_empty((index.rows, weights.w2_EHO.shape[2]))
    return rows_AO, *weights.pre_activations(x_TD, index.rows if save else 0)


def _ffn_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    x_TD, gate_A, index, weights, ctx.activation, ctx.apply_gate, _, ctx.engine = inputs
    ctx.gate_dtype = gate_A.dtype
    gate = gate_A if ctx.apply_gate else None  # without apply_gate the backward does not read the values
    keep(ctx, *output[1:], x_TD, gate, index, weights)


def _ffn_backward(ctx: Any, d_rows_AO: Tensor | None, *_: Any) -> tuple[Any, ...] | None:
    if d_rows_AO is None:
        return None
    h_AH, u_AH, x_TD, gate_A, index, weights = kept(ctx)
    if gate_A is None:
        gate_A = d_rows_AO.new_empty((index.rows,), dtype=ctx.gate_dtype)
    wanted = ctx.wanted["weights"]
    options = (ctx.activation, ctx.apply_gate, wanted, ctx.engine)
    d_x_TD, d_gate_A, *d_weights = grouped_ffn_backward(
        d_rows_AO.contiguous(), h_AH, u_AH, x_TD, gate_A, index, weights, *options
    )
    return d_x_TD, d_gate_A, None, d_weights if wanted else None


@operation(
    check=_check_ffn,
    fake=_ffn_shapes,
    engines=MODULES,
    autocast=False,
    context=_ffn_context,
    backward=_ffn_backward,
)
def grouped_ffn(
    x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights, activation: str, apply_gate: bool, save: bool,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [rows, O], and h and u [rows, H] for the backward (empty unless `save`; u empty without w3).

    Without `save`, the backward recomputes h and u with the same bits. `engine`: one of `operation.ENGINES`.
    """
    act = ACTIVATIONS[activation]
    dtype = gemm_dtype(x_TD.dtype, x_TD.device.type)
    E, _, H = weights.w1_EDH.shape
    rows_AO = x_TD.new_empty((index.rows, weights.w2_EHO.shape[2]))
    h_AH, u_AH = weights.pre_activations(x_TD, index.rows if save else 0)
    w1, b1, w3, b3, w2, b2 = (unbind(w, E) for w in weights)
    for rows, segments in blocks(index.expert_offsets, H):
        x = x_TD.index_select(0, index.token_of_row[rows]).to(dtype)
        h = _linear_block(x, w1, b1, segments, block_rows(h_AH, rows, x_TD, H)).to(dtype)
        u = None
        if weights.w3_EDH is not None:
            u = _linear_block(x, w3, b3, segments, block_rows(u_AH, rows, x_TD, H)).to(dtype)
        _, a = hidden_rows(act, h, u)
        for e, own, part in segments:
            linear(a[part], w2[e], b2[e], rows_AO[own])
        if apply_gate:
            rows_AO[rows].mul_(gate_A[rows].unsqueeze(1))
    return rows_AO, h_AH, u_AH


def zeroed_where_silent(like_E: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """A gradient buffer for stacked weights, zero for experts without rows."""
    if like_E is None:
        return torch.empty(0, dtype=torch.float32, device=expert_offsets.device)
    grad_E = torch.empty_like(like_E)
    for e in (expert_offsets.diff() == 0).nonzero().squeeze(1).tolist():
        grad_E[e].zero_()
    return grad_E


def _ffn_backward_shapes(
    d_rows_AO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights,
    activation: str, apply_gate: bool, wanted: bool, engine: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    return x_TD.new_empty(x_TD.shape), torch.empty_like(gate_A), *weights.gradients(wanted)


@operation(fake=_ffn_backward_shapes, engines=MODULES, autocast=False)
def grouped_ffn_backward(
    d_rows_AO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights,
    activation: str, apply_gate: bool, wanted: bool, engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate, w1, b1, w3, b3, w2, b2; the weights' gradients are empty unless `wanted`.

    `h_AH` and `u_AH` come from the forward; if they are empty, they are recomputed.
    """
    act = ACTIVATIONS[activation]
    dtype = gemm_dtype(x_TD.dtype, x_TD.device.type)
    saved = h_AH.shape[0] == index.rows
    E, _, H = weights.w1_EDH.shape
    d_xs_AD = x_TD.new_empty((index.rows, x_TD.shape[1]), dtype=torch.promote_types(dtype, torch.float32))
    d_gate_A = torch.empty_like(gate_A)
    w1, b1, w3, b3, w2, b2 = (unbind(w, E) for w in weights)
    grads = [zeroed_where_silent(w if wanted else None, index.expert_offsets) for w in weights]
    d_w1, d_b1, d_w3, d_b3, d_w2, d_b2 = (g.unbind(0) for g in grads)
    for rows, segments in blocks(index.expert_offsets, H):
        d_row = d_rows_AO[rows].to(dtype)
        x = x_TD.index_select(0, index.token_of_row[rows if wanted or not saved else slice(0)]).to(dtype)
        h = block_rows(h_AH, rows, x_TD, H)
        if not saved:
            _linear_block(x, w1, b1, segments, h)
        h, u = h.to(dtype), None
        if weights.w3_EDH is not None:
            u = block_rows(u_AH, rows, x_TD, H)
            if not saved:
                _linear_block(x, w3, b3, segments, u)
            u = u.to(dtype)
        act_h, a = hidden_rows(act, h, u)
        d_a = torch.empty_like(h)
        for e, _, part in segments:
            linear(d_row[part], w2[e].t(), None, d_a[part])
        d_gate = (d_a * a).sum(dim=1, dtype=d_xs_AD.dtype)
        if weights.b2_EO is not None:
            for e, _, part in segments:
                d_gate[part].add_(torch.mv(d_row[part], b2[e].to(dtype)))
        d_gate_A[rows] = d_gate
        if apply_gate:
            gate = gate_A[rows].to(dtype).unsqueeze(1)
            d_a, d_row = d_a * gate, d_row * gate
        d_h, d_u = hidden_gradients(act, d_a, h, u, act_h)
        d_x = d_xs_AD[rows]
        for e, _, part in segments:
            linear(d_h[part], w1[e].t(), None, d_x[part])
            if d_u is not None:
                add_product(d_u[part], w3[e].t(), d_x[part])
        if not wanted:
            continue
        for e, _, part in segments:
            linear(a[part].t(), d_row[part], None, d_w2[e])
            linear(x[part].t(), d_h[part], None, d_w1[e])
            if weights.b1_EH is not None:
                d_b1[e].copy_(d_h[part].sum(dim=0))
            if weights.b2_EO is not None:
                d_b2[e].copy_(d_row[part].sum(dim=0))
            if d_u is not None:
                linear(x[part].t(), d_u[part], None, d_w3[e])
                if weights.b3_EH is not None:
                    d_b3[e].copy_(d_u[part].sum(dim=0))
    d_x_TD = segment_sum(d_xs_AD, index.token_offsets, index.row_of_assignment).to(x_TD.dtype)
    return d_x_TD, d_gate_A, *grads  # type: ignore[return-value]


def _check_linear(
    rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, b_EO: Tensor | None, engine: str = "auto"
) -> None:
    expect_matrix("rows_AD", rows_AD, "[rows, D]")
    expect_matrix("w_EDO", w_EDO, "[E, D, O]", 3)
    E, _, O = w_EDO.shape
    expect("w_EDO", w_EDO, (E, rows_AD.shape[1], O), "[E, D, O]")
    expect("b_EO", b_EO, (E, O), "[E, O]")
    expect("expert_offsets", expert_offsets, (E + 1,), "[E + 1]", torch.int32)


def _linear_shape(rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, *_: Any) -> Tensor:
    return rows_AD.new_empty((rows_AD.shape[0], w_EDO.shape[2]))


def _linear_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.engine = inputs
    ctx.save_for_backward(*tensors)


def _linear_backward(ctx: Any, d_out_AO: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    d_rows_AD, d_w_EDO, d_b_EO = grouped_linear_backward(d_out_AO.contiguous(), *saved, ctx.engine)
    return d_rows_AD, None, d_w_EDO, d_b_EO if saved[3] is not None else None


@operation(
    check=_check_linear,
    fake=_linear_shape,
    engines=LINEAR_MODULES,
    autocast=False,
    context=_linear_context,
    backward=_linear_backward,
)
def grouped_linear(
    rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, b_EO: Tensor | None, engine: str = "auto"
) -> Tensor:
    """Each expert's linear map on its contiguous rows: [rows, D] to [rows, O], 0 past the last expert's rows.

    For the unfused path. `engine`: one of `operation.ENGINES`.
    """
    dtype = gemm_dtype(rows_AD.dtype, rows_AD.device.type)
    out_AO = rows_AD.new_empty((rows_AD.shape[0], w_EDO.shape[2]))
    for _, segments in blocks(expert_offsets, 0):
        for e, rows, _ in segments:
            linear(rows_AD[rows].to(dtype), w_EDO[e], None if b_EO is None else b_EO[e], out_AO[rows])
    out_AO[int(expert_offsets[-1]) :].zero_()  # the gradient of an activation's parameters sums over all rows
    return out_AO


def _linear_backward_shapes(
    d_out_AO: Tensor, rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, b_EO: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    d_b_EO = torch.empty_like(b_EO) if b_EO is not None else rows_AD.new_empty((0,), dtype=torch.float32)
    return torch.empty_like(rows_AD), torch.empty_like(w_EDO), d_b_EO


@operation(fake=_linear_backward_shapes, engines=LINEAR_MODULES, autocast=False)
def grouped_linear_backward(
    d_out_AO: Tensor,
    rows_AD: Tensor,
    expert_offsets: Tensor,
    w_EDO: Tensor,
    b_EO: Tensor | None,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, w and b (empty without b)."""
    dtype = gemm_dtype(rows_AD.dtype, rows_AD.device.type)
    d_rows_AD = torch.empty_like(rows_AD)
    d_w = zeroed_where_silent(w_EDO, expert_offsets)
    d_b = zeroed_where_silent(b_EO, expert_offsets)
    for _, segments in blocks(expert_offsets, 0):
        for e, rows, _ in segments:
            d_out = d_out_AO[rows].to(dtype)
            linear(d_out, w_EDO[e].t(), None, d_rows_AD[rows])
            linear(rows_AD[rows].to(dtype).t(), d_out, None, d_w[e])
            if b_EO is not None:
                d_b[e].copy_(d_out.sum(dim=0))
    d_rows_AD[int(expert_offsets[-1]) :].zero_()
    return d_rows_AD, d_w, d_b
