"""Rows of a loop dealt to threads, and tensors as the arrays that loops take."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST = 1 << 15  # elements that are worth a thread

Loop = Callable[..., None]


def array(tensor: Tensor | None, dim: int = 1) -> np.ndarray:
    """The memory of a contiguous tensor, bf16 as uint16; of None, an empty array of `dim` dimensions."""
    if tensor is None:
        return np.empty((0,) * dim, np.float32)
    assert tensor.is_contiguous()
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def parts(n: int, width: int) -> int:
    """Into how many parts to cut n rows of `width` elements: torch's number of threads, if each has enough to do."""
    return max(1, min(torch.get_num_threads(), n, n * width // LEAST))


def run(loop: Loop, n: int, number: int, *args: Any) -> None:
    """Call loop(part, first, last, *args) for `number` parts of range(n), each in a thread."""
    bounds = list(enumerate(pairwise(n * part // number for part in range(number + 1))))
    own, others = bounds[:1], list[Future[None]]()
    for part, bound in bounds[1:]:
        try:
            others.append(_pool().submit(loop, part, *bound, *args))
        except RuntimeError as error:
            if not str(error).startswith("cannot schedule"):  # else the pool may still have the part
                raise
            own.append((part, bound))  # the main thread has ended: a pool takes no more, but other threads go on
    for part, bound in own:
        loop(part, *bound, *args)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "dynmoe_tutel")  # it starts no more threads than were busy at once


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has no threads
