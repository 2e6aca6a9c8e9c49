"""Gates: modules that map tokens [T, D] to a `Routing`. One router a file; `make_gate` builds one from Tutel's dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..validation import positive_int, refuse_unknown
from .base import GATE_TYPES, Gate, GateType, gate_type
from .cosine_top_k import CosineTopKGate
from .custom import CustomGate
from .expert_threshold import ExpertThresholdGate
from .null_experts import NullExpertsGate
from .quantile_top_k import QuantileTopKGate
from .relu import ReLUGate
from .top_any import TopAnyGate
from .top_k import TopKGate
from .top_p import TopPGate

TUTELS_OWN = ("top", "cosine_top", "custom")  # gate types that Tutel has too

__all__ = [
    "GATE_TYPES",
    "TUTELS_OWN",
    "CosineTopKGate",
    "CustomGate",
    "ExpertThresholdGate",
    "Gate",
    "NullExpertsGate",
    "QuantileTopKGate",
    "ReLUGate",
    "TopAnyGate",
    "TopKGate",
    "TopPGate",
    "combine_gradient_of",
    "gate_class",
    "gate_config",
    "gate_type",
    "make_gate",
    "max_experts",
]


def gate_config(gate_type: str | Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the caller's dict, or the dict for a string such as "Top2Gate", "GMGate8" or "top_any"."""
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
    """Number of slots for the gate: `max_expert_num`, by default the experts at start (64 for upstream's names)."""
    kind = _known(config)
    given = config.get("max_expert_num", kind.defaults.get("max_expert_num"))
    if given is None or (kind.keys is not None and "max_expert_num" not in kind.keys):
        return num_experts
    slots = positive_int("gate_type['max_expert_num']", given)
    if slots > num_experts and not kind.cls.adaptive:
        raise ValueError(
            f"gate_type['max_expert_num'] = {slots}: a {config['type']} gate uses all experts, which are {num_experts} "
            "at start (num_experts_per_device): give the same number"
        )
    return slots


def gate_class(config: Mapping[str, Any]) -> type[Gate]:
    """The class of the gate that `config` describes; ValueError for an unknown type."""
    return _known(config).cls


def combine_gradient_of(config: Mapping[str, Any]) -> str:
    """The default `combine_gradient` of the gate type."""
    return _known(config).combine_gradient


def _known(config: Mapping[str, Any]) -> GateType:
    kind = config.get("type")
    if not isinstance(kind, str) or kind not in GATE_TYPES:
        raise ValueError(f"gate_type['type'] = {kind!r}: allowed are {', '.join(GATE_TYPES)}")
    return GATE_TYPES[kind]


def make_gate(config: Mapping[str, Any], **common: Any) -> Gate:
    """Build the gate that `config` describes; ValueError for an unknown type or key. `config` is not changed."""
    kind, options = _known(config), dict(config)
    name = options.pop("type")
    if kind.keys is not None:
        own = "top-any" if kind.cls.adaptive else name
        hint = f" (a {own} gate has no k: every token chooses its own)" if "k" in options else ""
        refuse_unknown(f"gate_type of type {name!r}", options, kind.keys, hint)
        options = {**kind.defaults, **options}
        options.pop("max_expert_num", None)
    return kind.cls(**common, **options)
