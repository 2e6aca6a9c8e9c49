"""Puts every new tensor at the end (or start) of a protected page, so that an out-of-bounds access ends the process.

It works like a GPU's memory checker, for Triton's interpreter, which reads and writes raw addresses. New memory is NaN.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(like: Tensor, side: Literal["end", "start"]) -> Tensor:
    """Memory of the size, strides and dtype of `like`, filled with 0xff, next to a page without access."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
    size = extent * like.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)  # unmapped with the tensor that holds it
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(address, 0xFF, (pages + 1) * PAGE)
    forbidden = address + pages * PAGE if side == "end" else address
    if _libc.mprotect(ctypes.c_void_p(forbidden), PAGE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = pages * PAGE - size if side == "end" else PAGE
    flat = torch.frombuffer(memory, dtype=like.dtype, count=extent, offset=offset)
    return flat.as_strided(like.shape, like.stride())


class GuardPages(TorchDispatchMode):
    """Moves every operation's results, except views, into guarded memory."""

    def __init__(self, side: Literal["end", "start"]) -> None:
        super().__init__()
        self.side = side

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, then guard its results."""
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}

        def move(t: Tensor) -> Tensor:
            fresh = t.numel() > 0 and t.untyped_storage().data_ptr() not in given
            if not fresh or t.device.type != "cpu" or 0 in t.stride():
                return t
            copy = guarded(t, self.side)
            if not func.__name__.startswith(("empty", "new_empty")):
                copy.copy_(t)
            return copy

        return tree_map_only(Tensor, move, func(*args, **kwargs))
