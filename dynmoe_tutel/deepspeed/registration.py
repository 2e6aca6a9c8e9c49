"""`register()` puts DynMoE into DeepSpeed's own names, `unregister()` takes it out again."""

from __future__ import annotations

import sys
from types import ModuleType

import deepspeed
import deepspeed.moe

from .engine import initialize
from .moe import layer

_LAYER = "deepspeed.moe.layer"
_saved: dict[str, object] = {}


def registered() -> bool:
    """Whether `register()` is in effect."""
    return bool(_saved)


def register() -> None:
    """Make `deepspeed.moe.layer.MoE` and `deepspeed.initialize` DynMoE's; a second call does nothing.

    Names imported before do not change. The module `deepspeed.moe.layer` gives its place to this package's, which has
    all its names: its own class looks itself up there by name, and must go on finding itself.
    """
    if _saved:
        return
    _saved.update(layer=sys.modules[_LAYER], initialize=deepspeed.initialize)
    _put(layer, initialize)


def unregister() -> None:
    """Restore DeepSpeed; layers already built keep working."""
    if _saved:
        stock = _saved["layer"]
        assert isinstance(stock, ModuleType)
        _put(stock, _saved["initialize"])
        _saved.clear()


def _put(module: ModuleType, function: object) -> None:
    sys.modules[_LAYER] = deepspeed.moe.layer = module
    deepspeed.initialize = function
