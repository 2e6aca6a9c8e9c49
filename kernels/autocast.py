"""Kernels choose their own types: autocast must not recast the products inside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(kernel: Callable[P, R]) -> Callable[P, R]:
    """`kernel` with autocast off for the device of its first argument."""

    @wraps(kernel)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return kernel(*args, **kwargs)

    return wrapped
