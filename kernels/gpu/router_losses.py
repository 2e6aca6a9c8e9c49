"""Diversity and simplicity of routing vectors; see `kernels.router_losses`. Three small launches, and one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .router_gradient import unit_vectors

BLOCK_E = 16  # slots per tile
BLOCK_D = 64


@triton.jit
def gram_kernel(unit, active, gram, sums, E, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    """gram = U U^T without its diagonal, 0 for inactive slots; sums[tile] = sum of the tile's squares.

    In: unit [E, D] fp32, active [E] bool. Out: gram [E, E], a sum per tile. Grid: tiles of E by E.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    f = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_E, BLOCK_E), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        a = tl.load(unit + e[:, None] * D + d[None, :], mask=(e < E)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(unit + f[None, :] * D + d[:, None], mask=(f < E)[None, :] & (d < D)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    m_e = tl.load(active + e, mask=e < E, other=0) != 0
    m_f = tl.load(active + f, mask=f < E, other=0) != 0
    acc = tl.where((e[:, None] != f[None, :]) & m_e[:, None] & m_f[None, :], acc, 0.0)
    tl.store(gram + e[:, None] * E + f[None, :], acc, mask=(e < E)[:, None] & (f < E)[None, :])
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(acc * acc, axis=1), axis=0))


@triton.jit
def losses_kernel(
    sums, inv_norm, active, diversity, simplicity, TILES, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """diversity = sqrt(sum of the tiles' sums), simplicity = mean norm of the active slots. Grid: 1."""
    total = tl.zeros((BLOCK_T,), tl.float32)
    for t0 in range(0, TILES, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        total += tl.load(sums + t, mask=t < TILES, other=0.0)
    tl.store(diversity, tl.sqrt_rn(tl.sum(total, axis=0)))
    e = tl.arange(0, BLOCK_E)
    m = tl.load(active + e, mask=e < E, other=0) != 0
    inverse = tl.load(inv_norm + e, mask=m, other=0.0)
    norm = tl.where(inverse == 0, 0.0, 1.0 / tl.where(inverse == 0, 1.0, inverse))  # NaN shows
    tl.store(simplicity, tl.sum(norm, axis=0) / tl.maximum(tl.sum(m.to(tl.float32), axis=0), 1.0))


@triton.jit
def vector_losses_backward_kernel(
    d_diversity, d_simplicity, diversity, unit, inv_norm, gram, active, d_w, E, D,
    MASK_E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of `vector_losses`, transposed. In: unit [E, D], gram [E, E]. Out: d_w [D, E].

    Grid: (blocks of E, blocks of D).
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_E, in_D = e < E, d < D
    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_E,), tl.float32)
    for f0 in range(0, E, BLOCK_E):
        f = f0 + tl.arange(0, BLOCK_E)
        m = tl.load(gram + e[:, None] * E + f[None, :], mask=in_E[:, None] & (f < E)[None, :], other=0.0)
        m_f = tl.load(active + f, mask=f < E, other=0) != 0  # an inactive slot may hold NaN
        u = tl.load(unit + f[:, None] * D + d[None, :], mask=m_f[:, None] & in_D[None, :], other=0.0)
        acc = tl.dot(m, u, acc, input_precision="ieee")
        squares += tl.sum(m * m, axis=1)
    own = tl.load(unit + e[:, None] * D + d[None, :], mask=in_E[:, None] & in_D[None, :], other=0.0)
    length = tl.load(diversity)
    factor = tl.where(length > 0, 2.0 * tl.load(d_diversity) / tl.where(length > 0, length, 1.0), 0.0)
    slots = tl.arange(0, MASK_E)
    count = tl.sum((tl.load(active + slots, mask=slots < E, other=0) != 0).to(tl.float32), axis=0)
    inverse = tl.load(inv_norm + e, mask=in_E, other=0.0) * factor
    mean = tl.load(d_simplicity) / tl.maximum(count, 1.0)
    here = (tl.load(active + e, mask=in_E, other=0) != 0)[:, None]
    grad = (acc - own * squares[:, None]) * inverse[:, None] + own * mean
    grad = tl.where(here, grad, 0.0)
    at = d_w + d.to(tl.int64)[None, :] * E + e[:, None]
    tl.store(at, grad.to(d_w.dtype.element_ty), mask=in_E[:, None] & in_D[None, :])


def vector_losses(w_DE: Tensor, active_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unlike the torch operation, it returns the unit vectors of inactive slots as they are; nothing reads them."""
    E, D = w_DE.shape[1], w_DE.shape[0]
    active_E = active_E.contiguous()
    unit_ED, inv_norm_E = unit_vectors(w_DE)
    gram_EE = unit_ED.new_empty((E, E))
    tiles = triton.cdiv(E, BLOCK_E)
    sums = unit_ED.new_empty((tiles * tiles,))
    diversity, simplicity = unit_ED.new_empty(()), unit_ED.new_empty(())
    gram_kernel[(tiles, tiles)](unit_ED, active_E, gram_EE, sums, E, D, BLOCK_E=BLOCK_E, BLOCK_D=BLOCK_D)
    losses_kernel[(1,)](
        sums,
        inv_norm_E,
        active_E,
        diversity,
        simplicity,
        tiles * tiles,
        E,
        BLOCK_T=256,
        BLOCK_E=max(2, triton.next_power_of_2(E)),
    )
    return diversity, simplicity, unit_ED, inv_norm_E, gram_EE


def vector_losses_backward(
    d_diversity: Tensor, d_simplicity: Tensor, diversity: Tensor, unit_ED: Tensor, inv_norm_E: Tensor,
    gram_EE: Tensor, active_E: Tensor, w_DE: Tensor,
) -> Tensor:  # fmt: skip
    E, D = unit_ED.shape
    d_w_DE = torch.empty(w_DE.shape, dtype=w_DE.dtype, device=w_DE.device)
    if E and D:
        vector_losses_backward_kernel[(triton.cdiv(E, BLOCK_E), triton.cdiv(D, BLOCK_D))](
            d_diversity,
            d_simplicity,
            diversity,
            unit_ED,
            inv_norm_E,
            gram_EE,
            active_E.contiguous(),
            d_w_DE,
            E,
            D,
            MASK_E=max(2, triton.next_power_of_2(E)),
            BLOCK_E=BLOCK_E,
            BLOCK_D=BLOCK_D,
        )
    return d_w_DE
