"""A script that imports `deepspeed` finds this package's `MoE` in it, and one that does not never pays for it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["provide_deepspeed"]

_GUEST, _OURS = "deepspeed", "dynmoe_tutel.deepspeed"


def provide_deepspeed(undo: ExitStack) -> None:
    """Register with DeepSpeed once it is imported; at once if it is already."""
    if _GUEST in sys.modules:
        _register(undo)
        return
    finder = _Finder(undo)
    sys.meta_path.insert(0, finder)
    undo.callback(_take_out, finder)


def _take_out(finder: MetaPathFinder) -> None:
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)


def _register(undo: ExitStack) -> None:
    ours = importlib.import_module(_OURS)
    if not ours.registered():
        undo.callback(ours.unregister)
    ours.register()


class _Finder(MetaPathFinder):
    """Lets the other finders find DeepSpeed, and has its loader followed by the registration."""

    def __init__(self, undo: ExitStack) -> None:
        self.undo, self._asks = undo, False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of `deepspeed` itself; None, for the next finder, of any other module."""
        if name != _GUEST or self._asks:
            return None
        self._asks = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asks = False
        if spec is not None and spec.loader is not None and spec.origin is not None:  # no folder without code
            spec.loader = _Loader(spec.loader, self.undo)
        return spec


class _Loader(Loader):
    """DeepSpeed's own loader, then the registration."""

    def __init__(self, own: Loader, undo: ExitStack) -> None:
        self.own, self.undo = own, undo

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As its own loader."""
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As its own loader, which the module then names as its own; then register."""
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        _register(self.undo)
