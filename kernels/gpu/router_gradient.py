"""The router's gradient from the experts of a top-any gate, in one pass over the tokens.

ds[t, e] = sum of the partial sums of the assignment's row + <dy_t, b2_e>, over k_t, minus their mean if CENTRED
dcos[t, e] = ds s (1 - s) tau / ||x_t||
dx_t = sum over its rows of d_rows + g - x_t <g, x_t> / ||x_t||^2,   g = sum_e dcos[t, e] w_e / ||w_e||
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Index, Router, empty_as
from .launch import kernel
from .norms import factor_for, factor_of_inverse, inverse_of, own_inverse, tau_of
from .sizes import block_experts, power_of_two

CHUNK_ELEMENTS = 8192  # a tile of chunks by columns, 32 registers a thread


@triton.jit
def _column_norm(w, e, factor, D, stride_d, stride_e, BLOCK_D: tl.constexpr):
    """||factor w[:, e]||."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        v = tl.load(w + e * stride_e + d * stride_d, mask=d < D, other=0.0).to(tl.float32) * factor
        total += v * v
    return tl.sqrt_rn(tl.sum(total, axis=0))


@kernel
def unit_vectors_kernel(w, unit, inv_norm, D, stride_d, stride_e, BLOCK_D: tl.constexpr):
    """unit[e] = w[:, e] / ||w[:, e]||, 0 for a vector that is zero or not finite.

    In: [D, E]. Out: [E, D], [E], fp32. Grid: E.
    """
    e = tl.program_id(0).to(tl.int64)
    norm = _column_norm(w, e, 1.0, D, stride_d, stride_e, BLOCK_D)
    factor = factor_for(norm)
    if factor != 1.0:
        norm = _column_norm(w, e, factor, D, stride_d, stride_e, BLOCK_D)
    inverse = inverse_of(norm)
    inverse = tl.where(inverse == inverse, inverse, 0.0)
    tl.store(inv_norm + e, own_inverse(inverse, factor))
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        v = tl.load(w + e * stride_e + d * stride_d, mask=d < D, other=0.0).to(tl.float32)
        u = tl.where(inverse > 0, v * factor * inverse, 0.0)
        tl.store(unit + e * D + d, u, mask=d < D)


@kernel
def direction_gradient_kernel(
    d_unit, unit, inv_norm, d_scores, thresholds, scale, d_w, d_thresholds, d_scale, CHUNKS, D, stride_d, stride_e,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a slot's w[:, e] and threshold G (unless None), and its share of the scale's gradient.

    The cosines give the scale <unit, d_unit> / tau; theta = sigmoid(tau G) has the gradient -d_scores[e].
    In: unit [E, D] and inv_norm [E] fp32, NaN counts as 0; the chunks of d_unit [CHUNKS, E, D] and of d_scores
    [CHUNKS, E] fp32, which are added in order; thresholds [E], scale [] or None
    Out: d_w [D, E], d_thresholds [E], d_scale [E] unless None. Grid: E. Bytes: d_unit and d_scores once.
    """
    e, E = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    c, d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    in_D = d < D
    g = tl.zeros((BLOCK_D,), tl.float32)
    for c0 in range(0, CHUNKS, BLOCK_C):
        at = d_unit + ((c0 + c) * E + e)[:, None] * D + d[None, :]
        g += tl.sum(tl.load(at, mask=(c0 + c < CHUNKS)[:, None] & in_D[None, :], other=0.0), axis=0)
    u = tl.load(unit + e * D + d, mask=in_D, other=0.0)
    u = tl.where(u == u, u, 0.0)
    radial = tl.sum(u * g, axis=0)
    tau = tau_of(scale)
    from_scale = radial / tau
    if thresholds is not None:
        s = tl.arange(0, BLOCK_S)
        sums = tl.zeros((BLOCK_S,), tl.float32)
        for s0 in range(0, CHUNKS, BLOCK_S):
            sums += tl.load(d_scores + (s0 + s) * E + e, mask=s0 + s < CHUNKS, other=0.0)
        d_theta = -tl.sum(sums, axis=0)
        G = tl.load(thresholds + e).to(tl.float32)
        theta = tl.sigmoid(tau * G)
        through_theta = tl.where(d_theta == 0, 0.0, d_theta * theta * (1.0 - theta))
        tl.store(d_thresholds + e, (through_theta * tau).to(d_thresholds.dtype.element_ty))
        from_scale += tl.where(d_theta == 0, 0.0, through_theta * G)
    if scale is not None:
        tl.store(d_scale + e, from_scale)
    inverse = tl.load(inv_norm + e)
    inverse = tl.where(inverse == inverse, inverse, 0.0)
    g = (g - u * radial) * inverse
    tl.store(d_w + e * stride_e + d.to(tl.int64) * stride_d, g.to(d_w.dtype.element_ty), mask=in_D)


@kernel
def token_gradient_kernel(
    d_rows, x, d_y, b2, parts, score, inv_norm, unrouted, bits, unit, scale, token_offsets, row_of_assignment,
    d_x, d_score, d_cos,
    D, O, E, W, TILES_N, stride_xt, stride_yt,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The formulas at the head of this file, for one token.

    In: d_rows [R, D], x [T, D], d_y [T, O], b2 [E, O], parts [R, TILES_N], score [T, E], bits [T, W], unit [E, D]
    Out: d_x [T, D], d_score and d_cos [T, E], 0 outside assignments
    Grid: T. Bytes: d_rows, x, d_y, parts and score once, unit and b2 from L2, the outputs once.
    """
    t = tl.program_id(0).to(tl.int64)
    start = tl.load(token_offsets + t)
    k = tl.load(token_offsets + t + 1) - start
    e = tl.arange(0, BLOCK_E)
    in_E = e < E
    word = tl.load(bits + t * W + e // 64, mask=in_E, other=0)
    assigned = ((word >> (e % 64).to(tl.int64)) & 1).to(tl.int32)
    place = tl.cumsum(assigned, axis=0) - assigned
    assigned = (assigned > 0) & (place < k)  # fewer than the bits say if the rows were cut off
    row = tl.load(row_of_assignment + start + place, mask=assigned, other=0).to(tl.int64)

    ds = tl.zeros((BLOCK_E,), tl.float32)
    for n0 in range(0, TILES_N, BLOCK_T):
        n = n0 + tl.arange(0, BLOCK_T)
        part = tl.load(
            parts + row[:, None] * TILES_N + n[None, :], mask=assigned[:, None] & (n < TILES_N)[None, :], other=0.0
        )
        ds += tl.sum(part, axis=1)
    if BIAS:
        o = tl.arange(0, BLOCK_O)
        dy = tl.load(d_y + t * stride_yt + o, mask=o < O, other=0.0).to(tl.float32)
        for j in range(k):
            here = assigned & (place == j)
            expert = tl.sum(tl.where(here, e, 0), axis=0).to(tl.int64)
            bias = tl.load(b2 + expert * O + o, mask=o < O, other=0.0).to(tl.float32)
            ds += tl.where(here, tl.sum(dy * bias, axis=0), 0.0)
    count = tl.maximum(k, 1).to(tl.float32)
    ds = ds / count
    if CENTRED:
        ds -= tl.sum(ds, axis=0) / count
    ds = tl.where(assigned & (tl.load(unrouted + t) == 0), ds, 0.0)
    tl.store(d_score + t * E + e, ds, mask=in_E)
    s = tl.load(score + t * E + e, mask=in_E, other=0.0)
    inverse = tl.load(inv_norm + t)
    dcos = ds * s * (1.0 - s) * (tau_of(scale) * inverse)
    dcos = tl.where(ds == 0, 0.0, dcos)  # the score of an inactive slot may be NaN
    tl.store(d_cos + t * E + e, dcos, mask=in_E)

    d = tl.arange(0, BLOCK_D)
    in_D = d < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    g = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, k, UNROLL):
        for i in tl.static_range(UNROLL):  # so that several loads are in flight
            here = assigned & (place == first + i)
            mask = in_D & (first + i < k)
            expert = tl.sum(tl.where(here, e, 0), axis=0).to(tl.int64)
            r = tl.sum(tl.where(here, row, 0), axis=0)
            total += tl.load(d_rows + r * D + d, mask=mask, other=0.0).to(tl.float32)
            weight = tl.sum(tl.where(here, dcos, 0.0), axis=0)
            direction = tl.load(unit + expert * D + d, mask=mask, other=0.0)
            g += tl.where(weight == 0, 0.0, weight * direction)  # an active vector may be not finite
    factor = factor_of_inverse(inverse)  # x / ||x|| is the same for the scaled token
    inverse = inverse / factor
    token = tl.load(x + t * stride_xt + d, mask=in_D, other=0.0).to(tl.float32) * factor
    radial = tl.sum(g * token, axis=0) * inverse * inverse
    tl.store(d_x + t * D + d, (total + g - token * radial).to(d_x.dtype.element_ty), mask=in_D)


def unit_vectors(w_DE: Tensor) -> tuple[Tensor, Tensor]:
    """w_e / ||w_e|| as [E, D] fp32, and 1 / ||w_e|| [E]; 0 for a vector that is zero or not finite.

    An inverse norm is 0 too for a vector so short that it passes no gradient, see `norms`.
    """
    D, E = w_DE.shape
    unit_ED = w_DE.new_empty((E, D), dtype=torch.float32)
    inv_norm_E = w_DE.new_empty((E,), dtype=torch.float32)
    if E:
        unit_vectors_kernel[(E,)](w_DE, unit_ED, inv_norm_E, D, *w_DE.stride(), BLOCK_D=1024)
    return unit_ED, inv_norm_E


def direction_gradient(
    d_unit_CED: Tensor,
    unit_ED: Tensor,
    inv_norm_E: Tensor,
    scale: Tensor | None,
    w_DE: Tensor,
    thresholds: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w [D, E], the scale [] and the thresholds G [E], from the chunks of the unit vectors' [C, E, D].

    `thresholds` is (G [E], the scores' gradient summed over each chunk of tokens [C, E]). Without it the last result is
    empty, without a scale the second.
    """
    (C, E, D) = d_unit_CED.shape
    d_w_DE = torch.empty(w_DE.shape, dtype=w_DE.dtype, device=w_DE.device)
    G_E, d_scores_CE = thresholds or (None, None)
    d_thresholds_E, d_scale_E = empty_as(G_E, d_w_DE), inv_norm_E.new_empty((0 if scale is None else E,))
    if E:
        block_d = power_of_two(D, 16)
        direction_gradient_kernel[(E,)](
            d_unit_CED,
            unit_ED,
            inv_norm_E,
            d_scores_CE,
            G_E,
            scale,
            d_w_DE,
            d_thresholds_E,
            d_scale_E,
            C,
            D,
            *d_w_DE.stride(),
            BLOCK_C=max(1, CHUNK_ELEMENTS // block_d),
            BLOCK_S=128,
            BLOCK_D=block_d,
            num_warps=8,
        )
    return d_w_DE, d_scale_E if scale is None else d_scale_E.sum().to(scale.dtype), d_thresholds_E


def token_gradient(
    d_rows_AD: Tensor, x_TD: Tensor, d_y_TO: Tensor, b2_EO: Tensor | None, parts_AN: Tensor, router: Router,
    index: Index, unit_ED: Tensor, centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x [T, D] in its dtype, of the scores [T, E], and of the cosines divided by ||x|| [T, E]."""
    score_TE, inv_norm_T, unrouted_T, bits_TW = (t.contiguous() for t in router[3:7])
    (T, D), (E, O) = x_TD.shape, (score_TE.shape[1], d_y_TO.shape[1])
    d_x_TD = torch.empty((T, D), dtype=x_TD.dtype, device=x_TD.device)
    d_score_TE, d_cos_TE = score_TE.new_empty((T, E)), score_TE.new_empty((T, E))
    if T:
        block_d = power_of_two(D, 16)
        token_gradient_kernel[(T,)](
            d_rows_AD, x_TD, d_y_TO, d_y_TO if b2_EO is None else b2_EO, parts_AN, score_TE, inv_norm_T, unrouted_T,
            bits_TW, unit_ED, router.scale, index.token_offsets, index.row_of_assignment,
            d_x_TD, d_score_TE, d_cos_TE,
            D, O, E, bits_TW.shape[1], parts_AN.shape[1], x_TD.stride(0), d_y_TO.stride(0),
            CENTRED=centred,
            BIAS=b2_EO is not None,
            UNROLL=2 if block_d <= 2048 else 1,
            BLOCK_D=block_d,
            BLOCK_O=power_of_two(O, 16),
            BLOCK_E=block_experts(E),
            BLOCK_T=power_of_two(parts_AN.shape[1], 1, 8),
            num_warps=min(16, max(1, block_d // 256)),
        )  # fmt: skip
    return d_x_TD, d_score_TE, d_cos_TE
