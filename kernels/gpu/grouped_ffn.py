"""Expert networks on ragged rows, forward and backward, built from the products of `gemm`.

Forward:   up (gather, bias, activation)  ->  linear (bias, gate)
Backward:  activation_gradient  ->  gate gradient, gradients of weights and biases  ->  linear (tokens' rows)  ->  sum

The backward needs x, the index and the pre-activations h (and u), which it recomputes if they were not saved.
"""

from __future__ import annotations

from torch import Tensor

from ..operands import ExpertWeights, Index
from .dispatch_combine import segment_sum
from .gemm import activation_gradient, in_dtype, linear, token_rows, up, weight_gradients
from .row_sums import row_gate_gradient
from .weight_gradient import weight_gradient


def grouped_ffn(
    x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights, activation: str, apply_gate: bool, save: bool,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x_TD, weights = x_TD.contiguous(), in_dtype(x_TD.dtype, weights)
    h_AH, u_AH, a_AH = up(x_TD, index, weights, activation, save, True)
    gate = gate_A if apply_gate else None
    return linear(a_AH, weights.w2_EHO, index.expert_offsets, bias_EN=weights.b2_EO, gate_A=gate), h_AH, u_AH


def grouped_ffn_backward(
    d_rows_AO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights,
    activation: str, apply_gate: bool, wanted: bool, engine: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    x_TD, d_rows_AO = x_TD.contiguous(), d_rows_AO.to(x_TD.dtype).contiguous()
    cast = in_dtype(x_TD.dtype, weights)
    if h_AH.shape[0] != index.rows:
        h_AH, u_AH, _ = up(x_TD, index, cast, activation, True, False)
    gate = gate_A if apply_gate else None
    through = activation_gradient(
        d_rows_AO, index, cast, h_AH, u_AH, gate, activation, from_tokens=False, wanted=wanted
    )
    d_gate_A = row_gate_gradient(through.d_gate_parts_AN, d_rows_AO, cast.b2_EO, index.expert_offsets, gate_A)
    grads = weight_gradients(through, x_TD, d_rows_AO, index, weights, wanted, gate, from_tokens=False)
    d_rows_AD = token_rows(through, cast.w1_EDH, cast.w3_EDH, index.expert_offsets)
    d_x_TD = segment_sum(d_rows_AD, index.token_offsets, index.row_of_assignment)
    return d_x_TD.to(x_TD.dtype), d_gate_A, *grads


def grouped_linear(
    rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, b_EO: Tensor | None, engine: str = "auto"
) -> Tensor:
    bias = None if b_EO is None else b_EO.contiguous()
    return linear(rows_AD.contiguous(), w_EDO.to(rows_AD.dtype), expert_offsets, bias_EN=bias, zero_tail=True)


def grouped_linear_backward(
    d_out_AO: Tensor,
    rows_AD: Tensor,
    expert_offsets: Tensor,
    w_EDO: Tensor,
    b_EO: Tensor | None,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    rows_AD, d_out_AO = rows_AD.contiguous(), d_out_AO.to(rows_AD.dtype).contiguous()
    d_rows_AD = linear(d_out_AO, w_EDO.to(rows_AD.dtype).transpose(1, 2), expert_offsets, zero_tail=True)
    none = expert_offsets.new_empty((rows_AD.shape[0],))
    index = Index(expert_offsets, none, none, none)
    d_w, d_b = weight_gradient(rows_AD, d_out_AO, index, w_EDO, b_EO)
    return d_rows_AD, d_w, d_b
