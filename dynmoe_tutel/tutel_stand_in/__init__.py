"""A stand-in for the part of Tutel that training scripts use, for machines without Tutel.

`install()` makes `from tutel import moe, system, net` and `tutel.impls.moe_layer` importable: the layer and functions
come from `dynmoe_tutel.moe`, with Tutel's defaults (`layer`); `system`, `net`, `sharding` and `modules` have the rest.
Importing anything else raises an error that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..gates import GATE_TYPES, TUTELS_OWN

__all__ = ["install", "installed", "remove", "tutel_is_importable"]

_OWN = "dynmoe_tutel"
_HERE = f"{_OWN}.tutel_stand_in"
_WHOLE = {  # modules with every public name provided, each from the first of these that has it
    "tutel.moe": (f"{_HERE}.layer", f"{_OWN}.moe"),
    "tutel.system": (f"{_HERE}.system",),
    "tutel.net": (f"{_HERE}.net", f"{_HERE}.sharding"),
    "tutel.impls.communicate": (f"{_HERE}.net", f"{_HERE}.sharding"),
}
_NAMES: dict[str, dict[str, tuple[str, str]]] = {  # module -> name -> (module, name) that provides it
    "tutel": {},
    "tutel.impls": {},
    "tutel.impls.moe_layer": {name: (f"{_HERE}.layer", name) for name in ("MOELayer", "moe_layer")},
    "tutel.impls.fast_dispatch": {
        name: (f"{_OWN}.moe", name) for name in ("extract_critical", "fast_decode", "fast_dispatcher", "fast_encode")
    },
    "tutel.jit_kernels": {},
    "tutel.jit_kernels.gating": {"fast_cumsum_sub_one": (f"{_OWN}.moe", "fast_cumsum_sub_one")},
    "tutel.gates": {},
    **{
        f"tutel.gates.{name}": {"Gate": (f"{_OWN}.gates", kind.cls.__name__)}
        for name, kind in GATE_TYPES.items()
        if name not in TUTELS_OWN
    },
    "tutel.gates.top": dict.fromkeys(("Gate", "LinearTopKGate"), (f"{_HERE}.modules", "LinearTopKGate")),
    "tutel.gates.cosine_top": dict.fromkeys(("Gate", "CosineTopKGate"), (f"{_HERE}.modules", "CosineTopKGate")),
    "tutel.experts": {},
    "tutel.experts.ffn": dict.fromkeys(
        ("ExpertModule", "FusedExpertsNetwork"), (f"{_HERE}.modules", "FusedExpertsNetwork")
    ),
}


def _not_provided(name: str) -> str:
    return (
        f"{name} needs Tutel itself, which is not installed: this is dynmoe_tutel's stand-in, with the names that "
        "training scripts use. Tutel's README says how to install it: https://github.com/microsoft/Tutel"
    )


class _StandIn(ModuleType):
    """A module of the stand-in: a package without a path, so that importing its submodules asks `_Refusal`."""

    def __init__(self, name: str) -> None:
        super().__init__(name, f"dynmoe_tutel's stand-in for {name}.")
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []
        self.__package__ = name
        self.__all__ = self._public()

    def _public(self) -> list[str]:
        if self.__name__ in _WHOLE:
            return sorted({name for whole in _WHOLE[self.__name__] for name in importlib.import_module(whole).__all__})
        below = (name.removeprefix(f"{self.__name__}.") for name in (*_WHOLE, *_NAMES) if name != self.__name__)
        children = [name for name in below if "." not in name]
        return sorted({*_NAMES[self.__name__], *children})

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            if found := _NAMES.get(self.__name__, {}).get(name):
                return getattr(importlib.import_module(found[0]), found[1])
            for whole in _WHOLE.get(self.__name__, ()):
                if name in (module := importlib.import_module(whole)).__all__:
                    return getattr(module, name)
        raise AttributeError(_not_provided(f"{self.__name__}.{name}"), name=name, obj=self)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


class _Refusal:
    """The last finder: refuses modules that the stand-in lacks, with a message that says why."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """ImportError for modules below `tutel` (Python would replace a ModuleNotFoundError's message)."""
        if name.startswith("tutel."):
            raise ImportError(_not_provided(name), name=name)


_modules: dict[str, ModuleType] = {}
_hidden: dict[str, ModuleType] = {}  # modules of a folder named tutel


def installed() -> bool:
    """Whether `tutel` is the stand-in."""
    return "tutel" in _modules and sys.modules.get("tutel") is _modules["tutel"]


def tutel_is_importable() -> bool:
    """Whether Tutel itself is imported or can be found; a folder named tutel without code does not count."""
    if installed():
        return False
    if (module := sys.modules.get("tutel")) is not None:
        return not _is_folder(module.__spec__)
    spec = importlib.util.find_spec("tutel")
    return spec is not None and not _is_folder(spec)


def _is_folder(spec: ModuleSpec | None) -> bool:
    """Whether the spec is of a namespace package."""
    return spec is not None and spec.origin is None and spec.submodule_search_locations is not None


def install() -> None:
    """Put the stand-in into `sys.modules`; RuntimeError if Tutel itself is installed."""
    if installed():
        return
    if tutel_is_importable():
        raise RuntimeError(
            "Tutel is installed, and its stand-in must not hide it: call dynmoe_tutel.tutel_backend.register() instead"
        )
    for name in {**_NAMES, **_WHOLE}:
        _modules[name] = _StandIn(name)
    for name, module in _modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(_modules[parent], child, module)
    _modules["tutel"].system_init = _modules["tutel.system"]  # type: ignore[attr-defined]
    _hidden.update({name: module for name, module in sys.modules.items() if name.split(".")[0] == "tutel"})
    for name in _hidden:
        del sys.modules[name]
    sys.modules.update(_modules)
    sys.meta_path.append(_Refusal)


def remove() -> None:
    """Undo `install()`."""
    for name, module in _modules.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    sys.modules.update(_hidden)
    _modules.clear()
    _hidden.clear()
    if _Refusal in sys.meta_path:
        sys.meta_path.remove(_Refusal)
    if f"{__name__}.system" in sys.modules:
        sys.modules[f"{__name__}.system"].forget_session()
