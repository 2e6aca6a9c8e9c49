"""The activation functions of `kernels.activations` and their derivatives for Triton kernels; fp32 in, fp32 out."""

import triton
import triton.language as tl


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """act(h)."""
    if ACTIVATION == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
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
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        return cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
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
