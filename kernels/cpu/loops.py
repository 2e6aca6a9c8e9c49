"""Compiled loops: activations, the experts' rows, the gradient of a token, and scores.

Arrays are contiguous, and fp32. Rows of the experts, tokens and their gradients may be bf16, as the uint16 of its bits,
read to fp32 and rounded to nearest even when written. A loop that takes (part, first, last) does rows, columns or
tokens first to last - 1, and may add to entry `part` of an array of partial sums; see `threads.run`. Sums for biases
and thresholds are fp64. `segments` [S, 3] holds an expert, its first row and its last row + 1.

exp is Cephes' polynomial. gelu takes the tail of the normal distribution as

    1 - Phi(z) = exp(-z^2 / 2) t P(t),  t = 1 / (1 + 0.21 z),  z >= 0

with P of degree 8 fitted by least squares to a relative error of 2e-8 on [0, 14]; its exponential serves the slope too.
"""

# mypy: ignore-errors
# (numba infers the types)

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .compiled import OPTIONS, compiled, inlined

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "squared_relu", "identity")  # an activation's code is its place
GELU, GELU_TANH, SILU, RELU, SQUARED_RELU = range(5)

_0, _1 = np.float32(0), np.float32(1)
_TAIL = (0.08371157, 0.08506887, 0.06919209, 0.12487301, -0.09392581, 0.34940182, -0.33025403, 0.28358884, -0.07165636)
_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8 = (np.float32(c) for c in _TAIL)
_DENSITY = np.float32((2 * math.pi) ** -0.5)
_TANH_1, _TANH_3 = np.float32((8 / math.pi) ** 0.5), np.float32(0.044715 * (8 / math.pi) ** 0.5)


def _instruction(source: Any, result: Any, emit: Any) -> Any:
    """A function of one number that is one or a few instructions of LLVM: emit(builder, value)."""

    @intrinsic
    def instruction(_: Any, value: Any) -> Any:
        return result(source), lambda _context, builder, _signature, args: emit(builder, args[0])

    return instruction


_I32, _F32 = ir.IntType(32), ir.FloatType()
_truncated = _instruction(types.float32, types.int32, lambda b, x: b.fptosi(x, _I32))
_float = _instruction(types.int32, types.float32, lambda b, n: b.sitofp(n, _F32))
_bits = _instruction(types.float32, types.uint32, lambda b, x: b.bitcast(x, _I32))
_of_bits = _instruction(types.uint32, types.float32, lambda b, n: b.bitcast(n, _F32))

_power_of_two = _instruction(
    types.int32,
    types.float32,
    lambda b, n: b.bitcast(b.shl(b.add(n, ir.Constant(_I32, 127)), ir.Constant(_I32, 23)), _F32),
)


def _wide(value):
    """A number of an array, in fp32."""


@overload(_wide, jit_options=OPTIONS)
def _wide_of_dtype(value):
    if value == types.uint16:
        return lambda value: _of_bits(np.uint32(value) << np.uint32(16))
    return lambda value: value


def _put(row, j, value):
    """Write an fp32 number to an array."""


@overload(_put, jit_options=OPTIONS)
def _put_of_dtype(row, j, value):
    if row.dtype != types.uint16:

        def put(row, j, value):
            row[j] = value

        return put

    def put_rounded(row, j, value):
        n = _bits(value)
        rounded = (n + np.uint32(0x7FFF) + ((n >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        row[j] = np.uint16(rounded if value == value else np.uint32(0x7FC0))

    return put_rounded


@inlined
def _exp_negative(x: Any) -> Any:
    """exp(x) for x <= 0; 0, where fp32 has no normal number: a slope multiplies it by powers of x."""
    x = np.float32(-88) if x < np.float32(-88) else x  # of which n is -127, and the power of two 0
    n = _truncated(x * np.float32(1.44269504) - np.float32(0.5))
    r = x - _float(n) * np.float32(0.693359375) + _float(n) * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + _1) * _power_of_two(n)


@inlined
def _sigmoid(x: Any) -> Any:
    return _sigmoids(x)[0]


@inlined
def _sigmoids(x: Any) -> Any:
    """sigmoid(x) and 1 - sigmoid(x), which would be rounded away if subtracted."""
    e = _exp_negative(-abs(x))
    large, small = _1 / (_1 + e), e / (_1 + e)
    return (large if x > 0 else small), (small if x > 0 else large)


@inlined
def _phi(h: Any) -> Any:
    """Phi(h) and exp(-h^2 / 2)."""
    z = abs(h)
    e = _exp_negative(np.float32(-0.5) * z * z)
    t = _1 / (_1 + np.float32(0.21) * z)
    tail = ((((((((_T8 * t + _T7) * t + _T6) * t + _T5) * t + _T4) * t + _T3) * t + _T2) * t + _T1) * t + _T0) * t * e
    return (_1 - tail if h > 0 else tail), e


@inlined
def _phi_tanh(h: Any) -> Any:
    """(1 + tanh y) / 2 = sigmoid(2 y) of gelu's tanh form, and 1 less it."""
    return _sigmoids(h * (_TANH_1 + _TANH_3 * h * h))


@compiled
def activate(activation: int, h: Any, a: Any) -> None:
    """a = act(h), for a row [H]."""
    H = h.shape[0]
    if activation == GELU:
        for j in range(H):
            v = _wide(h[j])
            _put(a, j, v * _phi(v)[0])
    elif activation == GELU_TANH:
        for j in range(H):
            v = _wide(h[j])
            _put(a, j, v * _phi_tanh(v)[0])
    elif activation == SILU:
        for j in range(H):
            v = _wide(h[j])
            _put(a, j, v * _sigmoid(v))
    elif activation == RELU:
        for j in range(H):
            v = _wide(h[j])
            _put(a, j, _0 if v < 0 else v)
    elif activation == SQUARED_RELU:
        for j in range(H):
            v = _wide(h[j])
            _put(a, j, _0 if v < 0 else v * v)
    else:
        for j in range(H):
            v = _wide(h[j])
            _put(a, j, v)


@compiled
def activate_with_slope(activation: int, h: Any, a: Any, slope: Any) -> None:
    """a = act(h) and slope = act'(h), for a row [H]; slope is fp32."""
    H = h.shape[0]
    if activation == GELU:
        for j in range(H):
            v = _wide(h[j])
            phi, e = _phi(v)
            _put(a, j, v * phi)
            slope[j] = phi + v * e * _DENSITY
    elif activation == GELU_TANH:
        for j in range(H):
            v = _wide(h[j])
            phi, rest = _phi_tanh(v)
            _put(a, j, v * phi)
            slope[j] = phi + v * phi * rest * (_TANH_1 + np.float32(3) * _TANH_3 * v * v)
    elif activation == SILU:
        for j in range(H):
            v = _wide(h[j])
            s, rest = _sigmoids(v)
            _put(a, j, v * s)
            slope[j] = s * (_1 + v * rest)
    elif activation == RELU:
        for j in range(H):
            v = _wide(h[j])
            _put(a, j, _0 if v < 0 else v)
            slope[j] = _0 if v <= 0 else _1
    elif activation == SQUARED_RELU:
        for j in range(H):
            v = _wide(h[j])
            _put(a, j, _0 if v < 0 else v * v)
            slope[j] = _0 if v < 0 else np.float32(2) * v
    else:
        for j in range(H):
            v = _wide(h[j])
            _put(a, j, v)
            slope[j] = _1


@compiled
def hidden_rows(
    part: int, first: int, last: int, activation: int, segments: Any, h: Any, b1: Any, u: Any, b3: Any, a: Any
) -> None:  # fmt: skip
    """Add the biases, unless empty, to h and u in place, then a = act(h), times u unless that is empty; rows [., H]."""
    gated, H = u.shape[0] > 0, h.shape[1]
    value = np.empty(H, np.float32)
    for s in range(segments.shape[0]):
        e, start, stop = segments[s]
        for i in range(max(start, first), min(stop, last)):
            if b1.shape[0] > 0:
                _add_bias(h[i], b1[e])
            if gated and b3.shape[0] > 0:
                _add_bias(u[i], b3[e])
            if gated:
                activate(activation, h[i], value)
                row, factor = a[i], u[i]
                for j in range(H):
                    _put(row, j, value[j] * _wide(factor[j]))
            else:
                activate(activation, h[i], a[i])


@inlined
def _add_bias(row: Any, bias: Any) -> None:
    for j in range(row.shape[0]):
        _put(row, j, _wide(row[j]) + bias[j])


@inlined
def _add_to(sums: Any, row: Any) -> None:
    for j in range(row.shape[0]):
        sums[j] += _wide(row[j])


@compiled
def hidden_gradients(
    part: int, first: int, last: int, activation: int, segments: Any, h: Any, u: Any, a: Any, d_a: Any, gate: Any,
    d_gate: Any, d_u: Any, d_b1: Any, d_b3: Any,
) -> None:  # fmt: skip
    """d_gate += <d_a, a>, and in place of d_a the gradient of h, where gate * d_a is that of a; a is computed anew.

    Without gate, if it is empty, that is 1. Unless u is empty its gradient goes to d_u. d_b1, d_b3 [parts, S, H] get
    sums over the rows, unless empty. Rows [., H].
    """
    gated, H = u.shape[0] > 0, h.shape[1]
    value, slope = np.empty(H, np.float32), np.empty(H, np.float32)
    for s in range(segments.shape[0]):
        _, start, stop = segments[s]
        for i in range(max(start, first), min(stop, last)):
            total, gradient, row = _0, d_a[i], a[i]
            k = gate[i] if gate.shape[0] > 0 else _1
            if gated:
                activate_with_slope(activation, h[i], value, slope)
                factor, of_factor = u[i], d_u[i]
                for j in range(H):
                    g, w = _wide(gradient[j]), _wide(factor[j])
                    total += g * value[j] * w
                    _put(row, j, value[j] * w)
                    _put(of_factor, j, g * value[j] * k)
                    _put(gradient, j, g * w * slope[j] * k)
                if d_b3.shape[0] > 0:
                    _add_to(d_b3[part, s], of_factor)
            else:
                activate_with_slope(activation, h[i], row, slope)
                for j in range(H):
                    g = _wide(gradient[j])
                    total += g * _wide(row[j])
                    _put(gradient, j, g * slope[j] * k)
            if d_b1.shape[0] > 0:
                _add_to(d_b1[part, s], gradient)
            d_gate[i] += total


@compiled
def row_gradients(
    part: int, first: int, last: int, source_of_row: Any, d_out: Any, scale: Any, segments: Any, b2: Any, d_row: Any,
    d_gate: Any, d_b2: Any,
) -> None:  # fmt: skip
    """d_row = d_out * scale of the row's source, and d_gate = <d_row, b2>, 0 if b2 is empty.

    d_b2 [parts, S, O] gets sums of d_row, unless empty.
    """
    O = d_out.shape[1]
    for s in range(segments.shape[0]):
        e, start, stop = segments[s]
        for i in range(max(start, first), min(stop, last)):
            t = source_of_row[i]
            row, source, k, total = d_row[i], d_out[t], scale[t], _0
            for j in range(O):
                _put(row, j, _wide(source[j]) * k)
            if b2.shape[0] > 0:
                bias = b2[e]
                for j in range(O):
                    total += _wide(row[j]) * bias[j]
            if d_b2.shape[0] > 0:
                _add_to(d_b2[part, s], row)
            d_gate[i] = total


@compiled
def gated_rows(part: int, first: int, last: int, segments: Any, gate: Any, d_row: Any, d_b2: Any) -> None:
    """Multiply d_row by its gate; d_b2 [parts, S, O] gets sums over the rows, unless empty."""
    for s in range(segments.shape[0]):
        _, start, stop = segments[s]
        for i in range(max(start, first), min(stop, last)):
            row = d_row[i]
            for j in range(row.shape[0]):
                _put(row, j, _wide(row[j]) * gate[i])
            if d_b2.shape[0] > 0:
                _add_to(d_b2[part, s], row)


@compiled
def add_rows(
    part: int, first: int, last: int, token_of_row: Any, rows: Any, scale: Any, segments: Any, b: Any, y: Any
) -> None:  # fmt: skip
    """y [T, .] fp32 of a row's token += (row + b of its expert) * scale of the token, in columns first to last - 1.

    Without b or scale, where they are empty, these are 0 and 1. A token's rows are added in their order.
    """
    for s in range(segments.shape[0]):
        e, start, stop = segments[s]
        for i in range(start, stop):
            t = token_of_row[i]
            k = scale[t] if scale.shape[0] > 0 else _1
            row, target = rows[i, first:last], y[t, first:last]
            if b.shape[0] > 0:
                bias = b[e, first:last]
                for j in range(row.shape[0]):
                    target[j] += (_wide(row[j]) + bias[j]) * k
            else:
                for j in range(row.shape[0]):
                    target[j] += _wide(row[j]) * k


@compiled
def token_gradients(
    part: int, first: int, last: int, token_offsets: Any, row_of_assignment: Any, expert_of_row: Any, d_gate: Any,
    unrouted: Any, centred: bool, score: Any, x: Any, unit: Any, inverse: Any, tau: float, d_x: Any, d_unit: Any,
    d_threshold: Any,
) -> None:  # fmt: skip
    """The router's part of a top-any layer's gradient, over the tokens' assignments alone.

    With ds = d_gate, less the token's mean if `centred`, 0 for an unrouted token; dcos = ds s (1 - s) tau / ||x||:
    d_x [T, D] += g - x <g, x> / ||x||^2, where g = sum of dcos unit[e]; d_unit [parts, E, D] += dcos x;
    d_threshold [parts, E] -= ds.
    """
    D = x.shape[1]
    g = np.empty(D, np.float32)
    for t in range(first, last):
        start, stop = token_offsets[t], token_offsets[t + 1]
        if unrouted[t] or start == stop:
            continue
        mean = _0
        if centred:
            for a in range(start, stop):
                mean += d_gate[row_of_assignment[a]]
            mean /= np.float32(stop - start)
        g[:] = _0
        token = x[t]
        for a in range(start, stop):
            row = row_of_assignment[a]
            e = expert_of_row[row]
            d_score = d_gate[row] - mean
            d_threshold[part, e] -= d_score
            d_cos = d_score * score[t, e] * (_1 - score[t, e]) * (tau * inverse[t])
            if d_score == 0:
                continue
            vector, of_vector = unit[e], d_unit[part, e]
            for j in range(D):
                g[j] += d_cos * vector[j]
                of_vector[j] += d_cos * _wide(token[j])
        radial = _0
        for j in range(D):
            radial += g[j] * _wide(token[j])
        radial *= inverse[t] * inverse[t]
        target = d_x[t]
        for j in range(D):
            target[j] += g[j] - _wide(token[j]) * radial


@compiled
def scores(part: int, first: int, last: int, tau: float, values: Any) -> None:
    """sigmoid(tau * value) in place of the values first to last - 1 of [N]."""
    own = values[first:last]
    for i in range(own.shape[0]):
        own[i] = _sigmoid(tau * own[i])
