"""The threshold gate in one pass over the tokens: routing_vectors (to the product's layout and type), threshold_gate.

Matrix cores multiply half-precision tokens without loss: each routing vector is split into a sum of parts in the
tokens' dtype, scaled by a power of two. An fp32 vector takes three bf16 parts (24 bits; two err by 7e-6 if few
dimensions hold most of both vectors, and decisions must be right to 2e-6) or two fp16 parts (22 bits, 1.2e-7). A vector
in the tokens' dtype is a single part.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import OPERATIONS
from ..ragged_index import block_tokens, words
from . import tiles
from .launch import kernel
from .norms import factor_for, inverse_of, is_ordinary, own_inverse, tau_of
from .proxy_fence import proxy_fence, safe_stages
from .ragged_index import MOST_EXPERTS
from .score_gradient import EXACT_EXPERTS, TWO_PROGRAMS, precision, rows_contiguous
from .sizes import cdiv, power_of_two

HALF = (torch.bfloat16, torch.float16)
KB = 1024
SMALL_SHARED_MEMORY = ("sm_86", "sm_89", "sm_120", "sm_121")  # 99 KB a program
MOST_COLUMNS = 4096  # of a routing vector that one program holds in registers


@triton.jit
def _split_and_store(v, at, mask, step, PARTS: tl.constexpr):
    """Store v as a sum of PARTS numbers in the pointers' type, `step` elements apart, the largest first."""
    for p in tl.static_range(PARTS):
        part = v.to(at.dtype.element_ty)
        tl.store(at + p * step, part, mask=mask)
        v -= part.to(tl.float32)


@triton.jit
def _column_squares(column, v, factor, e, D, E, DP, stride_d, BLOCK_D: tl.constexpr):
    """The sum of squares of a column of w times `factor`; `v` are its first BLOCK_D entries."""
    d = tl.arange(0, BLOCK_D)
    v *= factor
    squares = v * v
    for d0 in range(BLOCK_D, DP, BLOCK_D):
        far = (d0 + d).to(tl.int64)
        u = tl.load(column + far * stride_d, mask=(far < D) & (e < E), other=0.0).to(tl.float32) * factor
        squares += u * u
    return tl.sum(squares, axis=0)


@kernel
def routing_vectors_kernel(
    w, parts, inv_norm, D, E, DP, stride_d, stride_e,
    EXPONENT: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Columns of w as rows, times a power of two that brings their norms to [1, 2) 2^EXPONENT, split into PARTS.

    In: w [D, E]. Out: parts [PARTS, BLOCK_E, DP], 0 in padding; inv_norm [BLOCK_E] fp32, 1 / the scaled norm, 0 for a
    zero vector. Grid: BLOCK_E. Bytes: w once (twice if D > BLOCK_D, from L2), parts.
    """
    e = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    column = w + e * stride_e
    v = tl.load(column + d.to(tl.int64) * stride_d, mask=(d < D) & (e < E), other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(_column_squares(column, v, 1.0, e, D, E, DP, stride_d, BLOCK_D))
    near = factor_for(norm)  # to ordinary length first
    if near != 1.0:
        norm = tl.sqrt_rn(_column_squares(column, v, near, e, D, E, DP, stride_d, BLOCK_D))
    exponent = (norm.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 64), 254)  # any will do for zero or non-finite w
    factor = ((254 + EXPONENT - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(inv_norm + e, inverse_of(norm * factor))
    row = parts + e * DP
    step = tl.cast(DP, tl.int64) * BLOCK_E
    _split_and_store(v * near * factor, row + d, d < DP, step, PARTS)
    for d0 in range(BLOCK_D, DP, BLOCK_D):
        far = (d0 + d).to(tl.int64)
        u = tl.load(column + far * stride_d, mask=(far < D) & (e < E), other=0.0).to(tl.float32)
        _split_and_store(u * near * factor, row + far, far < DP, step, PARTS)


@triton.jit
def _tokens(x_at, real, d, D, EVEN_D: tl.constexpr):
    """A tile of tokens; masked ones are zero."""
    if EVEN_D:
        return tl.load(x_at, mask=real[:, None], other=0.0)
    else:
        return tl.load(x_at, mask=real[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _step(
    tile, part_at, in_E, DP,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The tile's products with the routing vectors, [BLOCK_T, BLOCK_E], smallest part first."""
    step = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for p in tl.static_range(PARTS):
        part = tl.load(part_at + (PARTS - 1 - p) * BLOCK_E * DP, mask=in_E[None, :], other=0.0)
        proxy_fence(tile, PRECISION)
        step = tl.dot(tile, part, step, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_D)
    return step


@triton.jit
def _scaled_norms(x_at, real, factor, D, DP, EVEN_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Norms of the tokens times `factor`, [BLOCK_T]."""
    squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    d = tl.arange(0, BLOCK_D)
    for d0 in tl.range(0, DP, BLOCK_D, num_stages=1):
        wide = _tokens(x_at, real, d0 + d, D, EVEN_D).to(tl.float32) * factor[:, None]
        squares += wide * wide
        x_at += BLOCK_D
    return tl.sqrt_rn(tl.sum(squares, axis=1))


@triton.jit
def _scaled_products(
    x, parts, t, e, real, factor, D, E, DP, stride_t,
    EVEN_D: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Products of the tokens times `factor`, [BLOCK_T, BLOCK_E].

    They are added in the order of the plain loop: a token has the same bits whatever other tokens its block holds.
    """
    d = tl.arange(0, BLOCK_D)
    x_at = x + t.to(tl.int64)[:, None] * stride_t + d[None, :]
    part_at = parts + e[None, :] * DP + d[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for d0 in tl.range(0, DP, BLOCK_D, num_stages=1):
        tile = _tokens(x_at, real, d0 + d, D, EVEN_D)
        tile = (tile.to(tl.float32) * factor[:, None]).to(tile.dtype)
        acc += _step(tile, part_at, e < E, DP, PARTS, PRECISION, BLOCK_T, BLOCK_D, BLOCK_E)
        x_at += BLOCK_D
        part_at += BLOCK_D
    return acc


@kernel
def threshold_gate_kernel(
    x, parts, inv_norm_E, threshold, active, scale, token_mask, shift,
    score, words, unrouted, inv_norm_T, counts,
    T, D, E, DP, WORDS, stride_t,
    FALLBACK: tl.constexpr, MASKED: tl.constexpr, SHIFTED: tl.constexpr, MAX_K: tl.constexpr,
    EVEN_D: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, COUNT_T: tl.constexpr,
):  # fmt: skip
    """Scores, bitmask, unrouted flags, inverse norms and block counts of BLOCK_T tokens; see `kernels.threshold_gate`.

    In: x [T, D] with stride_t, parts [PARTS, BLOCK_E, DP] and inv_norm_E of `routing_vectors_kernel`, threshold and
    active [E], scale [] or None, token_mask [T] (MASKED), shift [] (SHIFTED). Out: score [T, E], words [T, WORDS] int32
    (expert e in bit e % 32 of word e // 32), unrouted and inv_norm_T [T], counts [blocks of COUNT_T tokens, E] int32.
    Grid: blocks of BLOCK_T tokens. Bytes: x once; score, words and 5 T written; parts from L2. A block with a token
    that is zero, not finite, or very long or short reads its tokens twice.

    A masked token is read as zeros. The fallback takes NaN for the largest cosine, as torch's argmax does.
    """
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    in_T, in_E = t < T, e < E
    real = in_T
    if MASKED:
        real = real & (tl.load(token_mask + t, mask=in_T, other=0) != 0)
    d = tl.arange(0, BLOCK_D)
    first_x_at = x + t.to(tl.int64)[:, None] * stride_t + d[None, :]
    x_at = first_x_at
    part_at = parts + e[None, :] * DP + d[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for d0 in range(0, DP, BLOCK_D):
        tile = _tokens(x_at, real, d0 + d, D, EVEN_D)
        # Matrix cores truncate as they accumulate. So each step has its own accumulator, smallest part first, and the
        # steps are added with rounding; max_num_imprecise_acc keeps the compiler from merging them.
        acc += _step(tile, part_at, in_E, DP, PARTS, PRECISION, BLOCK_T, BLOCK_D, BLOCK_E)
        wide = tile.to(tl.float32)
        squares += wide * wide
        x_at += BLOCK_D
        part_at += BLOCK_D
    norm = tl.sqrt_rn(tl.sum(squares, axis=1))
    factor = tl.full((BLOCK_T,), 1.0, tl.float32)
    if tl.max((real & (is_ordinary(norm) == 0)).to(tl.int32), axis=0) > 0:
        factor = factor_for(norm)
        norm = _scaled_norms(first_x_at, real, factor, D, DP, EVEN_D, BLOCK_T, BLOCK_D)
        acc = _scaled_products(
            x, parts, t, e, real, factor, D, E, DP, stride_t, EVEN_D, PARTS, PRECISION, BLOCK_T, BLOCK_D, BLOCK_E
        )  # fmt: skip
    inverse = inverse_of(norm)
    tl.store(inv_norm_T + t, own_inverse(inverse, factor), mask=in_T)
    inverse_E = tl.load(inv_norm_E + e)
    cos = acc * inverse[:, None] * inverse_E[None, :]
    score_at = score + t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(score_at, tl.sigmoid(cos * tau_of(scale)), mask=in_T[:, None] & in_E[None, :])

    is_active = tl.load(active + e, mask=in_E, other=0).to(tl.float32) > 0.5
    limit = tl.load(threshold + e, mask=in_E, other=0.0).to(tl.float32)
    takes_all = (limit != limit) | (inverse_E != inverse_E)
    margin = tl.where(is_active[None, :], cos - limit[None, :], float("-inf"))
    if SHIFTED:
        limit += tl.load(shift).to(tl.float32)
    passes = ((cos > limit[None, :]) | takes_all[None, :]) & is_active[None, :] & real[:, None]
    if SHIFTED:
        best = tl.max(margin, axis=1)
        first = tl.min(tl.where(margin == best[:, None], e[None, :], BLOCK_E), axis=1)
        keeps = real & (best > 0) & (tl.max(passes.to(tl.int32), axis=1) == 0)
        passes = passes | (keeps[:, None] & (e[None, :] == first[:, None]))
    if MAX_K > 0:
        margin = tl.where(margin == margin, margin, float("inf"))  # an expert that takes all stays
        margin = tl.where(passes, margin, float("-inf"))
        passes = passes & False
        for _ in range(MAX_K):
            best = tl.max(margin, axis=1)
            first = tl.min(tl.where(margin == best[:, None], e[None, :], BLOCK_E), axis=1)
            taken = (e[None, :] == first[:, None]) & (best > float("-inf"))[:, None]
            passes = passes | taken
            margin = tl.where(taken, float("-inf"), margin)
    lost = real & (tl.max(passes.to(tl.int32), axis=1) == 0)
    tl.store(unrouted + t, lost, mask=in_T)
    if FALLBACK:
        key = tl.where(cos == cos, cos, float("inf"))
        key = tl.where(is_active[None, :], key, float("-inf"))
        best = tl.max(key, axis=1)
        first = tl.min(tl.where(key == best[:, None], e[None, :], BLOCK_E), axis=1)
        passes = passes | (lost[:, None] & (e[None, :] == first[:, None]))
    else:
        first = tl.min(tl.where(is_active, e, BLOCK_E), axis=0)
        broken = lost & (tl.min((cos != cos).to(tl.int32), axis=1) > 0)
        passes = passes | (broken[:, None] & (e == first)[None, :])
    assigned = passes.to(tl.int32)

    bit = assigned << (e % 32)[None, :]
    word_at = words + t.to(tl.int64) * WORDS
    if BLOCK_E <= 32:
        tl.store(word_at, tl.sum(bit, axis=1), mask=in_T)
        tl.store(word_at + 1, tl.zeros((BLOCK_T,), tl.int32), mask=in_T)
    else:
        word = tl.sum(tl.reshape(bit, (BLOCK_T, BLOCK_E // 32, 32)), axis=2)
        i = tl.arange(0, BLOCK_E // 32)
        tl.store(word_at[:, None] + i[None, :], word, mask=in_T[:, None] & (i < WORDS)[None, :])

    blocks: tl.constexpr = BLOCK_T // COUNT_T
    if blocks == 1:
        tl.store(counts + tl.cast(block, tl.int64) * E + e, tl.sum(assigned, axis=0), mask=in_E)
    else:
        count = tl.sum(tl.reshape(assigned, (blocks, COUNT_T, BLOCK_E)), axis=1)
        b = (block * blocks + tl.arange(0, blocks)).to(tl.int64)
        tl.store(counts + b[:, None] * E + e[None, :], count, mask=(b * COUNT_T < T)[:, None] & in_E[None, :])


def _number_of_parts(x: torch.dtype, w: torch.dtype) -> int:
    """How many parts in the tokens' dtype hold a routing vector."""
    if x not in HALF or x == w:
        return 1
    if w in HALF:
        return 2 if x == torch.bfloat16 else 1
    return 3 if x == torch.bfloat16 else 2


def _tile(block_e: int, x: torch.dtype, parts: int, chip: str) -> dict[str, int]:
    """Tile, warps and stages of `threshold_gate_kernel`. T plays no part: a token's sums must not depend on its batch.

    The more tokens share a tile, the less often the kernel reads the routing vectors from L2, which bounds it when
    block_e * parts is near the tile's tokens. Both accumulators, the total and the step's, fit in registers.
    """
    block_t = 128 if block_e <= 64 else 8192 // block_e
    block_d, warps = 64, 8
    if x in HALF:
        if block_e * parts >= 256:
            block_d = 32 if block_e * parts <= 768 else 16
    else:
        block_d = 32 if block_e <= 128 else 16
        if block_e <= EXACT_EXPERTS:
            block_t, warps = 64, 4
    stage = (block_t + block_e * parts) * block_d * x.itemsize
    # two programs per multiprocessor, or one
    stages = 4 if 4 * stage <= 100 * KB else 3 if 3 * stage <= 150 * KB else 2
    if chip.startswith("gfx"):
        stages = 2
    elif chip in SMALL_SHARED_MEMORY:
        while stages > 2 and (stages - 1) * stage > 96 * KB:  # shared memory holds one stage fewer
            stages -= 1
    tile = {"BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_E": block_e, "num_warps": warps}
    tile["num_stages"] = safe_stages(stages, chip)
    if chip == "sm_90" and stages == 4 and (x in HALF or block_e <= EXACT_EXPERTS):
        tile["maxnreg"] = TWO_PROGRAMS
    return tile


def _routing_vectors(w_DE: Tensor, x: torch.dtype, tile: dict[str, int], parts: int) -> tuple[Tensor, Tensor]:
    """Parts [parts, BLOCK_E, D rounded up to a multiple of BLOCK_D] and inverse norms [BLOCK_E]."""
    D, E = w_DE.shape
    block_e, columns = tile["BLOCK_E"], cdiv(D, tile["BLOCK_D"]) * tile["BLOCK_D"]
    parts_PED = w_DE.new_empty((parts, block_e, columns), dtype=x)
    inv_norm_E = w_DE.new_empty((block_e,), dtype=torch.float32)
    block_d = power_of_two(columns, 16, MOST_COLUMNS)
    routing_vectors_kernel[(block_e,)](
        w_DE,
        parts_PED,
        inv_norm_E,
        D,
        E,
        columns,
        *w_DE.stride(),
        EXPONENT=14 if x == torch.float16 else 0,
        PARTS=parts,
        BLOCK_D=block_d,
        BLOCK_E=block_e,
        num_warps=8 if block_d >= 1024 else 4,
    )
    return parts_PED, inv_norm_E


def threshold_gate(
    x_TD: Tensor, w_DE: Tensor, threshold_E: Tensor, active_E: Tensor, scale: Tensor | None, fallback: bool,
    token_mask_T: Tensor | None = None, shift: Tensor | None = None, max_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (T, D), E = x_TD.shape, w_DE.shape[1]
    if E > MOST_EXPERTS:
        given = (x_TD, w_DE, threshold_E, active_E, scale, fallback, token_mask_T, shift, max_k)
        return OPERATIONS["threshold_gate"].run(*given)
    count_t = block_tokens(E)
    score_TE = x_TD.new_empty((T, E), dtype=torch.float32)
    bits_TW = x_TD.new_empty((T, words(E)), dtype=torch.int64)
    unrouted_T = x_TD.new_empty((T,), dtype=torch.bool)
    inv_norm_T = x_TD.new_empty((T,), dtype=torch.float32)
    block_counts = x_TD.new_empty((cdiv(T, count_t) * E,), dtype=torch.int32)
    if T:
        x_TD, chip = rows_contiguous(x_TD), tiles.architecture(x_TD.device)
        parts = _number_of_parts(x_TD.dtype, w_DE.dtype)
        tile = _tile(power_of_two(E, 16), x_TD.dtype, parts, chip)
        parts_PED, inv_norm_E = _routing_vectors(w_DE, x_TD.dtype, tile, parts)
        threshold_gate_kernel[(cdiv(T, tile["BLOCK_T"]),)](
            x_TD,
            parts_PED,
            inv_norm_E,
            threshold_E.contiguous(),
            active_E.contiguous(),
            scale,
            unrouted_T if token_mask_T is None else token_mask_T.contiguous(),
            inv_norm_T if shift is None else shift,
            score_TE,
            bits_TW.view(torch.int32),
            unrouted_T,
            inv_norm_T,
            block_counts,
            T,
            D,
            E,
            parts_PED.shape[2],
            2 * words(E),
            x_TD.stride(0),
            FALLBACK=fallback,
            MASKED=token_mask_T is not None,
            SHIFTED=shift is not None,
            MAX_K=max_k if max_k < E else 0,
            EVEN_D=parts_PED.shape[2] == D,
            PARTS=parts,
            PRECISION=precision(E, chip),
            COUNT_T=count_t,
            **tile,
        )
    return score_TE, bits_TW, unrouted_T, inv_norm_T, block_counts
