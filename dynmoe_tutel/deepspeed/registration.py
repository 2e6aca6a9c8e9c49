"""`register()` puts DynMoE into DeepSpeed's own names, `unregister()` takes it out again."""

from __future__ import annotations

from typing import Any

import deepspeed
import deepspeed.moe.layer

from .engine import initialize
from .moe.layer import MoE

_saved: list[tuple[Any, str, Any]] = []


def registered() -> bool:
    """Whether `register()` is in effect."""
    return bool(_saved)


def register() -> None:
    """Put `MoE` into `deepspeed.moe.layer`, and `initialize` into `deepspeed`; a second call does nothing. Names imported before do not change.

    A layer of fixed k is DeepSpeed's own in all but the class, which is a subclass.
    """
    if _saved:
        return
    for owner, name, value in ((deepspeed.moe.layer, "MoE", MoE), (deepspeed, "initialize", initialize)):
        _saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


def unregister() -> None:
    """Restore DeepSpeed; layers already built keep working."""
    while _saved:
        owner, name, value = _saved.pop()
        setattr(owner, name, value)
