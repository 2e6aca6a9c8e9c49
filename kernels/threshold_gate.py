"""Threshold gate: cosine scores, the experts each token activates, and the gradient of the scores.

Inputs:  x_TD tokens, w_DE routing vectors, threshold_E (G, before the sigmoid), scale [] (tau) or None (1)
         active_E: bool, or float and above one half where a slot is active
         token_mask_T bool or None: False for padding, which scores as a zero token, gets no expert, is not unrouted
         shift [] or None (cosine units, added to every threshold), max_k (0: no limit): the budget, see below
Outputs: score_TE = sigmoid(tau * cos(x_t, w_e)), bits_TW (the assignment as a bitmask, 64 experts a word),
         unrouted_T (no active expert passed), inv_norm_T (1 / ||x_t||, 0 for a zero token; for the backward),
         block_counts (assignments of each expert in each block of `block_tokens` tokens, int32; for `ragged_index`)

A token activates an expert if cos > G, compared before the sigmoid, which saturates. Arithmetic is fp32 (fp64 for fp64
tokens) whatever the dtype of the inputs. With `fallback`, an unrouted token gets the active expert of highest cosine.

With a budget a token activates an expert if cos > G + shift. A token that passes a threshold of its own (cos > G) and
none that is raised keeps its expert of largest margin cos - G, so a shift never unroutes a token. Of more than `max_k`
experts those of largest margin stay; of equal margins those of lower slots.

The cosine has no scale: tokens and vectors of any length count by their direction alone, see `norms`. Only a zero
vector has cosine 0 with all. A token shorter than 1e-30 (in fp32) passes no gradient, which might overflow.

A token that is not finite passes no threshold, but gets the first active expert with or without `fallback`: its output
must show the NaN. It is unrouted, has NaN for its inverse norm, and gives the router no gradient. An active expert
whose routing vector is not finite, or whose threshold is NaN, is activated by every token, so that the router's
gradients show it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .norms import scaled, scaled_rows
from .operands import active_slots, empty_as, expect_active
from .operation import expect, expect_matrix, operation, takes_numba
from .ragged_index import block_tokens, count_blocks, count_of_token, pack_bits, put_rows, without_expert, words

MODULES = {"triton": "gpu.threshold_gate"}
BACKWARD_MODULES = {"triton": "gpu.score_gradient"}


def gate_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 tokens, else fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def _check(
    x_TD: Tensor, w_DE: Tensor, threshold_E: Tensor, active_E: Tensor, scale: Tensor | None, fallback: bool,
    token_mask_T: Tensor | None = None, shift: Tensor | None = None, max_k: int = 0,
) -> None:  # fmt: skip
    expect_matrix("x_TD", x_TD, "[T, D]")
    expect_matrix("w_DE", w_DE, "[D, E]")
    (T, D), E = x_TD.shape, w_DE.shape[1]
    if E == 0:
        raise ValueError(f"w_DE must have a column an expert and at least one, got shape {list(w_DE.shape)}")
    expect("w_DE", w_DE, (D, E), "[D, E]")
    expect_matrix("threshold_E", threshold_E, "[E]", 1)
    expect("threshold_E", threshold_E, (E,), "[E]")
    expect_active(active_E, E)
    expect("token_mask_T", token_mask_T, (T,), "[T]", torch.bool)
    if scale is not None and (scale.numel() != 1 or not scale.is_floating_point()):
        raise ValueError(f"scale must be one number of a floating type, got {scale.dtype} {list(scale.shape)}")
    if shift is not None and (shift.numel() != 1 or not shift.is_floating_point()):
        raise ValueError(f"shift must be one number of a floating type, got {shift.dtype} {list(shift.shape)}")
    if max_k < 0:
        raise ValueError(f"max_k = {max_k}: give the largest number of experts a token, or 0 for no limit")


def _shapes(x_TD: Tensor, w_DE: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, E = x_TD.shape[0], w_DE.shape[1]
    dtype = gate_dtype(x_TD)
    return (
        x_TD.new_empty((T, E), dtype=dtype),
        x_TD.new_empty((T, words(E)), dtype=torch.int64),
        x_TD.new_empty((T,), dtype=torch.bool),
        x_TD.new_empty((T,), dtype=dtype),
        x_TD.new_empty((-(-T // block_tokens(E)) * E,), dtype=torch.int32),
    )


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    x_TD, w_DE, _, _, scale, *_ = inputs
    score_TE, _, _, inv_norm_T, _ = output
    ctx.save_for_backward(score_TE, x_TD, w_DE, inv_norm_T, scale)


def _backward(ctx: Any, d_score_TE: Tensor | None, *_: Any) -> tuple[Any, ...] | None:
    if d_score_TE is None:
        return None
    *saved, scale = ctx.saved_tensors
    d_x_TD, d_w_DE, d_scale = threshold_gate_backward(d_score_TE, *saved, scale)
    return d_x_TD, d_w_DE, None, None, None if scale is None else d_scale


@operation(check=_check, fake=_shapes, engines=MODULES, autocast=False, context=_context, backward=_backward)
def threshold_gate(
    x_TD: Tensor, w_DE: Tensor, threshold_E: Tensor, active_E: Tensor, scale: Tensor | None, fallback: bool,
    token_mask_T: Tensor | None = None, shift: Tensor | None = None, max_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores, bitmask, unrouted flags, inverse norms and block counts of T tokens; see the head of this file."""
    dtype, active_E = gate_dtype(x_TD), active_slots(active_E)
    tokens, vectors = scaled(x_TD.to(dtype), 1), scaled(w_DE.to(dtype), 0)
    inverse_T = tokens.inverse()
    inv_norm_T = tokens.own(inverse_T)
    unit_DE = vectors.vectors * vectors.inverse()
    cos_TE = F.linear(tokens.vectors, unit_DE.t().contiguous())  # [E, D]: twice as fast on a CPU with few experts
    threshold_E = threshold_E.to(dtype)
    own_E = threshold_E.masked_fill(~active_E, torch.inf)  # which no cosine exceeds
    limit_E = own_E if shift is None else own_E + shift.to(dtype)
    limit_E = limit_E.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    finite = tokens.factor is None and vectors.factor is None
    if tokens.factor is None and takes_numba(cos_TE) and vectors.ordinary_where(active_E):
        from .cpu.threshold_gate import decide

        budget = (max_k, shift is not None, fallback)
        bits_TW, unrouted_T, block_counts = decide(cos_TE, inverse_T, own_E, limit_E, active_E, token_mask_T, *budget)
        if token_mask_T is not None:
            inv_norm_T = inv_norm_T.masked_fill(~token_mask_T, 0)
        return _scores(cos_TE, scale), bits_TW, unrouted_T, inv_norm_T, block_counts
    cos_TE.mul_(inverse_T.unsqueeze(1))
    assigned_TE = _above(cos_TE, limit_E)
    if not finite:
        assigned_TE |= cos_TE.isnan()
        assigned_TE &= active_E
    if tokens.factor is not None:
        takes_all_E = threshold_E.isnan() | ~vectors.norm.isfinite()
        assigned_TE &= ~inverse_T.isnan().unsqueeze(1) | takes_all_E
    if token_mask_T is not None:
        assigned_TE &= token_mask_T.unsqueeze(1)
        cos_TE.masked_fill_(~token_mask_T.unsqueeze(1), 0)
        inv_norm_T = inv_norm_T.masked_fill(~token_mask_T, 0)
    if 0 < max_k < assigned_TE.shape[1]:
        count_T = count_of_token(assigned_TE)
        unrouted_T = count_T == 0
        _cap(assigned_TE, count_T, cos_TE, own_E, 0.0 if shift is None else float(shift), max_k)
    else:
        unrouted_T = without_expert(assigned_TE)
    if token_mask_T is not None:
        unrouted_T &= token_mask_T
    if shift is not None:
        _keep_best(unrouted_T, assigned_TE, cos_TE, own_E, finite)
    if fallback:
        lost_T = unrouted_T.nonzero().squeeze(1)
        best_T = cos_TE[lost_T].masked_fill_(~active_E, -torch.inf).argmax(dim=1)
        assigned_TE[lost_T, best_T] = True
    elif tokens.factor is not None:
        first_E = active_E & (active_E.cumsum(0) == 1)
        assigned_TE |= (unrouted_T & inv_norm_T.isnan()).unsqueeze(1) & first_E
    return _scores(cos_TE, scale), pack_bits(assigned_TE), unrouted_T, inv_norm_T, count_blocks(assigned_TE)


def _scores(cos_TE: Tensor, scale: Tensor | None) -> Tensor:
    """sigmoid(scale * cos), in place."""
    if takes_numba(cos_TE):
        from .cpu.threshold_gate import sigmoid_

        return sigmoid_(cos_TE, scale)
    return (cos_TE if scale is None else cos_TE.mul_(scale.to(cos_TE.dtype))).sigmoid_()


def _above(values_NE: Tensor, limit_E: Tensor) -> Tensor:
    """Whether values exceed their limit, [N, E] bool.

    On a CPU a comparison that gives floats uses vector instructions, and takes a quarter of the time of one that gives
    bools.
    """
    return torch.gt(values_NE, limit_E, out=torch.empty_like(values_NE)).bool()


def _keep_best(unrouted_T: Tensor, assigned_TE: Tensor, cos_TE: Tensor, threshold_E: Tensor, finite: bool) -> None:
    """Unrouted tokens that pass a threshold of their own get the expert of largest margin, in place.

    `finite`: no cosine is NaN. These are few operations rather than little work: in a gate, whose tokens fill the
    caches, the first call of an operation takes some 5 us beside its work.
    """
    token_N = unrouted_T.nonzero().squeeze(1)
    margin_NE = cos_TE.index_select(0, token_N).sub_(threshold_E)
    if not finite:  # a slot that holds no expert may have any vector
        margin_NE.masked_fill_(threshold_E == torch.inf, -torch.inf)
    best_N, slot_N = margin_NE.max(dim=1)
    own_N = best_N > 0
    assigned_TE.view(-1).index_copy_(0, slot_N.add_(token_N, alpha=assigned_TE.shape[1]), own_N)
    unrouted_T.index_copy_(0, token_N, own_N.logical_not_())


def _cap(assigned_TE: Tensor, count_T: Tensor, cos_TE: Tensor, threshold_E: Tensor, shift: float, max_k: int) -> None:
    """Of a token's assignments keep the `max_k` of largest margin, of equal margins those of lower slots, in place."""
    token_N = (count_T > max_k).nonzero().squeeze(1)
    if not token_N.numel():
        return
    margin_NE = cos_TE.index_select(0, token_N).sub_(threshold_E)
    limit_N1, least = _largest(margin_NE, max_k)
    kept_NE = torch.ge(margin_NE, limit_N1, out=torch.empty_like(margin_NE)).bool()
    # Other slots have no larger margin than the shift but for rounding. So far above it, only assignments are kept.
    clear = shift + 4 * torch.finfo(margin_NE.dtype).eps * (1 + abs(shift))
    found = int(kept_NE.count_nonzero()) == max_k * len(token_N)  # more, if some are equal
    if not (found and float(least) > clear):  # as a NaN is not
        kept_NE = _first(assigned_TE.index_select(0, token_N), margin_NE, max_k)
    put_rows(assigned_TE, token_N, kept_NE)


def _first(assigned_NE: Tensor, margin_NE: Tensor, n: int) -> Tensor:
    """The `n` assignments of largest margin by a stable sort, [N, E] bool; NaN is the largest."""
    margin_NE = torch.where(assigned_NE, margin_NE.nan_to_num(torch.inf), -torch.inf)  # what takes all stays
    order_NE = margin_NE.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(assigned_NE).scatter_(1, order_NE[:, :n], True)


def _largest(margin_NE: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n-th largest of each row, [N, 1], and the least of all rows, [], NaN if there is a NaN.

    The n-th may be too small for a row in which some are equal, too large where one is inf. On a CPU `topk` is the
    faster way for few rows, and takes up to ten times as long for many.
    """
    if n > 16 or margin_NE.numel() <= 2048:
        value_Nn = margin_NE.topk(n, dim=1).values
        return value_Nn[:, -1:], value_Nn.amin()
    huge = torch.finfo(margin_NE.dtype).max
    limit_N1 = margin_NE.amax(dim=1, keepdim=True)
    rest_NE, reached_NE = margin_NE, torch.empty_like(margin_NE)
    for _ in range(n - 1):
        rest_NE = rest_NE.sub(torch.ge(rest_NE, limit_N1, out=reached_NE), alpha=huge)
        limit_N1 = rest_NE.amax(dim=1, keepdim=True)
    return limit_N1, limit_N1.amin()


def _backward_shapes(
    d_score_TE: Tensor, score_TE: Tensor, x_TD: Tensor, w_DE: Tensor, inv_norm_T: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), w_DE.new_empty(w_DE.shape), empty_as(scale, x_TD)


@operation(fake=_backward_shapes, engines=BACKWARD_MODULES, autocast=False)
def threshold_gate_backward(
    d_score_TE: Tensor, score_TE: Tensor, x_TD: Tensor, w_DE: Tensor, inv_norm_T: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, D], w [D, E] and scale [], which is empty without a scale.

    With x^, w^ the unit vectors and dcos = ds * s * (1 - s) * tau:  g = dcos w^T,  dx = (g - x^ <g, x^>) / ||x||,
    dw^ = x^T dcos,  dw = (dw^ - w^ <w^, dw^>) / ||w||,  dtau = sum_e <w^_e, dw^_e> / tau.
    """
    dtype = score_TE.dtype
    x, inverse_T, factor_T = scaled_rows(x_TD.to(dtype), inv_norm_T)
    vectors = scaled(w_DE.to(dtype), 0)
    inverse_E = vectors.inverse()
    unit_DE, inv_norm_E = vectors.vectors * inverse_E, vectors.own(inverse_E)
    if vectors.factor is not None:
        # a vector that is not finite counts as zero: an inactive slot must not count, an active one has NaN in d_cos
        unit_DE, inv_norm_E = unit_DE.masked_fill(inv_norm_E.isnan(), 0), inv_norm_E.nan_to_num(0)
    over_norm_T = inverse_T if scale is None else scale.to(dtype) * inverse_T
    d_cos_TE = (1 - score_TE).mul_(score_TE).mul_(d_score_TE).mul_(over_norm_T.unsqueeze(1))  # divided by ||x||
    d_cos_TE.masked_fill_(d_score_TE == 0, 0)

    d_unit_DE = (d_cos_TE.t() @ x).t().contiguous()  # on a CPU with few experts, six times as fast as x^T @ d_cos
    radial_E = (unit_DE * d_unit_DE).sum(dim=0)
    d_w_DE = (d_unit_DE - unit_DE * radial_E) * inv_norm_E
    d_scale = empty_as(scale, x_TD) if scale is None else (radial_E.sum() / scale.to(dtype)).to(scale.dtype)

    d_x_TD = d_cos_TE @ unit_DE.t()
    radial_T = torch.linalg.vecdot(d_x_TD, x).mul_(inverse_T.square())
    d_x_TD.addcmul_(x, radial_T.unsqueeze(1), value=-1)
    if factor_T is not None:
        d_x_TD *= factor_T.unsqueeze(1)
    return d_x_TD.to(x_TD.dtype), d_w_DE.to(w_DE.dtype), d_scale
