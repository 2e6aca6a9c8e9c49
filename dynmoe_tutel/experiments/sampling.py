"""Which items a training step takes: a walk through a fresh order every epoch, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def walk(size: int, step: int, count: int, stream: Callable[[int], torch.Generator]) -> Tensor:
    """Positions [count] int64 in 0 ... size - 1 that step 0, 1, ... takes.

    Epoch 1, 2, ... is a permutation drawn from `stream(epoch)`; a step may span the end of one, or several.
    """
    first, last = step * count, (step + 1) * count
    picked = []
    for epoch in range(first // size, (last - 1) // size + 1):
        order = torch.randperm(size, generator=stream(epoch + 1))
        start = epoch * size
        picked.append(order[max(first - start, 0) : last - start])
    return torch.cat(picked)
