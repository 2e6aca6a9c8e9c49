"""`deepspeed.moe` with DynMoE's `layer.MoE`; every other name is DeepSpeed's."""

from __future__ import annotations

import importlib
from typing import Any

from . import layer

__all__ = ["layer"]


def __getattr__(name: str) -> Any:
    import deepspeed.moe

    if hasattr(deepspeed.moe, name):
        return getattr(deepspeed.moe, name)
    try:
        return importlib.import_module(f"deepspeed.moe.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor has deepspeed.moe") from None
