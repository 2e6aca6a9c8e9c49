"""The gradient of the threshold gate's scores: score_gradient -> cosine_gradient (to the tokens), unit_gradient (to the
routing vectors).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import kernel
from .norms import factor_of_inverse, tau_of
from .proxy_fence import proxy_fence, safe_stages
from .router_gradient import direction_gradient, unit_vectors
from .sizes import cdiv, power_of_two

EXACT_EXPERTS = 16  # up to so many, fp32 products without matrix cores take less time than reading the tokens
TWO_PROGRAMS = 128  # registers a thread, for two programs of 8 warps a multiprocessor; elsewhere they spill
GRADIENT_PROGRAMS = 512  # share the sum over the tokens; the same on every device, so that a sum has one order
GRADIENT_TOKENS = 256  # the fewest tokens that a program sums


@kernel
def score_gradient_kernel(
    d_score, score, inv_norm, scale, d_cos, T, E, stride_t, stride_e, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """d_cos = d_score s (1 - s) tau / ||x||.

    In: d_score [T, E] of any strides, score [T, E], inv_norm [T]. Out: d_cos [T, E] fp32. Grid: blocks of tokens and of
    experts. Bytes: 12 T E.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = (t < T)[:, None] & (e < E)[None, :]
    row = t.to(tl.int64)[:, None]
    ds = tl.load(d_score + row * stride_t + e.to(tl.int64)[None, :] * stride_e, mask=mask, other=0.0)
    s = tl.load(score + row * E + e[None, :], mask=mask, other=0.0)
    over_norm = tl.load(inv_norm + t, mask=t < T, other=0.0) * tau_of(scale)
    grad = tl.where(ds == 0, 0.0, (1.0 - s) * s * ds * over_norm[:, None])  # the score of an inactive slot may be NaN
    tl.store(d_cos + row * E + e[None, :], grad, mask=mask)


@triton.jit
def _through_cosines(
    d_cos_at, unit_at, in_T, in_D, E, D, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK_T, BLOCK_D] of d_cos times the unit vectors, for pointers to the tokens and the columns."""
    e = tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for e0 in range(0, E, BLOCK_E):
        in_E = e < E - e0
        d_cos = tl.load(d_cos_at[:, None] + (e0 + e)[None, :], mask=in_T[:, None] & in_E[None, :], other=0.0)
        row = (e0 + e).to(tl.int64) * D
        unit = tl.load(unit_at[None, :] + row[:, None], mask=in_E[:, None] & in_D[None, :], other=0.0)
        acc = tl.dot(d_cos, unit, acc, input_precision=PRECISION)
    return acc


@kernel
def cosine_gradient_kernel(
    d_cos, unit, x, inv_norm, d_x, T, D, E, stride_t,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """d_x = g - x <g, x> / ||x||^2, with g = d_cos unit.

    In: d_cos [T, E] (over ||x||), unit [E, D], inv_norm [T], fp32; x [T, D] with stride_t. Out: d_x [T, D].
    Grid: blocks of BLOCK_T tokens. Bytes: x twice, d_x once; d_cos and unit from L2.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    in_T = t < T
    row = t.to(tl.int64)
    inverse = tl.load(inv_norm + t, mask=in_T, other=0.0)
    factor = factor_of_inverse(inverse)  # x / ||x|| is the same for the scaled token
    inverse = inverse / factor
    radial = tl.zeros((BLOCK_T,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        in_D = d < D - d0
        at = (row * stride_t)[:, None] + (d0 + d)[None, :]
        tile = tl.load(x + at, mask=in_T[:, None] & in_D[None, :], other=0.0).to(tl.float32) * factor[:, None]
        g = _through_cosines(
            d_cos + row * E, unit + d0 + d, in_T, in_D, E, D, PRECISION, BLOCK_T, BLOCK_D, BLOCK_E
        )  # fmt: skip
        radial += tl.sum(g * tile, axis=1)
    radial = radial * inverse * inverse
    for d0 in range(0, D, BLOCK_D):
        in_D = d < D - d0
        mask = in_T[:, None] & in_D[None, :]
        at = (row * stride_t)[:, None] + (d0 + d)[None, :]
        tile = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
        g = _through_cosines(
            d_cos + row * E, unit + d0 + d, in_T, in_D, E, D, PRECISION, BLOCK_T, BLOCK_D, BLOCK_E
        )  # fmt: skip
        out = (g - tile * radial[:, None]).to(d_x.dtype.element_ty)
        tl.store(d_x + (row * D)[:, None] + (d0 + d)[None, :], out, mask=mask)


@triton.jit
def _weighted_sum(
    d_cos, x, inv_norm, T, D, E, CHUNK, stride_t,
    CHECKED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """d_cos^T x over the program's chunk, [BLOCK_E, BLOCK_D]; CHECKED reads tokens without inverse norm as zeros."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    first = tl.program_id(2) * CHUNK
    step = tl.arange(0, BLOCK_T)
    in_D, in_E = d < D, e < E
    row = (first + step).to(tl.int64)
    x_at = x + (row * stride_t)[:, None] + d[None, :]
    d_cos_at = d_cos + (row * E)[None, :] + e[:, None]
    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for t0 in tl.range(first, tl.minimum(first + CHUNK, T), BLOCK_T, num_stages=1 if CHECKED else None):
        in_T = step < T - t0
        read = in_T
        if CHECKED:
            read = tl.load(inv_norm + t0 + step, mask=in_T, other=0.0) > 0
        tile = tl.load(x_at, mask=read[:, None] & in_D[None, :], other=0.0)
        weight = tl.load(d_cos_at, mask=in_E[:, None] & in_T[None, :], other=0.0)
        if SPLIT:
            high = weight.to(tl.bfloat16)
            weight -= high.to(tl.float32)
            middle = weight.to(tl.bfloat16)
            low = (weight - middle.to(tl.float32)).to(tl.bfloat16)
            proxy_fence(tile, PRECISION)
            acc += tl.dot(high, tile, tl.dot(middle, tile, tl.dot(low, tile)))
        else:
            acc = tl.dot(weight, tile.to(tl.float32), acc, input_precision=PRECISION)
        x_at += BLOCK_T * tl.cast(stride_t, tl.int64)
        d_cos_at += BLOCK_T * tl.cast(E, tl.int64)
    return acc


@triton.jit
def _column_sums(d_score, out, T, E, CHUNK, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """out[chunk, e] = sum of d_score [T, E] over the program's chunk."""
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    first = tl.program_id(2) * CHUNK
    row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for t0 in range(first, tl.minimum(first + CHUNK, T), BLOCK_T):
        mask = (tl.arange(0, BLOCK_T) < T - t0)[:, None] & (e < E)[None, :]
        total += tl.load(d_score + (row * E)[:, None] + e[None, :], mask=mask, other=0.0)
        row += BLOCK_T
    tl.store(out + tl.program_id(2) * E + e, tl.sum(total, axis=0), mask=e < E)


@kernel
def unit_gradient_kernel(
    d_cos, x, inv_norm, out, d_score, score_sums, T, D, E, CHUNK, stride_t,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[chunk] = d_cos^T x over the chunk's CHUNK tokens, a multiple of BLOCK_T; score_sums[chunk] = sum of d_score.

    In: d_cos [T, E] fp32, x [T, D] with stride_t, inv_norm [T], d_score [T, E] or None. Out: [chunks, E, D] fp32,
    [chunks, E] fp32 with a d_score.
    Grid: (columns, and one with a d_score, experts, chunks). Bytes: x once for each block of experts, d_cos once for
    each block of columns, mostly from L2; d_score once. If the sum is NaN, it is taken again: 0 times a token that is
    not finite is NaN too.

    SPLIT: x is bf16, and d_cos is split into three bf16 parts, 24 bits. Otherwise the product is fp32.
    """
    if d_score is not None:  # noqa: SIM102 - decided by the compiler
        if tl.program_id(0) == tl.cdiv(D, BLOCK_D):
            _column_sums(d_score, score_sums, T, E, CHUNK, BLOCK_T, BLOCK_E)
            return
    acc = _weighted_sum(
        d_cos, x, inv_norm, T, D, E, CHUNK, stride_t, False, SPLIT, PRECISION, BLOCK_T, BLOCK_D, BLOCK_E
    )  # fmt: skip
    if tl.max(tl.max((acc != acc).to(tl.int32), axis=1), axis=0) > 0:
        acc = _weighted_sum(
            d_cos, x, inv_norm, T, D, E, CHUNK, stride_t, True, SPLIT, PRECISION, BLOCK_T, BLOCK_D, BLOCK_E
        )  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    at = (tl.program_id(2) * tl.cast(E, tl.int64) + e) * D
    tl.store(out + at[:, None] + d[None, :], acc, mask=(e < E)[:, None] & (d < D)[None, :])


def precision(E: int, chip: str) -> str:
    """How to multiply fp32: "tf32x3" has the accuracy of fp32; AMD's matrix cores multiply fp32 itself."""
    return "tf32x3" if chip.startswith("sm_") and E > EXACT_EXPERTS else "ieee"


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def unit_gradient(
    d_cos_TE: Tensor, x_TD: Tensor, inv_norm_T: Tensor, d_score_TE: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """d_cos^T x, [chunks, E, D] fp32, which sum to the gradient of the unit routing vectors, and sums of d_score.

    d_cos is the cosines' gradient over ||x||, fp32. A token that is not finite, whose inverse norm is NaN, counts only
    where its d_cos is not 0. The second result, [chunks, E], is of a contiguous `d_score_TE`.

    It sums chunks of tokens, which depend on shapes alone; `direction_gradient` adds them in order.
    """
    (T, D), E = x_TD.shape, d_cos_TE.shape[1]
    if T == 0 or D == 0:
        return d_cos_TE.new_zeros((1, E, D)), None if d_score_TE is None else d_score_TE.sum(dim=0, keepdim=True)
    x_TD, d_cos_TE = rows_contiguous(x_TD), d_cos_TE.contiguous()
    chip = tiles.architecture(x_TD.device)
    split = x_TD.dtype == torch.bfloat16
    block_e = power_of_two(E, 16, 128)
    tile = _gradient_tile(block_e, split, chip)
    block_t, block_d = tile["BLOCK_T"], tile["BLOCK_D"]
    columns, experts = cdiv(D, block_d), cdiv(E, block_e)
    most = max(1, GRADIENT_PROGRAMS // (columns * experts))
    chunk = block_t * cdiv(max(GRADIENT_TOKENS, cdiv(T, most)), block_t)
    chunks = cdiv(T, chunk)
    sums_CED = d_cos_TE.new_empty((chunks, E, D))
    score_sums_CE = None if d_score_TE is None else d_cos_TE.new_empty((chunks, E))
    unit_gradient_kernel[(columns + (d_score_TE is not None), experts, chunks)](
        d_cos_TE,
        x_TD,
        inv_norm_T,
        sums_CED,
        d_score_TE,
        score_sums_CE,
        T,
        D,
        E,
        chunk,
        x_TD.stride(0),
        SPLIT=split,
        PRECISION=precision(E, chip),
        **tile,
    )
    return sums_CED, score_sums_CE


def _gradient_tile(block_e: int, split: bool, chip: str) -> dict[str, int]:
    """Tile, warps and stages of `unit_gradient_kernel`: rows of 128 or 256 bytes, as many as fit in registers.

    Rows are wide where nothing spills: the narrower they are, the more often the kernel reads d_cos.
    """
    block_t = 32 if split or block_e > 16 else 16
    block_d = 128 if split and 16 < block_e <= 64 else 64
    stages = 2 if chip.startswith("gfx") else 4 if block_e <= 16 or block_d == 128 else 3
    tile = {"BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_E": block_e, "num_warps": 8}
    tile["num_stages"] = safe_stages(stages, chip)
    if chip == "sm_90" and block_d == 64:
        tile["maxnreg"] = TWO_PROGRAMS
    return tile


def threshold_gate_backward(
    d_score_TE: Tensor, score_TE: Tensor, x_TD: Tensor, w_DE: Tensor, inv_norm_T: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (T, D), E = x_TD.shape, w_DE.shape[1]
    d_x_TD = torch.empty((T, D), dtype=x_TD.dtype, device=x_TD.device)
    d_cos_TE = torch.empty((T, E), dtype=torch.float32, device=x_TD.device)
    unit_ED, inv_norm_E = unit_vectors(w_DE)
    x_TD = rows_contiguous(x_TD)
    if T:
        chip = tiles.architecture(x_TD.device)
        block_e = power_of_two(E, 16, 64)
        score_gradient_kernel[(cdiv(T, 2048 // block_e), cdiv(E, block_e))](
            d_score_TE,
            score_TE,
            inv_norm_T,
            scale,
            d_cos_TE,
            T,
            E,
            *d_score_TE.stride(),
            BLOCK_T=2048 // block_e,
            BLOCK_E=block_e,
            num_warps=4,
        )
        cosine_gradient_kernel[(cdiv(T, 16),)](
            d_cos_TE,
            unit_ED,
            x_TD,
            inv_norm_T,
            d_x_TD,
            T,
            D,
            E,
            x_TD.stride(0),
            PRECISION=precision(E, chip),
            BLOCK_T=16,
            BLOCK_D=32,
            BLOCK_E=min(32, block_e),
            num_warps=4,
            num_stages=2,
        )
    d_unit_CED, _ = unit_gradient(d_cos_TE, x_TD, inv_norm_T)
    d_w_DE, d_scale, _ = direction_gradient(d_unit_CED, unit_ED, inv_norm_E, scale, w_DE)
    return d_x_TD, d_w_DE, d_scale
