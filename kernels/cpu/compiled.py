"""How numba compiles loops.

Compilation takes seconds, at the first call on a machine. Later processes read the cache, beside the file of a loop or,
where that cannot be written, in the user's cache folder. The cache knows of changes in a loop's own file only, so no
compiled function is imported from another file.
"""

from __future__ import annotations

from typing import Any

import numba

# Sums in any order and products without a rounding in between, which vector units need; NaN and inf as ever.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}


def compiled(loop: Any) -> Any:
    """The loop in machine code; it holds no lock of Python's."""
    try:
        return numba.njit(nogil=True, cache=True, **OPTIONS)(loop)
    except RuntimeError:  # no folder for a cache can be written
        return numba.njit(nogil=True, **OPTIONS)(loop)


def inlined(function: Any) -> Any:
    """A function that loops of its file contain."""
    return numba.njit(inline="always", **OPTIONS)(function)
