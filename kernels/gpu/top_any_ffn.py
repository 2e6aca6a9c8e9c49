"""Top-any experts, tokens to tokens, forward and backward; see `kernels.top_any_ffn`.

Forward:   up  ->  linear  ->  combine
Backward:  activation_gradient (from the tokens' gradient, over k)  ->  weight and bias gradients  ->  linear  ->
           token_gradient  ->  the routing vectors' gradient
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grouped_gemm import Index
from .grouped_products import activation_gradient, in_dtype, linear, token_rows, up, weight_gradients
from .router_gradient import direction_gradient, token_gradient, unit_vectors
from .row_sums import bias_gradient
from .rows import combine
from .threshold_gate import unit_gradient


def top_any_ffn(
    x_TD: Tensor,
    w_DE: Tensor,
    thresholds_E: Tensor,
    scale: Tensor,
    score_TE: Tensor,
    inv_norm_T: Tensor,
    unrouted_T: Tensor,
    bits_TW: Tensor,
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
    centred: bool,
    dtype: torch.dtype,
    save: bool,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operation `top_any_ffn`."""
    index = Index(expert_offsets, token_offsets, token_of_row, row_of_assignment)
    x = x_TD.to(dtype).contiguous()
    w1, w3, w2 = in_dtype(dtype, w1_EDH, w3_EDH, w2_EHO)
    b1, b3, b2 = (None if b is None else b.contiguous() for b in (b1_EH, b3_EH, b2_EO))
    h_AH, u_AH, a_AH = up(x, index, w1, b1, w3, b3, activation, save, True)
    rows_AO = linear(a_AH, w2, expert_offsets, bias_EN=b2)
    return combine(rows_AO, token_offsets, token_of_row, row_of_assignment, True), h_AH, u_AH


def top_any_ffn_backward(
    d_y_TO: Tensor,
    h_AH: Tensor,
    u_AH: Tensor,
    x_TD: Tensor,
    w_DE: Tensor,
    thresholds_E: Tensor,
    scale: Tensor,
    score_TE: Tensor,
    inv_norm_T: Tensor,
    unrouted_T: Tensor,
    bits_TW: Tensor,
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
    centred: bool,
    dtype: torch.dtype,
    weights: bool,
    engine: str = "auto",
) -> tuple[Tensor, ...]:
    """As the operation `top_any_ffn_backward`."""
    index = Index(expert_offsets, token_offsets, token_of_row, row_of_assignment)
    x_TD = x_TD.contiguous()
    x, d_y = x_TD.to(dtype), d_y_TO.to(dtype).contiguous()
    w1, w3, w2 = in_dtype(dtype, w1_EDH, w3_EDH, w2_EHO)
    b1, b3, b2 = (None if b is None else b.contiguous() for b in (b1_EH, b3_EH, b2_EO))
    if h_AH.shape[0] != index.rows:
        h_AH, u_AH, _ = up(x, index, w1, b1, w3, b3, activation, True, False)
    through = activation_gradient(
        d_y,
        index,
        w2,
        h_AH,
        u_AH if w3 is not None else None,
        None,
        activation,
        from_tokens=True,
        weights=weights,
        biases=(weights and b1 is not None, weights and b3 is not None),
    )
    grads = weight_gradients(through, x, d_y, index, (w1_EDH, b1_EH, w3_EDH, b3_EH, w2_EHO), weights, from_tokens=True)
    d_b2 = x.new_empty((0,), dtype=torch.float32)
    if weights and b2_EO is not None:
        d_b2 = bias_gradient(d_y, None, index, b2_EO, from_tokens=True)

    unit_ED, inv_norm_E = unit_vectors(w_DE, finite=True)
    d_x_TD, d_score_TE, d_cos_TE = token_gradient(
        token_rows(through, w1, w3, expert_offsets),
        x_TD,
        d_y,
        b2,
        through.d_gate_parts_AN,
        score_TE,
        inv_norm_T,
        unrouted_T,
        bits_TW,
        unit_ED,
        scale,
        token_offsets,
        row_of_assignment,
        centred,
    )
    thresholds = (thresholds_E, d_score_TE.sum(dim=0))
    d_w_DE, d_scale, d_thresholds_E = direction_gradient(
        unit_gradient(d_cos_TE, x_TD), unit_ED, inv_norm_E, scale, w_DE, thresholds
    )
    return d_x_TD, d_w_DE, d_thresholds_E, d_scale, *grads, d_b2
