"""timm without torchvision: `import_timm` imports timm with a stand-in for torchvision that leaves no trace.

timm imports torchvision for transforms, data sets and a frozen normalisation; its models need none of them. During the
import of timm, the stand-in answers every `import torchvision...` with modules of empty classes. Then it removes itself
from `sys.meta_path` and `sys.modules`, so that no other package believes torchvision is installed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest

NAME = "torchvision"


class _AnyAttribute(type):
    """Classes with every public attribute, as `InterpolationMode.NEAREST` needs."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _StandIn(types.ModuleType):
    """A module with an empty class for every public name."""

    __version__ = "0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        made = _AnyAttribute(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != NAME:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_timm() -> types.ModuleType:
    """Import timm, with torchvision if installed; skip the calling module if timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install 'dynmoe_tutel[vision]'", allow_module_level=True)
    if importlib.util.find_spec(NAME) is not None:
        return importlib.import_module("timm")
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.partition(".")[0] == NAME]:
            del sys.modules[name]
