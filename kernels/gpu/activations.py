"""The activation functions of `kernels.activations` and their derivatives for Triton kernels; fp32 in, fp32 out."""

import triton
import triton.language as tl


@triton.jit
def _normal(h):
    """Phi(h), the normal distribution, and exp(-h^2 / 2), which the derivative of gelu shares with it.

    Phi(-|h|) is the exponential times a polynomial of t = 1 / (1 + 0.285 |h|), fitted for the least error of gelu: at
    most 3e-8 absolute, and relative 5e-5 for h > -4, 3e-4 everywhere. erf chooses each coefficient among two.
    """
    square = h * h
    exponential = tl.exp2(-0.7213475204444817 * square)
    d = 1.0 + 0.285 * tl.abs(h)
    t = tl.rsqrt(d * d)  # one instruction, unlike a division
    tail = 0.329230937 - 0.095886606 * t
    tail = 0.211088912 + t * (-0.149821905 + t * tail)
    tail = t * (0.115796096 + t * (0.0895925869 + t * tail))
    tail *= exponential
    return tl.where(h > 0, 1.0 - tail, tail), exponential


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """act(h)."""
    if ACTIVATION == "gelu":
        cdf, _ = _normal(h)
        return h * cdf
    elif ACTIVATION == "gelu_tanh":
        return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))  # tanh(u) = 2 sigmoid(2 u) - 1
    elif ACTIVATION == "relu":
        return tl.where(h <= 0, 0.0, h)  # NaN stays
    elif ACTIVATION == "silu":
        return h * tl.sigmoid(h)
    elif ACTIVATION == "squared_relu":
        positive = tl.where(h <= 0, 0.0, h)
        return positive * positive
    else:
        tl.static_assert(ACTIVATION == "identity")
        return h


@triton.jit
def derivative(h, ACTIVATION: tl.constexpr):
    """act'(h)."""
    if ACTIVATION == "gelu":
        cdf, exponential = _normal(h)
        return cdf + h * 0.3989422804014327 * exponential
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        return s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    elif ACTIVATION == "relu":
        return tl.where(h <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(h)
        return s * (1.0 + h * (1.0 - s))
    elif ACTIVATION == "squared_relu":
        return 2.0 * tl.where(h <= 0, 0.0, h)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.full(h.shape, 1.0, tl.float32)
