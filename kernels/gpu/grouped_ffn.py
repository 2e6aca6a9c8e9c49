"""Expert networks on ragged rows, forward and backward, from the products of `grouped_products`.

Forward:   up (gather, bias, activation)  ->  linear (bias, gate)
Backward:  activation_gradient  ->  gate gradient, weight gradients, bias gradients  ->  linear (tokens' rows)  ->  sum

For the backward only x, the pre-activations h (and u) and the index are kept, or without h where it is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grouped_gemm import Index
from .grouped_products import (
    activation_gradient,
    in_dtype,
    linear,
    token_rows,
    up,
    weight_gradient,
    weight_gradients,
)
from .row_sums import bias_gradient, row_gate_gradient
from .rows import segment_sum


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
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operation `grouped_ffn`."""
    index = Index(expert_offsets, token_offsets, token_of_row, row_of_assignment)
    x_TD = x_TD.contiguous()
    w1, w3, w2 = in_dtype(x_TD.dtype, w1_EDH, w3_EDH, w2_EHO)
    b1, b3, b2 = (None if b is None else b.contiguous() for b in (b1_EH, b3_EH, b2_EO))
    h_AH, u_AH, a_AH = up(x_TD, index, w1, b1, w3, b3, activation, save, True)
    rows_AO = linear(a_AH, w2, expert_offsets, bias_EN=b2, gate_A=gate_A if apply_gate else None)
    return rows_AO, h_AH, u_AH


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
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the operation `grouped_ffn_backward`."""
    index = Index(expert_offsets, token_offsets, token_of_row, row_of_assignment)
    x_TD = x_TD.contiguous()
    d_rows_AO = d_rows_AO.to(x_TD.dtype).contiguous()
    w1, w3, w2 = in_dtype(x_TD.dtype, w1_EDH, w3_EDH, w2_EHO)
    if h_AH.shape[0] != index.rows:
        b1, b3 = (None if b is None else b.contiguous() for b in (b1_EH, b3_EH))
        h_AH, u_AH, _ = up(x_TD, index, w1, b1, w3, b3, activation, True, False)
    gate = gate_A if apply_gate else None
    through = activation_gradient(
        d_rows_AO,
        index,
        w2,
        h_AH,
        u_AH if w3 is not None else None,
        gate,
        activation,
        from_tokens=False,
        weights=weights,
        biases=(weights and b1_EH is not None, weights and b3_EH is not None),
    )
    b2 = None if b2_EO is None else b2_EO.contiguous()
    d_gate_A = row_gate_gradient(through.d_gate_parts_AN, d_rows_AO, b2, expert_offsets, gate_A)
    grads = weight_gradients(
        through, x_TD, d_rows_AO, index, (w1_EDH, b1_EH, w3_EDH, b3_EH, w2_EHO), weights, from_tokens=False
    )
    d_b2 = x_TD.new_empty((0,), dtype=torch.float32)
    if weights and b2_EO is not None:
        d_b2 = bias_gradient(d_rows_AO, gate, index, b2_EO)
    d_x_TD = segment_sum(token_rows(through, w1, w3, expert_offsets), token_offsets, row_of_assignment)
    return d_x_TD.to(x_TD.dtype), d_gate_A, *grads, d_b2  # type: ignore[return-value]


def grouped_linear(
    rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, b_EO: Tensor | None, engine: str = "auto"
) -> Tensor:
    """As the operation `grouped_linear`."""
    (w,) = in_dtype(rows_AD.dtype, w_EDO)
    bias = None if b_EO is None else b_EO.contiguous()
    return linear(rows_AD.contiguous(), w, expert_offsets, bias_EN=bias, zero_tail=True)


def grouped_linear_backward(
    d_out_AO: Tensor,
    rows_AD: Tensor,
    expert_offsets: Tensor,
    w_EDO: Tensor,
    b_EO: Tensor | None,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operation `grouped_linear_backward`."""
    rows_AD, d_out_AO = rows_AD.contiguous(), d_out_AO.to(rows_AD.dtype).contiguous()
    (w,) = in_dtype(rows_AD.dtype, w_EDO)
    d_rows_AD = linear(d_out_AO, w.transpose(1, 2), expert_offsets, zero_tail=True)
    none = expert_offsets.new_empty((rows_AD.shape[0],))
    index = Index(expert_offsets, none, none, none)
    d_w = weight_gradient(rows_AD, d_out_AO, index, w_EDO)
    d_b = rows_AD.new_empty((0,), dtype=torch.float32)
    if b_EO is not None:
        d_b = bias_gradient(d_out_AO, None, index, b_EO)
    return d_rows_AD, d_w, d_b
