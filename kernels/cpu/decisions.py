"""The compiled loop of a top-any gate's decisions."""

# mypy: ignore-errors
# (numba infers the types)

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compiled import compiled, inlined

_0 = np.float32(0)


@intrinsic
def _lowest_bit(_: Any, word: Any) -> Any:
    def zeros(_c: Any, code: Any, _s: Any, args: Any) -> Any:
        return code.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), zeros


@compiled
def decide(
    part: int, first: int, last: int, size: int, cos: Any, inverse: Any, own: Any, limit: Any, active: Any,
    mask: Any, max_k: int, keeps_best: bool, fallback: bool, bits: Any, unrouted: Any, counts: Any,
) -> None:  # fmt: skip
    """A top-any gate's assignment of blocks first to last - 1 of `size` tokens; see `..threshold_gate`.

    In: cos [T, E] without 1 / ||x||, which is `inverse`; own [E], inf for inactive slots; limit [E], own + shift.
    Out: the cosines in place; bits, unrouted, counts [blocks, E]. No cosine may be NaN.
    """
    T, E = cos.shape
    kept = np.empty(bits.shape[1], np.int64)
    for block in range(first, last):
        count = counts[block]
        for t in range(block * size, min(T, block * size + size)):
            row, word = cos[t], bits[t]
            if mask.shape[0] > 0 and not mask[t]:
                row[:], word[:], unrouted[t] = _0, 0, False
                continue
            scale = inverse[t]
            for e in range(E):
                row[e] *= scale
            k = 0
            for w in range(word.shape[0]):
                found, values, limits = 0, row[64 * w : 64 * w + 64], limit[64 * w : 64 * w + 64]
                for e in range(values.shape[0]):
                    passed = np.int64(values[e] > limits[e])
                    found |= passed << e
                    k += passed
                word[w] = found
            unrouted[t] = k == 0
            if 0 < max_k < k:
                _keep_largest(row, own, word, kept, k, max_k)
            elif k == 0:
                _rescue(row, own, active, word, unrouted, t, keeps_best, fallback)
            for w in range(word.shape[0]):
                found, totals = word[w], count[64 * w : 64 * w + 64]
                for e in range(totals.shape[0]):
                    totals[e] += np.int32((found >> e) & 1)


@inlined
def _keep_largest(row: Any, own: Any, word: Any, kept: Any, k: int, n: int) -> None:
    """Of a token's k assignments keep the n of largest margin, of equal ones those of lower slots; NaN is the largest.

    The others are dropped one by one, or those that stay found one by one, whichever are fewer. `kept` [W] is room.
    """
    if k <= 2 * n:
        for _ in range(k - n):
            slot = _extreme(row, own, word, False)
            word[slot >> 6] &= ~(1 << (slot & 63))
    else:
        kept[:] = 0
        for _ in range(n):
            slot = _extreme(row, own, word, True)
            word[slot >> 6] &= ~(1 << (slot & 63))
            kept[slot >> 6] |= 1 << (slot & 63)
        word[:] = kept


@inlined
def _extreme(row: Any, own: Any, word: Any, largest: bool) -> Any:
    """The slot of the largest margin, of equal ones the lowest, or of the least margin, of equal ones the highest."""
    found, slot = np.float32(-np.inf if largest else np.inf), -1
    for w in range(word.shape[0]):
        left = word[w]
        while left:
            e = 64 * w + _lowest_bit(left)
            margin = row[e] - own[e]
            margin = np.float32(np.inf) if margin != margin else margin
            better = slot < 0 or margin > found if largest else margin <= found
            slot, found = (e, margin) if better else (slot, found)
            left &= left - 1
    return slot


@inlined
def _rescue(
    row: Any, own: Any, active: Any, word: Any, unrouted: Any, t: int, keeps_best: bool, fallback: bool
) -> None:  # fmt: skip
    """An expert for a token without: that of largest margin, if it is above 0, else with fallback of largest cosine."""
    slot, best = -1, _0
    if keeps_best:
        for e in range(row.shape[0]):
            if row[e] - own[e] > best:
                slot, best = e, row[e] - own[e]
        unrouted[t] = slot < 0
    if slot < 0 and fallback:
        slot, best = 0, np.float32(-np.inf)
        for e in range(row.shape[0]):
            if active[e] and row[e] > best:
                slot, best = e, row[e]
    if slot >= 0:
        word[slot >> 6] |= 1 << (slot & 63)
