"""What the arguments of a layer mean: slots, losses, gradients, overlap and capacity factor; checked here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .gates import Gate, gate_class, max_experts
from .routing import COMBINE_GRADIENTS
from .validation import number, positive_int

_UPSTREAM_TYPES = ("gated_multi_gate", "gated_multi_gate_t")


def slots_of(configs: list[dict[str, Any]], start: int) -> int:
    """E: the most slots that a gate asks for."""
    slots = [max_experts(config, start) for config in configs]
    for config, count in zip(configs, slots, strict=True):
        if count < start:
            raise ValueError(
                f"gate_type['max_expert_num'] = {count} is less than the {start} experts at start "
                f"(num_experts_per_device) of type {config.get('type')!r}: give at least {start}"
            )
    if len(set(slots)) > 1 and any(not gate_class(c).adaptive for c in configs):
        raise ValueError(
            f"gate_type: the gates want {slots} experts, and a fixed-k gate uses all: give every gate the same number"
        )
    return max(slots)


def combine_gradients(value: str | None, configs: list[dict[str, Any]]) -> list[str]:
    """ "mean" or "normalized" for each gate; by default what the gate's name stands for."""
    if value is not None and value not in COMBINE_GRADIENTS:
        raise ValueError(f"combine_gradient = {value!r}: allowed are 'mean' and 'normalized'")
    return [value or ("normalized" if c.get("type") in _UPSTREAM_TYPES else "mean") for c in configs]


def overlap_degree(value: object) -> int:
    """Chunks of tokens; Tutel's 0 is 1."""
    return positive_int("a2a_ffn_overlap_degree", 1 if value == 0 else value)


def aux_weights(given: object, config: Mapping[str, Any], is_gshard_loss: bool | None) -> dict[str, float]:
    """The terms of l_aux by name with their weights: those `given`, or what is_gshard_loss stands for."""
    if given is None:
        return gate_class(config).aux_weights(is_gshard_loss)
    if not isinstance(given, Mapping):
        raise ValueError(f"aux_losses = {given!r}: give a dict of weights by name, such as {{'diversity': 1.0}}")
    return {name: number(f"aux_losses[{name!r}]", weight, -math.inf) for name, weight in given.items()}


def chosen_factor(of_call: object, gate: Gate) -> float:
    """The capacity factor of a call, or of the gate where the call has None or 0, as in Tutel."""
    factor = 0.0 if of_call is None else number("capacity_factor", of_call, -math.inf)
    return factor or gate.capacity_factor
