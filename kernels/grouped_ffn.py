"""Expert networks on ragged rows: one GEMM an expert on contiguous rows, and nothing for an expert without rows.

    h = x[token] @ w1[e] + b1[e]            pre-activation, [rows, H]
    a = act(h)        or, gated (GLU):      act(h) * u,  u = x[token] @ w3[e] + b3[e]
    row = (a @ w2[e] + b2[e]) * gate        gate only where `apply_gate`, else it is the constant 1

Weights are [E, in, out] with any strides: a transposed view keeps the [E, out, in] storage of a checkpoint.
For the backward only x, h (and u) and the index are kept; a is computed again. The gate gradient needs no expert
output: d_gate = <d_row, row / gate> = rowsum(dA * a) + <d_row, b2>, with dA = d_row @ w2^T.

Half precision: where the processor has no GEMM of that type, products are taken in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .rows import segment_sum


@lru_cache
def _gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a CPU multiplies matrices of `dtype`: fp32 for a half type it has no instructions for."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return torch.float32 if dtype in native and not native[dtype]() else dtype


def _segments(expert_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    offsets = expert_offsets.tolist()
    for e, (start, stop) in enumerate(pairwise(offsets)):
        if stop > start:
            yield e, slice(start, stop)


def _linear(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> None:
    """out = x @ w + b, in the GEMM's dtype, rounded to that of `out`."""
    dtype = x.dtype
    if out.dtype == dtype:
        torch.mm(x, w.to(dtype), out=out)
        if b is not None:
            out.add_(b)
        return
    product = x @ w.to(dtype)
    out.copy_(product if b is None else product.add_(b))


@torch.library.custom_op("dynmoe_tutel::grouped_ffn", mutates_args=(), device_types="cpu")
def grouped_ffn(
    x_TD: Tensor,
    gate_A: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    token_of_row: Tensor,
    row_of_assignment: Tensor,
    w1_EDH: Tensor,
    b1_EH: Tensor | None,
    w3_EDH: Tensor | None,
    b3_EH: Tensor | None,
    w2_EHO: Tensor,
    b2_EO: Tensor | None,
    activation: str,
    apply_gate: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [rows, O], and h and u [rows, H] for the backward (empty unless `save`; u empty without `w3_EDH`)."""
    act = ACTIVATIONS[activation]
    dtype = _gemm_dtype(x_TD.dtype)
    R, H = token_of_row.shape[0], w1_EDH.shape[2]
    rows_AO = x_TD.new_empty((R, w2_EHO.shape[2]))
    h_AH = x_TD.new_empty((R if save else 0, H))
    u_AH = x_TD.new_empty((R if save and w3_EDH is not None else 0, H))
    for e, rows in _segments(expert_offsets):
        x = x_TD.index_select(0, token_of_row[rows]).to(dtype)
        h = h_AH[rows] if save else x_TD.new_empty((x.shape[0], H))
        _linear(x, w1_EDH[e], None if b1_EH is None else b1_EH[e], h)
        a = act.value(h.to(dtype))
        if w3_EDH is not None:
            u = u_AH[rows] if save else torch.empty_like(h)
            _linear(x, w3_EDH[e], None if b3_EH is None else b3_EH[e], u)
            a = a * u
        _linear(a, w2_EHO[e], None if b2_EO is None else b2_EO[e], rows_AO[rows])
        if apply_gate:
            rows_AO[rows].mul_(gate_A[rows].unsqueeze(1))
    return rows_AO, h_AH, u_AH


@grouped_ffn.register_fake
def _(  # type: ignore[no-untyped-def]
    x_TD,
    gate_A,
    expert_offsets,
    token_offsets,
    token_of_row,
    row_of_assignment,
    w1_EDH,
    b1_EH,
    w3_EDH,
    b3_EH,
    w2_EHO,
    b2_EO,
    activation,
    apply_gate,
    save,
):
    R, H = token_of_row.shape[0], w1_EDH.shape[2]
    return (
        x_TD.new_empty((R, w2_EHO.shape[2])),
        x_TD.new_empty((R if save else 0, H)),
        x_TD.new_empty((R if save and w3_EDH is not None else 0, H)),
    )


def _zeroed_where_silent(like_E: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """A buffer for the gradient of a stack of weights, zero for experts without rows."""
    if like_E is None:
        return torch.empty(0)
    grad_E = torch.empty_like(like_E)
    grad_E[expert_offsets.diff() == 0] = 0
    return grad_E


@torch.library.custom_op("dynmoe_tutel::grouped_ffn_backward", mutates_args=(), device_types="cpu")
def grouped_ffn_backward(
    d_rows_AO: Tensor,
    h_AH: Tensor,
    u_AH: Tensor,
    x_TD: Tensor,
    gate_A: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    token_of_row: Tensor,
    row_of_assignment: Tensor,
    w1_EDH: Tensor,
    b1_EH: Tensor | None,
    w3_EDH: Tensor | None,
    b3_EH: Tensor | None,
    w2_EHO: Tensor,
    b2_EO: Tensor | None,
    activation: str,
    apply_gate: bool,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, w1, b1, w3, b3, w2, b2; those of the weights empty unless `weights`."""
    act = ACTIVATIONS[activation]
    dtype = _gemm_dtype(x_TD.dtype)
    d_xs_AD = x_TD.new_empty((token_of_row.shape[0], x_TD.shape[1]))
    d_gate_A = torch.empty_like(gate_A)
    params = (w1_EDH, b1_EH, w3_EDH, b3_EH, w2_EHO, b2_EO)
    d_w1, d_b1, d_w3, d_b3, d_w2, d_b2 = (_zeroed_where_silent(p if weights else None, expert_offsets) for p in params)
    for e, rows in _segments(expert_offsets):
        d_row = d_rows_AO[rows].to(dtype)
        h = h_AH[rows].to(dtype)
        a = act_h = act.value(h)
        if w3_EDH is not None:
            u = u_AH[rows].to(dtype)
            a = act_h * u
        d_a = d_row @ w2_EHO[e].to(dtype).t()
        d_gate = (d_a.unsqueeze(1) @ a.unsqueeze(2)).view(-1)
        if b2_EO is not None:
            d_gate.add_(torch.mv(d_row, b2_EO[e].to(dtype)))
        d_gate_A[rows] = d_gate
        if apply_gate:
            gate = gate_A[rows].to(dtype).unsqueeze(1)
            d_a, d_row = d_a * gate, d_row * gate
        d_h = act.gradient(d_a if w3_EDH is None else d_a * u, h)
        d_x = d_h @ w1_EDH[e].to(dtype).t()
        if weights:
            x = x_TD.index_select(0, token_of_row[rows]).to(dtype)
            _linear(a.t(), d_row, None, d_w2[e])
            _linear(x.t(), d_h, None, d_w1[e])
            if b1_EH is not None:
                d_b1[e] = d_h.sum(dim=0)
            if b2_EO is not None:
                d_b2[e] = d_row.sum(dim=0)
        if w3_EDH is not None:
            d_u = d_a * act_h
            d_x.addmm_(d_u, w3_EDH[e].to(dtype).t())
            if weights:
                _linear(x.t(), d_u, None, d_w3[e])
                if b3_EH is not None:
                    d_b3[e] = d_u.sum(dim=0)
        d_xs_AD[rows] = d_x
    d_x_TD = segment_sum(d_xs_AD, token_offsets, row_of_assignment)
    return d_x_TD, d_gate_A, d_w1, d_b1, d_w3, d_b3, d_w2, d_b2


@grouped_ffn_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    d_rows_AO,
    h_AH,
    u_AH,
    x_TD,
    gate_A,
    expert_offsets,
    token_offsets,
    token_of_row,
    row_of_assignment,
    w1_EDH,
    b1_EH,
    w3_EDH,
    b3_EH,
    w2_EHO,
    b2_EO,
    activation,
    apply_gate,
    weights,
):
    def grad(p: Tensor | None) -> Tensor:
        return torch.empty_like(p) if weights and p is not None else x_TD.new_empty((0,), dtype=torch.float32)

    params = (w1_EDH, b1_EH, w3_EDH, b3_EH, w2_EHO, b2_EO)
    return x_TD.new_empty(x_TD.shape), torch.empty_like(gate_A), *(grad(p) for p in params)


def _ffn_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.activation, ctx.apply_gate, save = inputs
    assert save, "grouped_ffn keeps nothing for the backward unless save=True"
    ctx.save_for_backward(output[1], output[2], *tensors)


def _ffn_backward(ctx, d_rows_AO, d_h, d_u):  # type: ignore[no-untyped-def]
    params = ctx.saved_tensors[8:]
    weights = any(ctx.needs_input_grad[6:12])
    d_x, d_gate, *d_params = grouped_ffn_backward(
        d_rows_AO.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.apply_gate, weights
    )
    d_params = [d if weights and p is not None else None for p, d in zip(params, d_params, strict=True)]
    return d_x, d_gate, None, None, None, None, *d_params, None, None, None


grouped_ffn.register_autograd(_ffn_backward, setup_context=_ffn_context)


@torch.library.custom_op("dynmoe_tutel::grouped_linear", mutates_args=(), device_types="cpu")
def grouped_linear(rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, b_EO: Tensor | None) -> Tensor:
    """Each expert's linear map on its contiguous rows: rows [rows, D] to [rows, O]. For the unfused path."""
    dtype = _gemm_dtype(rows_AD.dtype)
    out_AO = rows_AD.new_empty((rows_AD.shape[0], w_EDO.shape[2]))
    for e, rows in _segments(expert_offsets):
        _linear(rows_AD[rows].to(dtype), w_EDO[e], None if b_EO is None else b_EO[e], out_AO[rows])
    return out_AO


@grouped_linear.register_fake
def _(rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, b_EO: Tensor | None) -> Tensor:
    return rows_AD.new_empty((rows_AD.shape[0], w_EDO.shape[2]))


@torch.library.custom_op("dynmoe_tutel::grouped_linear_backward", mutates_args=(), device_types="cpu")
def grouped_linear_backward(
    d_out_AO: Tensor, rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, b_EO: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, w and b (empty without b)."""
    dtype = _gemm_dtype(rows_AD.dtype)
    d_rows_AD = torch.empty_like(rows_AD)
    d_w = _zeroed_where_silent(w_EDO, expert_offsets)
    d_b = _zeroed_where_silent(b_EO, expert_offsets)
    for e, rows in _segments(expert_offsets):
        d_out = d_out_AO[rows].to(dtype)
        _linear(d_out, w_EDO[e].t(), None, d_rows_AD[rows])
        _linear(rows_AD[rows].to(dtype).t(), d_out, None, d_w[e])
        if b_EO is not None:
            d_b[e] = d_out.sum(dim=0)
    return d_rows_AD, d_w, d_b


@grouped_linear_backward.register_fake
def _(
    d_out_AO: Tensor, rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, b_EO: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_b = torch.empty_like(b_EO) if b_EO is not None else rows_AD.new_empty((0,), dtype=torch.float32)
    return torch.empty_like(rows_AD), torch.empty_like(w_EDO), d_b


def _linear_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx, d_out_AO):  # type: ignore[no-untyped-def]
    d_rows, d_w, d_b = grouped_linear_backward(d_out_AO.contiguous(), *ctx.saved_tensors)
    return d_rows, None, d_w, d_b if ctx.saved_tensors[3] is not None else None


grouped_linear.register_autograd(_linear_backward, setup_context=_linear_context)
