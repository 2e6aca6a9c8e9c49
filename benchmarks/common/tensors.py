"""Seeded draws on any device, and how far two results are apart.

On the meta device, where tensors have no values, nothing is drawn and nothing differs: a benchmark can be run there for
its launches alone (`launches.rehearsal`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def generator_on(device: torch.device, seed: int) -> torch.Generator | None:
    """A seeded generator of the device: to draw on a CPU would take many seconds."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def difference(found: Any, expected: Any) -> float:
    """The largest relative RMS difference, infinite if one is not finite; for integers, the share that differs."""
    if not isinstance(found, Tensor):
        return max(difference(f, e) for f, e in zip(found, expected, strict=True))
    if found.shape != expected.shape:
        return float("inf") if found.numel() or expected.numel() else 0.0
    if not found.numel() or found.is_meta:
        return 0.0
    if not found.is_floating_point():
        return float((found != expected).double().mean())
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")  # max() may skip a NaN


def equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same bits; a NaN differs."""
    return found.is_meta or torch.equal(found, expected)
