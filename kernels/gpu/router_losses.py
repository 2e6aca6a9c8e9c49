"""Diversity and simplicity of routing vectors; see `kernels.router_losses`.

Forward:   gram, which normalises the columns that it multiplies  ->  losses, if the gram matrix has several tiles
Backward:  vector_losses_backward
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel
from .norms import factor_for, inverse_of, own_inverse
from .sizes import block_experts, cdiv, power_of_two

BLOCK_E = 16  # slots per tile
ONE_TILE = 32  # up to so many slots one program has all
BLOCK_D = 64


@triton.jit
def _columns(w, e, read, d, D, stride_d, stride_e):
    """A tile [columns, rows] of w, fp32; 0 where a column is not `read`."""
    at = w + e.to(tl.int64)[:, None] * stride_e + d.to(tl.int64)[None, :] * stride_d
    return tl.load(at, mask=read[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _norms(w, e, read, factor, D, stride_d, stride_e, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    """||factor w[:, e]||, [BLOCK_E]."""
    squares = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        v = _columns(w, e, read, d0 + tl.arange(0, BLOCK_D), D, stride_d, stride_e) * factor[:, None]
        squares += v * v
    return tl.sqrt_rn(tl.sum(squares, axis=1))


@triton.jit
def _scales(w, e, read, D, stride_d, stride_e, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    """The power of two that brings each column to ordinary length, and 1 over its norm then."""
    one = tl.full((BLOCK_E,), 1.0, tl.float32)
    norm = _norms(w, e, read, one, D, stride_d, stride_e, BLOCK_E, BLOCK_D)
    factor = tl.where(read, factor_for(norm), 1.0)
    if tl.max((factor != 1.0).to(tl.int32), axis=0) > 0:
        norm = _norms(w, e, read, factor, D, stride_d, stride_e, BLOCK_E, BLOCK_D)
    return factor, inverse_of(norm)


@triton.jit
def _store_losses(square, inv_norm, m, diversity, simplicity, count):
    """From the gram matrix's sum of squares, and the inverse norms of a vector of slots, of which `m` are active."""
    tl.store(diversity, tl.sqrt_rn(square))
    norm = tl.where(inv_norm == 0, 0.0, 1.0 / tl.where(inv_norm == 0, 1.0, inv_norm))  # NaN shows
    active = tl.maximum(tl.sum(m.to(tl.float32), axis=0), 1.0)
    tl.store(simplicity, tl.sum(tl.where(m, norm, 0.0), axis=0) / active)
    tl.store(count, active)


@kernel
def gram_kernel(
    w, active, unit, inv_norm, gram, sums, diversity, simplicity, count, E, D, stride_d, stride_e,
    ONE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gram = U U^T without its diagonal; sums[tile] = sum of the tile's squares, or with ONE tile the losses.

    In: w [D, E], active [E] bool or above one half. Out: unit [E, D] and inv_norm [E] fp32, gram [E, E], all 0 for
    inactive slots, whose columns are not read; a sum per tile (or diversity, simplicity and count []).
    Grid: tiles of E by E. Bytes: w twice for each tile of columns, from L2.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    f = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = tl.load(active + e, mask=e < E, other=0).to(tl.float32) > 0.5
    m_f = tl.load(active + f, mask=f < E, other=0).to(tl.float32) > 0.5
    factor_e, inverse_e = _scales(w, e, m_e, D, stride_d, stride_e, BLOCK_E, BLOCK_D)
    factor_f, inverse_f = factor_e, inverse_e
    if not ONE:
        factor_f, inverse_f = _scales(w, f, m_f, D, stride_d, stride_e, BLOCK_E, BLOCK_D)
    own = own_inverse(inverse_e, factor_e)
    diagonal = tl.program_id(0) == tl.program_id(1)
    tl.store(inv_norm + e, own, mask=(e < E) & diagonal)
    acc = tl.zeros((BLOCK_E, BLOCK_E), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        a = _columns(w, e, m_e, d, D, stride_d, stride_e) * factor_e[:, None] * inverse_e[:, None]
        b = a
        if not ONE:
            b = _columns(w, f, m_f, d, D, stride_d, stride_e) * factor_f[:, None] * inverse_f[:, None]
        at = unit + e.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(at, a, mask=(e < E)[:, None] & (d < D)[None, :] & diagonal)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    acc = tl.where((e[:, None] != f[None, :]) & m_e[:, None] & m_f[None, :], acc, 0.0)
    tl.store(gram + e[:, None] * E + f[None, :], acc, mask=(e < E)[:, None] & (f < E)[None, :])
    square = tl.sum(tl.sum(acc * acc, axis=1), axis=0)
    if ONE:
        _store_losses(square, own, m_e, diversity, simplicity, count)
    else:
        tl.store(sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), square)


@kernel
def losses_kernel(
    sums, inv_norm, active, diversity, simplicity, count, TILES, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """diversity = sqrt(sum of the tiles' sums), simplicity = mean norm of the active slots, count = their number or 1.

    Grid: 1.
    """
    total = tl.zeros((BLOCK_T,), tl.float32)
    for t0 in range(0, TILES, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        total += tl.load(sums + t, mask=t < TILES, other=0.0)
    e = tl.arange(0, BLOCK_E)
    m = tl.load(active + e, mask=e < E, other=0).to(tl.float32) > 0.5
    inverse = tl.load(inv_norm + e, mask=m, other=0.0)
    _store_losses(tl.sum(total, axis=0), inverse, m, diversity, simplicity, count)


@kernel
def vector_losses_backward_kernel(
    d_diversity, d_simplicity, diversity, unit, inv_norm, gram, count, d_w, E, D,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of `vector_losses`, transposed; None for a loss without gradient.

    In: unit [E, D], inv_norm [E], gram [E, E], count []. Out: d_w [D, E]. Grid: (blocks of E, blocks of D).
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_E, in_D = e < E, d < D
    own = tl.load(unit + e[:, None] * D + d[None, :], mask=in_E[:, None] & in_D[None, :], other=0.0)
    grad = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    if d_diversity is not None:
        acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        squares = tl.zeros((BLOCK_E,), tl.float32)
        for f0 in range(0, E, BLOCK_E):
            f = f0 + tl.arange(0, BLOCK_E)
            m = tl.load(gram + e[:, None] * E + f[None, :], mask=in_E[:, None] & (f < E)[None, :], other=0.0)
            u = tl.load(unit + f[:, None] * D + d[None, :], mask=(f < E)[:, None] & in_D[None, :], other=0.0)
            acc = tl.dot(m, u, acc, input_precision="ieee")
            squares += tl.sum(m * m, axis=1)
        length = tl.load(diversity)
        factor = tl.where(length > 0, 2.0 * tl.load(d_diversity) / tl.where(length > 0, length, 1.0), 0.0)
        inverse = tl.load(inv_norm + e, mask=in_E, other=0.0) * factor
        grad += (acc - own * squares[:, None]) * inverse[:, None]
    if d_simplicity is not None:
        grad += own * (tl.load(d_simplicity) / tl.load(count))
    at = d_w + d.to(tl.int64)[None, :] * E + e[:, None]
    tl.store(at, grad.to(d_w.dtype.element_ty), mask=in_E[:, None] & in_D[None, :])


def vector_losses(w_DE: Tensor, active_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    D, E = w_DE.shape
    active_E = active_E.contiguous()
    unit_ED, inv_norm_E, gram_EE = (w_DE.new_empty(shape, dtype=torch.float32) for shape in ((E, D), (E,), (E, E)))
    diversity, simplicity, count = (w_DE.new_empty((), dtype=torch.float32) for _ in range(3))
    block_e = power_of_two(E, BLOCK_E) if E <= ONE_TILE else BLOCK_E
    tiles = cdiv(E, block_e)
    sums = diversity if tiles == 1 else unit_ED.new_empty((tiles * tiles,))
    gram_kernel[(tiles, tiles)](
        w_DE, active_E, unit_ED, inv_norm_E, gram_EE, sums, diversity, simplicity, count, E, D, *w_DE.stride(),
        ONE=tiles == 1,
        BLOCK_E=block_e,
        BLOCK_D=BLOCK_D,
    )  # fmt: skip
    if tiles > 1:
        losses_kernel[(1,)](
            sums,
            inv_norm_E,
            active_E,
            diversity,
            simplicity,
            count,
            tiles * tiles,
            E,
            BLOCK_T=256,
            BLOCK_E=block_experts(E),
        )
    return diversity, simplicity, unit_ED, inv_norm_E, gram_EE, count


def vector_losses_backward(
    diversity: Tensor, d_diversity: Tensor | None, d_simplicity: Tensor | None, unit_ED: Tensor, inv_norm_E: Tensor,
    gram_EE: Tensor, count: Tensor, w_DE: Tensor,
) -> Tensor:  # fmt: skip
    E, D = unit_ED.shape
    d_w_DE = torch.empty(w_DE.shape, dtype=w_DE.dtype, device=w_DE.device)
    if E and D:
        vector_losses_backward_kernel[(cdiv(E, BLOCK_E), cdiv(D, BLOCK_D))](
            d_diversity,
            d_simplicity,
            diversity,
            unit_ED,
            inv_norm_E,
            gram_EE,
            count,
            d_w_DE,
            E,
            D,
            BLOCK_E=BLOCK_E,
            BLOCK_D=BLOCK_D,
        )
    return d_w_DE
