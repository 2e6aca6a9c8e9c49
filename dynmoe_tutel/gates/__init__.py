"""Gates: modules that map tokens [T, D] to a `Routing`. One router a file; `make_gate` builds one from Tutel's dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..validation import positive_int, refuse_unknown
from .base import Gate
from .cosine_top_k import CosineTopKGate
from .custom import CustomGate
from .top_any import TopAnyGate
from .top_k import TopKGate

__all__ = [
    "CosineTopKGate",
    "CustomGate",
    "Gate",
    "TopAnyGate",
    "TopKGate",
    "gate_class",
    "gate_config",
    "make_gate",
    "max_experts",
]

# gate type -> (class, defaults that the type sets, keys it takes)
_FIXED_K = {"k", "fp32_gate", "adaptive_experts", "gate_noise", "capacity_factor"}
_TOP_ANY = {"max_expert_num", "fp32_gate", "adaptive_experts", "gate_noise", "capacity_factor"}
_UPSTREAM: dict[str, Any] = {"max_expert_num": 64, "upstream_init": True}
_TYPES: dict[str, tuple[type[Gate], dict[str, Any], set[str]]] = {
    "top_any": (TopAnyGate, {}, {*_TOP_ANY, "init_t"}),
    "gated_multi_gate": (TopAnyGate, _UPSTREAM, _TOP_ANY),
    "gated_multi_gate_t": (TopAnyGate, {**_UPSTREAM, "init_t": 0.1}, {*_TOP_ANY, "init_t"}),
    "top": (TopKGate, {}, _FIXED_K),
    "cosine_top": (CosineTopKGate, {}, {*_FIXED_K, "proj_dim", "init_t"}),
}


def gate_config(gate_type: str | Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the caller's dict, or the dict that a string such as "Top2Gate", "GMGate8" or "top_any" stands for."""
    if isinstance(gate_type, str):
        if match := re.fullmatch(r"Top(\d+)Gate", gate_type):
            return {"type": "top", "k": int(match[1])}
        if match := re.fullmatch(r"GMGate(\d+)", gate_type):
            return {"type": "gated_multi_gate", "max_expert_num": int(match[1])}
        return {"type": gate_type}
    if not isinstance(gate_type, Mapping):
        raise ValueError(f"gate_type must be a dict, a name or a list of them, got {type(gate_type).__name__}")
    return dict(gate_type)


def max_experts(config: Mapping[str, Any], num_experts: int) -> int:
    """Slots that the gate asks for: `max_expert_num`, by default the experts at start (64 for upstream's names)."""
    if gate_class(config) is CustomGate:
        slots = positive_int("gate_type['max_expert_num']", config.get("max_expert_num", num_experts))
        if slots > num_experts:
            raise ValueError(
                f"gate_type['max_expert_num'] = {slots}: a custom gate uses all experts, which are {num_experts} at "
                "start (num_experts_per_device): give the same number"
            )
        return slots
    _, defaults, keys = _TYPES[config["type"]]
    if "max_expert_num" not in keys:
        return num_experts
    slots = config.get("max_expert_num", defaults.get("max_expert_num"))
    return num_experts if slots is None else positive_int("gate_type['max_expert_num']", slots)


def gate_class(config: Mapping[str, Any]) -> type[Gate]:
    """The class of the gate that `config` describes; ValueError for an unknown type."""
    kind = config.get("type")
    if kind == "custom":
        return CustomGate
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"gate_type['type'] = {kind!r}: allowed are {', '.join([*_TYPES, 'custom'])}")
    return _TYPES[kind][0]


def make_gate(config: Mapping[str, Any], **common: Any) -> Gate:
    """Build the gate that `config` describes; ValueError for an unknown type or key. `config` is not changed."""
    options = dict(config)
    cls = gate_class(options)
    kind = options.pop("type")
    if kind == "custom":
        return cls(**common, **options)
    _, defaults, keys = _TYPES[kind]
    hint = " (a top-any gate has no k: every token chooses its own)" if "k" in options else ""
    refuse_unknown(f"gate_type of type {kind!r}", options, keys, hint)
    options = {**defaults, **options}
    options.pop("max_expert_num", None)
    return cls(**common, **options)
