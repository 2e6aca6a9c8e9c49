"""Norms of vectors over the whole range of a dtype, in torch operations.

The squares of a very long vector overflow and those of a very short one vanish. Such vectors are scaled by a power of
two first. That is exact: a vector and its multiple by a power of two give the same bits. Vectors of ordinary length are
neither scaled nor copied; Triton's kernels follow the same rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Range(NamedTuple):
    """Lengths from 1 / `safe` to `safe` are ordinary; `up` brings shorter vectors there, `down` longer ones."""

    safe: float
    up: float
    down: float


SINGLE = Range(2.0**40, 2.0**100, 2.0**-80)
RANGES = {torch.float32: SINGLE, torch.float64: Range(2.0**320, 2.0**700, 2.0**-640)}


class Scaled(NamedTuple):
    """Vectors times their `factor`, powers of two; None where no vector needed one. `norm` belongs to `vectors`.

    The norm of a vector that is not finite is not finite; no other is, and only a zero vector has norm 0. `ordinary`:
    no vector is zero or not finite.
    """

    vectors: Tensor
    norm: Tensor
    factor: Tensor | None = None
    ordinary: bool = False

    def inverse(self) -> Tensor:
        """1 / `norm`; 0 for a zero vector, NaN for one that is not finite."""
        inverse = self.norm.reciprocal()
        if self.ordinary:
            return inverse
        inverse = inverse.masked_fill(self.norm == 0, 0)
        return inverse.masked_fill(~self.norm.isfinite(), torch.nan)

    def own(self, inverse: Tensor) -> Tensor:
        """1 / ||v|| of the vectors as they came, from `inverse`: NaN if not finite, 0 for those that pass no gradient.

        They are zero, or so short (below 1 / `up`) that 1 / ||v|| may overflow.
        """
        if self.factor is None:
            return inverse
        inverse = inverse * self.factor
        return inverse.masked_fill(inverse > RANGES[inverse.dtype].up, 0)

    def ordinary_where(self, chosen: Tensor) -> bool:
        """Whether the `chosen` vectors [n] are finite, and had no need of a factor. Reads values: for a CPU."""
        if self.factor is None:
            return True
        return bool((self.norm.isfinite() & (self.factor == 1))[chosen].all())

    def own_norm(self) -> Tensor:
        """||v|| of the vectors as they came; inf where it exceeds the dtype."""
        return self.norm if self.factor is None else self.norm / self.factor


def _may_look(values: Tensor) -> bool:
    """Whether Python may branch on them: a GPU would wait, and torch.compile and fake tensors have none."""
    return type(values) is Tensor and values.device.type == "cpu" and not torch.compiler.is_compiling()


def _within(values: Tensor, low: float, high: float) -> bool:
    if values.numel() == 0:
        return True
    least, most = values.aminmax()
    return low <= least.item() and most.item() <= high


def scaled(v: Tensor, dim: int) -> Scaled:
    """The vectors of v [n, m], fp32 or fp64, along `dim` with their norms, scaled where these need it."""
    norm = torch.linalg.vector_norm(v, dim=dim)
    safe, up, down = RANGES[v.dtype]
    if _may_look(norm):
        if _within(norm, 1 / safe, safe):
            return Scaled(v, norm, ordinary=True)
        odd = ~((norm >= 1 / safe) & (norm <= safe))
        if not (v if dim else v.t())[odd].any():  # only zeros, such as padding
            return Scaled(v, norm)
    factor = torch.ones_like(norm).masked_fill_(norm < 1 / safe, up).masked_fill_(norm > safe, down)
    v = v * factor.unsqueeze(dim)
    return Scaled(v, torch.linalg.vector_norm(v, dim=dim), factor)


def scaled_rows(v: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of v [n, m] whose `own` inverse norms are known, their inverse norms, and the rows' factor or None.

    If one needs it, all are scaled to norms in (1, 2], whose squares a gradient can take. Rows that pass no gradient or
    are not finite become zero, so that they reach no sum over the rows.
    """
    safe = RANGES[v.dtype].safe
    if _may_look(inverse):
        if _within(inverse, 1 / safe, safe):
            return v, inverse, None
        odd = ~((inverse >= 1 / safe) & (inverse <= safe)) & (inverse != 0)
        if not odd.any():
            return v, inverse, None
    inverse, exponent = inverse.frexp()
    factor = torch.ldexp(torch.ones_like(inverse), exponent)
    return (v * factor.unsqueeze(1)).masked_fill_(~(inverse > 0).unsqueeze(1), 0), inverse, factor


def unit(v: Tensor, dim: int) -> Tensor:
    """The vectors of v [n, m] along `dim` scaled to length 1; a zero vector stays zero."""
    found = scaled(v, dim)
    return found.vectors / found.norm.masked_fill(found.norm == 0, 1).unsqueeze(dim)
