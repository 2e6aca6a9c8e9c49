"""Top-any experts, tokens to tokens, forward and backward; see `kernels.top_any_ffn`.

Forward:   up  ->  linear  ->  combine
Backward:  activation_gradient (from the tokens' gradient over k)  ->  weight and bias gradients  ->  linear  ->
           token_gradient  ->  gradient of the routing vectors
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import ExpertWeights, Index, Router
from .dispatch_combine import combine
from .gemm import activation_gradient, in_dtype, linear, token_rows, up, weight_gradients
from .router_gradient import direction_gradient, token_gradient, unit_vectors
from .score_gradient import unit_gradient


def top_any_ffn(
    x_TD: Tensor, router: Router, index: Index, weights: ExpertWeights, activation: str, centred: bool,
    dtype: torch.dtype, save: bool, engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, weights = x_TD.to(dtype).contiguous(), in_dtype(dtype, weights)
    h_AH, u_AH, a_AH = up(x, index, weights, activation, save, True)
    rows_AO = linear(a_AH, weights.w2_EHO, index.expert_offsets, bias_EN=weights.b2_EO)
    return combine(rows_AO, *index[1:], True), h_AH, u_AH


def top_any_ffn_backward(
    d_y_TO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, router: Router, index: Index, weights: ExpertWeights,
    activation: str, centred: bool, dtype: torch.dtype, wanted: bool, engine: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    x_TD = x_TD.contiguous()
    x, d_y, cast = x_TD.to(dtype), d_y_TO.to(dtype).contiguous(), in_dtype(dtype, weights)
    if h_AH.shape[0] != index.rows:
        h_AH, u_AH, _ = up(x, index, cast, activation, True, False)
    through = activation_gradient(d_y, index, cast, h_AH, u_AH, None, activation, from_tokens=True, wanted=wanted)
    grads = weight_gradients(through, x, d_y, index, weights, wanted, from_tokens=True)

    unit_ED, inv_norm_E = router.unit_ED, router.inv_norm_E
    if unit_ED is None or inv_norm_E is None:
        unit_ED, inv_norm_E = unit_vectors(router.w_DE)
    d_rows_AD = token_rows(through, cast.w1_EDH, cast.w3_EDH, index.expert_offsets)
    d_x_TD, d_score_TE, d_cos_TE = token_gradient(
        d_rows_AD, x_TD, d_y, cast.b2_EO, through.d_gate_parts_AN, router, index, unit_ED, centred
    )
    d_unit_CED, d_score_CE = unit_gradient(d_cos_TE, x_TD, router.inv_norm_T.contiguous(), d_score_TE)
    assert d_score_CE is not None
    d_w_DE, d_scale, d_thresholds_E = direction_gradient(
        d_unit_CED, unit_ED, inv_norm_E, router.scale, router.w_DE, (router.thresholds_E, d_score_CE)
    )
    return d_x_TD, d_w_DE, d_thresholds_E, d_scale, *grads
