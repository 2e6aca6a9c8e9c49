"""`register()` puts this package's layer, gates and functions into Tutel, `unregister()` takes them out again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import tutel.checkpoint.gather
import tutel.checkpoint.scatter
import tutel.gates
import tutel.impls.moe_layer
import tutel.moe

from .. import moe
from ..gates import Gate, gate_class, make_gate, max_experts
from . import dispatch
from .checkpoint_tools import checkpoint_tool
from .layer import TOP_ANY, MOELayer

_saved: dict[str, Any] = {}


def registered() -> bool:
    """Whether `register()` is in effect."""
    return bool(_saved)


def register() -> None:
    """Put layer and gates into Tutel; a second call does nothing. Names imported earlier from Tutel do not change."""
    if _saved:
        return
    layers, functions = tutel.impls.moe_layer, tutel.moe
    replaced = [
        (layers, "MOELayer", MOELayer),
        (layers, "moe_layer", MOELayer),
        (layers, "extract_critical", dispatch.extract_critical),
        (functions, "moe_layer", MOELayer),
        (functions, "top_any_routing", moe.top_any_routing),
        (functions, "top_k_routing", dispatch.top_k_routing),
        (functions, "fast_encode", dispatch.fast_encode),
        (functions, "fast_decode", dispatch.fast_decode),
        (functions, "fast_dispatcher", dispatch.FastDispatcher),
        (tutel.checkpoint.gather, "main", lambda: checkpoint_tool("gather")),
        (tutel.checkpoint.scatter, "main", lambda: checkpoint_tool("scatter")),
    ]
    _saved["attributes"] = [(owner, name, getattr(owner, name, None)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    for kind in TOP_ANY:
        module = ModuleType(f"tutel.gates.{kind}", f"The gate type {kind!r}, registered by dynmoe_tutel.")
        module.Gate = _gate_of(kind)  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        setattr(tutel.gates, kind, module)


def unregister() -> None:
    """Restore Tutel; layers already built keep working."""
    for owner, name, value in _saved.pop("attributes", []):
        if value is None:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    for kind in TOP_ANY:
        sys.modules.pop(f"tutel.gates.{kind}", None)
        if hasattr(tutel.gates, kind):
            delattr(tutel.gates, kind)


def _gate_of(kind: str) -> Callable[..., Gate]:
    """A constructor of the gate with Tutel's signature: (model_dim, num_global_experts, **options)."""

    def build(model_dim: int, num_global_experts: int, **options: Any) -> Gate:
        """Build the gate alone; its forward takes tokens [T, D] and returns a `Routing`."""
        config = {"type": kind, **options}
        slots = max_experts(config, num_global_experts)
        names = tuple(gate_class(config).aux_weights(None))
        common = {"normalize_one_score_gate": config.pop("normalize_one_score_gate", False)}
        return make_gate(
            config, model_dim=model_dim, num_experts=num_global_experts, slots=slots, aux_names=names, **common
        )

    build.__name__ = build.__qualname__ = "Gate"
    return build
