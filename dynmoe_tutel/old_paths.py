"""Modules by the paths that they had before 0.2, for imports and for pickles; this file goes then.

An old path gives the module itself, not a copy: what is set on one is set on the other. Nothing is imported for it
before somebody asks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "controller": "adaptive.controller",
    "distributed_checkpoint": "checkpoint.distributed",
    "late_count": "capacity",  # in pickled layers
    "meters": "metrics",
    "policy": "adaptive.policy",
    "rebalance": "adaptive.rebalance",
    "records": "adaptive.records",
    "schedule": "adaptive.schedule",
}
_PACKAGE = __name__.rpartition(".")[0]


class _OldPaths(MetaPathFinder, Loader):
    """Asked after all other finders: a path that still has a file is not its business."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Python takes what stands in `sys.modules` after this."""
        sys.modules[module.__name__] = import_module(f"{_PACKAGE}.{MOVED[module.__name__.rpartition('.')[2]]}")


def moved(name: str) -> ModuleType:
    """The module that was `dynmoe_tutel.<name>`; AttributeError where there was none."""
    if name not in MOVED:
        raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
    return import_module(f"{_PACKAGE}.{name}")


sys.meta_path.append(_OldPaths())
