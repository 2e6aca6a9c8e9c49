"""Top-any experts, tokens to tokens: the expert networks, their mean, and one backward that includes the router.

    y_t = mean over the experts of token t of expert(x_t), 0 without an expert

It computes the same as `row_gates`, `grouped_ffn` and `combine` in turn. As one operation it keeps the experts' rows
internal and writes a token's gradient once: the sum over its rows plus the router's part,

    ds[t, e] = <dy_t, expert_e(x_t)> / k_t  (minus their mean if `centred`),  0 for an unrouted token
    dx_t += ds * s (1 - s) tau * d cos(x_t, w_e) / dx_t

The gradient of the thresholds G (`thresholds_E`) is the negated gradient of the scores, through theta = sigmoid(tau G).
The outputs of `threshold_gate`, `score_TE` among them, are constants here: the gradient of a loss on the scores goes
through `threshold_gate`, and autograd adds the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch_combine import combine, combine_backward, row_gates_backward
from .grouped_ffn import grouped_ffn, grouped_ffn_backward
from .operands import ExpertWeights, Index, Router, empty_as
from .operation import keep, kept, operation
from .threshold_gate import threshold_gate_backward

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODULES = {"triton": "gpu.top_any_ffn", "numba": "cpu.top_any_ffn"}


def _check(
    x_TD: Tensor,
    router: Router,
    index: Index,
    weights: ExpertWeights,
    activation: str,
    centred: bool,
    dtype: Any,
    *_: Any,
) -> None:
    E = weights.check(x_TD, activation)
    index.check(x_TD.shape[0], E)
    router.check(x_TD, E)
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype}: allowed are {', '.join(str(dtype) for dtype in DTYPES)}")


def _shapes(
    x_TD: Tensor, router: Router, index: Index, weights: ExpertWeights, activation: str, centred: bool,
    dtype: torch.dtype, save: bool, engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x_TD = x_TD.new_empty(x_TD.shape, dtype=dtype)
    y_TO = x_TD.new_empty((x_TD.shape[0], weights.w2_EHO.shape[2]))
    return y_TO, *weights.pre_activations(x_TD, index.rows if save else 0)


def _backward_shapes(
    d_y_TO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, router: Router, index: Index, weights: ExpertWeights,
    activation: str, centred: bool, dtype: torch.dtype, wanted: bool, engine: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    w_DE, thresholds_E, scale, *_ = router
    d_router = w_DE.new_empty(w_DE.shape), torch.empty_like(thresholds_E), empty_as(scale, x_TD)
    return x_TD.new_empty(x_TD.shape), *d_router, *weights.gradients(wanted)


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    x_TD, router, index, weights, ctx.activation, ctx.centred, ctx.dtype, _, ctx.engine = inputs
    keep(ctx, *output[1:], x_TD, router, index, weights)


def _backward(ctx: Any, d_y_TO: Tensor | None, *_: Any) -> tuple[Any, ...] | None:
    if d_y_TO is None:
        return None
    *kept_rows, x_TD, router, index, weights = kept(ctx)
    wanted = ctx.wanted["weights"]
    options = (ctx.activation, ctx.centred, ctx.dtype, wanted, ctx.engine)
    d_x_TD, d_w_DE, d_thresholds_E, d_scale, *d_weights = top_any_ffn_backward(
        d_y_TO.contiguous(), *kept_rows, x_TD, router, index, weights, *options
    )
    return d_x_TD, (d_w_DE, d_thresholds_E, d_scale), None, d_weights if wanted else None


@operation(check=_check, fake=_shapes, engines=MODULES, autocast=False, context=_context, backward=_backward)
def top_any_ffn(
    x_TD: Tensor, router: Router, index: Index, weights: ExpertWeights, activation: str, centred: bool,
    dtype: torch.dtype, save: bool, engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Tokens [T, O] in `dtype`, the dtype of the products; h and u [rows, H] for the backward, empty unless `save`."""
    gate_A = router.score_TE.new_empty((index.rows,))  # not applied
    rows_AO, h_AH, u_AH = grouped_ffn(x_TD.to(dtype), gate_A, index, weights, activation, False, save, engine)
    return combine(rows_AO, *index[1:], True), h_AH, u_AH


@operation(fake=_backward_shapes, engines=MODULES, autocast=False)
def top_any_ffn_backward(
    d_y_TO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, router: Router, index: Index, weights: ExpertWeights,
    activation: str, centred: bool, dtype: torch.dtype, wanted: bool, engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w, thresholds, scale, w1, b1, w3, b3, w2, b2; the experts' are empty unless `wanted`."""
    w_DE, _, scale, score_TE, inv_norm_T, unrouted_T, *_ = router
    gate_A = score_TE.new_empty((index.rows,))
    d_rows_AO = combine_backward(d_y_TO.to(dtype), index.token_offsets, index.token_of_row, True)
    d_x_TD, d_gate_A, *grads = grouped_ffn_backward(
        d_rows_AO, h_AH, u_AH, x_TD.to(dtype), gate_A, index, weights, activation, False, wanted, engine
    )
    d_score_TE = row_gates_backward(d_gate_A, unrouted_T, index, True, centred)
    through_gate_TD, d_w_DE, d_scale = threshold_gate_backward(d_score_TE, score_TE, x_TD, w_DE, inv_norm_T, scale)
    d_thresholds_E, of_thresholds = threshold_gradients(d_score_TE.sum(dim=0).neg_(), router)
    return d_x_TD.to(x_TD.dtype) + through_gate_TD, d_w_DE, d_thresholds_E, d_scale + of_thresholds, *grads


def threshold_gradients(d_theta_E: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Gradients of the thresholds G [E] and of the scale [], given that of theta = sigmoid(tau G).

    d theta / dG = theta (1 - theta) tau, d theta / dtau = theta (1 - theta) G. Empty for no scale.
    """
    G_E, scale = router.thresholds_E.to(d_theta_E.dtype), router.scale
    tau = 1 if scale is None else scale.to(d_theta_E.dtype)
    theta_E = torch.sigmoid(tau * G_E)
    silent_E = d_theta_E == 0  # an inactive slot may hold NaN
    through_theta_E = (d_theta_E * theta_E * (1 - theta_E)).masked_fill_(silent_E, 0)
    d_thresholds_E = (through_theta_E * tau).to(router.thresholds_E.dtype)
    if scale is None:
        return d_thresholds_E, empty_as(None, d_theta_E)
    return d_thresholds_E, (through_theta_E * G_E).masked_fill_(silent_E, 0).sum().to(scale.dtype)
