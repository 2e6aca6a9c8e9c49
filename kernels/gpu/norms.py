"""The rule of `kernels.norms` in Triton: which vectors to scale by a power of two, and their inverse norms."""

import triton
import triton.language as tl

from ..norms import SINGLE

SHORT = tl.constexpr(1 / SINGLE.safe)
LONG = tl.constexpr(SINGLE.safe)
UP = tl.constexpr(SINGLE.up)
DOWN = tl.constexpr(SINGLE.down)
LEAST = tl.constexpr(2.0**-126)  # of normal numbers


@triton.jit
def tau_of(scale):
    """The scale of the cosines, at a pointer; 1 for None."""
    return 1.0 if scale is None else tl.load(scale).to(tl.float32)


@triton.jit
def is_ordinary(norm):
    """Whether to use the vector as it is; not so for a zero vector or one that is not finite."""
    return (norm >= SHORT) & (norm <= LONG)


@triton.jit
def factor_for(norm):
    """The power of two that brings a vector of this norm, computed without one, to ordinary length."""
    return tl.where(norm < SHORT, UP, tl.where(norm > LONG, DOWN, 1.0))


@triton.jit
def inverse_of(norm):
    """1 / norm; 0 for a zero vector, NaN for one that is not finite."""
    inverse = tl.where(norm > 0, tl.div_rn(1.0, norm), 0.0)
    return tl.where(norm < float("inf"), inverse, float("nan"))


@triton.jit
def own_inverse(inverse, factor):
    """The inverse norm of the vector before it was scaled; 0 if it passes no gradient."""
    inverse = inverse * factor
    return tl.where(inverse > UP, 0.0, inverse)


@triton.jit
def factor_of_inverse(inverse):
    """The power of two that brings a vector with this `own_inverse` near norm 1; 1 for one of ordinary length."""
    exponent = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(is_ordinary(inverse), 1.0, tl.maximum(exponent, LEAST))
