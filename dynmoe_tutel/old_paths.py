"""Keeps old module paths importable, also for pickles, until 0.2 removes this file.

An old path gives the module itself, not a copy, and imports it on first use.
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
    "late_count": "capacity",  # in pickled layers, which then say what to do
    "meters": "metrics",
    "policy": "adaptive.policy",
    "rebalance": "adaptive.rebalance",
    "records": "adaptive.records",
    "schedule": "adaptive.schedule",
}
_PACKAGE = __name__.rpartition(".")[0]


class _OldPaths(MetaPathFinder, Loader):
    """The last finder: paths that still have a file never reach it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module into `sys.modules`, where the import looks for it afterwards."""
        sys.modules[module.__name__] = import_module(f"{_PACKAGE}.{MOVED[module.__name__.rpartition('.')[2]]}")


def moved(name: str) -> ModuleType:
    """The module that was `dynmoe_tutel.<name>`; AttributeError if there was none."""
    if name not in MOVED:
        raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
    return import_module(f"{_PACKAGE}.{name}")


sys.meta_path.append(_OldPaths())
