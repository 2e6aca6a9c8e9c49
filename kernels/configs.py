"""Tile shapes of the Triton kernels, by architecture, dtype and shape; nothing is tuned while a program runs.

`python -m benchmarks.tune` measures candidates on the GPU at hand and writes `tuned/<architecture>.json`, which is read
before the rules below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

_assumed: ContextVar[str | None] = ContextVar("dynmoe_tutel_architecture", default=None)


@contextmanager
def assume(architecture: str) -> Iterator[None]:
    """Choose configurations for `architecture` ("sm_90", "gfx942"), whatever the device: for ahead-of-time compilation."""
    token = _assumed.set(architecture)
    try:
        yield
    finally:
        _assumed.reset(token)


@lru_cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942" and the like; "interpreter" for a CPU, where Triton's interpreter runs the kernels."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return _architecture(device) if device.type == "cuda" else "interpreter"


_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(device: torch.device) -> int:
    """Multiprocessors of the device: the size of a persistent grid."""
    if device.type == "cuda":
        return _processors(device)
    return _PROCESSORS.get(architecture(device), 4)
