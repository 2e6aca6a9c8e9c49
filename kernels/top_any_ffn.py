"""Top-any experts, tokens to tokens: the expert networks, their mean, and in one backward what the router learns.

    y_t = mean over the experts of token t of expert(x_t), 0 without an expert

The same function as `row_gates`, `grouped_ffn` and `combine` after each other. As one operation it hands the experts'
rows to nobody, and a token's gradient is written once: the sum over its rows and the router's part of it,

    ds[t, e] = <dy_t, expert_e(x_t)> / k_t  (minus their mean, `centred`),  0 for a token that no threshold admitted
    dx_t += ds * s (1 - s) tau * d cos(x_t, w_e) / dx_t

The gradient of the thresholds G, `thresholds_E`, is minus that of the scores, through theta = sigmoid(tau G).
`score_TE` and what else `threshold_gate` gave are constants here: a loss on the scores themselves goes back through
`threshold_gate`, and the two gradients add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import checked, expect, expect_experts, expect_index
from .engine import on_gpu
from .grouped_ffn import grouped_ffn, grouped_ffn_backward
from .rows import combine, combine_backward, row_gates_backward
from .threshold_gate import threshold_gate_backward

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(x_TD, w_DE, thresholds_E, scale, score_TE, inv_norm_T, unrouted_T, bits_TW, *args) -> None:  # type: ignore[no-untyped-def]
    E, T = expect_experts(x_TD, args[4:10], args[10]), x_TD.shape[0]
    expect_index(T, E, args[:4])
    expect("w_DE", w_DE, (x_TD.shape[1], E), "[D, E]")
    expect("thresholds_E", thresholds_E, (E,), "[E]")
    if scale.numel() != 1:
        raise ValueError(f"scale must be one number, got shape {list(scale.shape)}")
    expect("score_TE", score_TE, (T, E), "[T, E]")
    expect("inv_norm_T", inv_norm_T, (T,), "[T]")
    expect("unrouted_T", unrouted_T, (T,), "[T]", torch.bool)
    expect("bits_TW", bits_TW, (T, -(-E // 64)), "[T, W], 64 experts a word,", torch.int64)
    if args[12] not in DTYPES:
        raise ValueError(f"dtype = {args[12]}: allowed are {', '.join(str(dtype) for dtype in DTYPES)}")


@torch.library.custom_op("dynmoe_tutel::top_any_ffn", mutates_args=())
@checked(_check)
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
    """Tokens [T, O] in `dtype`, that of the products; h and u [rows, H] for the backward, empty unless `save`."""
    index = (expert_offsets, token_offsets, token_of_row, row_of_assignment)
    gate_A = score_TE.new_empty((token_of_row.shape[0],))  # not applied
    params = (w1_EDH, b1_EH, w3_EDH, b3_EH, w2_EHO, b2_EO)
    rows_AO, h_AH, u_AH = grouped_ffn(x_TD.to(dtype), gate_A, *index, *params, activation, False, save, engine)
    return combine(rows_AO, *index[1:], True), h_AH, u_AH


@top_any_ffn.register_fake
def _(  # type: ignore[no-untyped-def]
    x_TD,
    w_DE,
    thresholds_E,
    scale,
    score_TE,
    inv_norm_T,
    unrouted_T,
    bits_TW,
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
    centred,
    dtype,
    save,
    engine="auto",
):
    R, H = token_of_row.shape[0], w1_EDH.shape[2]
    return (
        x_TD.new_empty((x_TD.shape[0], w2_EHO.shape[2]), dtype=dtype),
        x_TD.new_empty((R if save else 0, H), dtype=dtype),
        x_TD.new_empty((R if save and w3_EDH is not None else 0, H), dtype=dtype),
    )


@torch.library.custom_op("dynmoe_tutel::top_any_ffn_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w, thresholds, scale, w1, b1, w3, b3, w2, b2; the last six empty unless `weights`."""
    index = (expert_offsets, token_offsets, token_of_row, row_of_assignment)
    gate_A = score_TE.new_empty((token_of_row.shape[0],))
    params = (w1_EDH, b1_EH, w3_EDH, b3_EH, w2_EHO, b2_EO)
    d_rows_AO = combine_backward(d_y_TO.to(dtype), token_offsets, token_of_row, True)
    d_x_TD, d_gate_A, *grads = grouped_ffn_backward(
        d_rows_AO, h_AH, u_AH, x_TD.to(dtype), gate_A, *index, *params, activation, False, weights, engine
    )
    d_score_TE = row_gates_backward(d_gate_A, unrouted_T, *index, True, centred)
    through_gate_TD, d_w_DE, d_scale = threshold_gate_backward(d_score_TE, score_TE, x_TD, w_DE, inv_norm_T, scale)
    # theta = sigmoid(tau G): d theta / dG = theta (1 - theta) tau, d theta / dtau = theta (1 - theta) G
    G_E, tau = thresholds_E.to(score_TE.dtype), scale.to(score_TE.dtype)
    theta_E = torch.sigmoid(tau * G_E)
    d_theta_E = d_score_TE.sum(dim=0).neg_()
    silent_E = d_theta_E == 0  # an inactive slot may hold NaN
    through_theta_E = (d_theta_E * theta_E * (1 - theta_E)).masked_fill_(silent_E, 0)
    d_thresholds_E = (through_theta_E * tau).to(thresholds_E.dtype)
    d_scale = d_scale + (through_theta_E * G_E).masked_fill_(silent_E, 0).sum().to(scale.dtype)
    return d_x_TD.to(x_TD.dtype) + through_gate_TD, d_w_DE, d_thresholds_E, d_scale, *grads


@top_any_ffn_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    d_y_TO,
    h_AH,
    u_AH,
    x_TD,
    w_DE,
    thresholds_E,
    scale,
    score_TE,
    inv_norm_T,
    unrouted_T,
    bits_TW,
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
    centred,
    dtype,
    weights,
    engine="auto",
):
    def grad(p: Tensor | None) -> Tensor:
        return torch.empty_like(p) if weights and p is not None else x_TD.new_empty((0,), dtype=torch.float32)

    params = (w1_EDH, b1_EH, w3_EDH, b3_EH, w2_EHO, b2_EO)
    router = (w_DE.new_empty(w_DE.shape), torch.empty_like(thresholds_E), torch.empty_like(scale))
    return x_TD.new_empty(x_TD.shape), *router, *(grad(p) for p in params)


def _context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    *tensors, ctx.activation, ctx.centred, ctx.dtype, _, ctx.engine = inputs
    ctx.save_for_backward(output[1], output[2], *tensors)


def _backward(ctx, d_y_TO, d_h, d_u):  # type: ignore[no-untyped-def]
    if d_y_TO is None:
        return (None,) * 23
    saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor only once
    params = saved[14:]
    weights = any(ctx.needs_input_grad[12:18])
    d_x, d_w, d_thresholds, d_scale, *d_params = top_any_ffn_backward(
        d_y_TO.contiguous(), *saved, ctx.activation, ctx.centred, ctx.dtype, weights, ctx.engine
    )
    d_params = [d if weights and p is not None else None for p, d in zip(params, d_params, strict=True)]
    return d_x, d_w, d_thresholds, d_scale, *(None,) * 8, *d_params, *(None,) * 5


top_any_ffn.register_autograd(_backward, setup_context=_context)
on_gpu(top_any_ffn, "top_any_ffn")
on_gpu(top_any_ffn_backward, "top_any_ffn")
