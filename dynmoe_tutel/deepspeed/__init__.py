"""DynMoE-DeepSpeed on stock DeepSpeed: `import dynmoe_tutel.deepspeed as deepspeed` is the one line to change.

`deepspeed.moe.layer.MoE(..., k=-1, max_expert_num=...)` is DynMoE's; every other name is DeepSpeed's. Or
`register()` puts the same into DeepSpeed itself. Only this package imports `deepspeed`.
"""

from __future__ import annotations

import importlib
from typing import Any

try:
    import deepspeed as _stock
except ImportError as error:
    raise ImportError(
        f"dynmoe_tutel.deepspeed needs DeepSpeed, which cannot be imported ({error}): "
        "pip install 'dynmoe_tutel[deepspeed]'"
    ) from error

from . import moe
from .engine import initialize
from .moe.layer import MoE
from .registration import register, registered, unregister

__all__ = ["MoE", "initialize", "moe", "register", "registered", "unregister"]


def __getattr__(name: str) -> Any:
    if hasattr(_stock, name):
        return getattr(_stock, name)
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"deepspeed.{name}")
        except ModuleNotFoundError:
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor has deepspeed")


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(_stock)})
