"""Expert networks on ragged rows; `make_experts` builds one from Tutel's `experts` dict."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch

from ..initialization import seed_of
from ..validation import refuse_unknown
from .adapters import slots_of
from .base import EXPERT_KINDS, Experts, expert_kind
from .ffn import FFNExperts
from .llama_ffn import LlamaFFNExperts

from .custom import CustomExperts, takes_context  # isort: skip
from .modules import ModuleExperts  # isort: skip

__all__ = [
    "EXPERT_KINDS",
    "CustomExperts",
    "Experts",
    "FFNExperts",
    "LlamaFFNExperts",
    "ModuleExperts",
    "expert_kind",
    "make_block",
    "make_experts",
    "slots_of",
    "takes_context",
]

COUNT_KEYS = ("num_experts_per_device", "count_per_node")


def experts_at_start(config: Mapping[str, Any]) -> int:
    """`num_experts_per_device` or its other name `count_per_node`: the experts active at start (default 1)."""
    given = [key for key in COUNT_KEYS if key in config]
    if len(given) == 2 and config[given[0]] != config[given[1]]:
        raise ValueError(
            f"experts: {given[0]} = {config[given[0]]} and {given[1]} = {config[given[1]]} mean the same: give one"
        )
    count = config[given[0]] if given else 1
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise ValueError(
            f"experts[{(given or COUNT_KEYS)[0]!r}] = {count!r}: give an integer of at least 1 "
            "(an expert split over devices needs stock Tutel)"
        )
    return int(count)


def make_experts(config: Mapping[str, Any], model_dim: int, slots: int, **common: Any) -> Experts:
    """Build the experts that `config` describes; ValueError for an unknown type or key. `config` is not changed."""
    options = {key: value for key, value in config.items() if key not in COUNT_KEYS}
    name = options.pop("type", "ffn")
    if not isinstance(name, str) or name not in EXPERT_KINDS:
        raise ValueError(f"experts['type'] = {name!r}: allowed are {', '.join(EXPERT_KINDS)}")
    kind = EXPERT_KINDS[name]
    if kind.keys is not None:
        refuse_unknown(f"experts of type {name!r}", options, kind.keys)
    experts = kind.cls(model_dim, slots, **common, **options)
    experts.seed = seed_of(common.get("generator"))
    return experts


def make_block(
    config: Mapping[str, Any], model_dim: int, slots: int, first: int, count: int, generator: torch.Generator
) -> Experts:
    """Build slots `first` to `first + count` of `slots`, with the same weights that `make_experts` draws for them all.

    Custom experts: a list has a module for each of all slots, and this block is taken from it; a class that makes one
    module a slot draws as for all slots; Tutel's kind draws its block from its own seed.
    """
    if config.get("type") == "custom":
        module = config.get("module")
        if isinstance(module, list | tuple | torch.nn.ModuleList):
            if len(module) != slots:
                raise ValueError(f"experts['module'] holds {len(module)} modules: give one for each of {slots} slots")
            config = {**config, "module": list(module)[first : first + count]}
        for _ in range(first):  # advance the generator past the slots of lower ranks
            torch.randint(2**62, (1,), generator=generator, device="cpu")
        experts = make_experts(config, model_dim, count, generator=generator)
        experts.first_slot = first
        return experts
    experts = make_experts(config, model_dim, count, generator=torch.Generator().manual_seed(0))
    experts.seed, experts.first_slot, experts.all_slots = generator.initial_seed(), first, slots
    experts.draw(generator)
    return experts
