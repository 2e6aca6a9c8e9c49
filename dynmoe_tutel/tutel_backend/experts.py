"""Tutel's expert modules, or the user's of Tutel's kind: built for a rank's slots, read and written slot by slot."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..experts import COUNT_KEYS
from ..experts.base import SlotParameter, activation_function, check_activation
from ..experts.custom import make_batched
from ..parallel.slots import ShardedSlots
from ..validation import refuse_unknown


def tutel_experts(
    config: Mapping[str, Any], model_dim: int, slots: int, sharded_count: int, generator: torch.Generator | None
) -> nn.Module:
    """Tutel's expert module (or the user's) for `slots` experts of this rank, drawn as it draws."""
    options = {key: value for key, value in config.items() if key not in COUNT_KEYS}
    kind = options.pop("type", "ffn")
    for key, default in (("recompute", "none"), ("engine", "auto")):
        if options.pop(key, default) != default:
            raise ValueError(f"experts[{key!r}] is for the packed layout: Tutel's expert modules do not know it")
    if kind == "custom":
        cls = options.pop("module")
        if isinstance(cls, nn.Module):
            raise ValueError("experts['module'] is built: give Tutel its class, which it builds for its slots")
    else:
        try:
            cls = importlib.import_module(f"tutel.experts.{kind}").ExpertModule
        except ImportError:
            raise ValueError(f"experts['type'] = {kind!r}: allowed are ffn, llama_ffn, custom") from None
        if "hidden_size_per_expert" not in options:
            raise ValueError("experts['hidden_size_per_expert'] is missing: give an integer of at least 1")
        if options["hidden_size_per_expert"] % sharded_count:
            raise ValueError(
                f"experts['hidden_size_per_expert'] = {options['hidden_size_per_expert']} is not divisible by the "
                f"{sharded_count} ranks of an expert"
            )
        for name in ("activation_fn", "activation_fn_with_self"):
            check_activation(name, None if isinstance(options.get(name), str) else options.get(name))
        if isinstance(options.get("activation_fn"), str):
            options["activation_fn"] = activation_function("activation_fn", options["activation_fn"], torch.relu)
        if options.get("activation_fn", 0) is None:
            del options["activation_fn"]  # the module's own
        if kind == "ffn" and not {"activation_fn", "activation_fn_with_self"} & set(options):
            options["activation_fn"] = torch.relu  # Tutel 0.3's own default is a name that it does not import
        refuse_unknown(f"experts of type {kind!r}", options, _argument_names(cls))
    if generator is None:
        return make_batched(cls, model_dim, slots, options, sharded_count)
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        return make_batched(cls, model_dim, slots, options, sharded_count)


def _argument_names(cls: Any) -> set[str]:
    names = set(cls.__init__.__code__.co_varnames[1 : cls.__init__.__code__.co_argcount])
    return names - {"model_dim", "num_experts_per_device", "sharded_count"}


class TutelSlots(ShardedSlots):
    """Slots of Tutel's expert modules, over the ranks of the layer's group: every rank must make the same calls."""

    def __init__(self, layer: Any) -> None:
        group = layer.group if layer.world_size > 1 else None
        super().__init__(layer.experts, group, layer.rank, layer.local_slots)
        self._shards = layer.sharded_count

    def _owners(self, slot: int) -> list[int]:
        """The ranks that hold the slot: one, or the shards of it in order."""
        first = slot // self._local if self._shards == 1 else slot * self._shards
        return list(range(first, first + self._shards))

    def _entries(self, slot: int) -> list[SlotParameter]:
        """Every parameter of the experts with the index that `slot` would have on its own rank."""
        own = slot % self._local
        found: list[SlotParameter] = []
        for parameter in self._experts.parameters():
            rows = parameter.shape[0] // self._local if parameter.dim() else 0
            if self._shards > 1:
                found.append((parameter, (slice(None),)))
            elif parameter.dim() > 1 and parameter.shape[0] == self._local:
                found.append((parameter, (slice(own, own + 1),)))
            elif parameter.dim() == 1 and parameter.shape[0] % self._local == 0:  # one row of all slots
                found.append((parameter, (slice(own * rows, (own + 1) * rows),)))
        return found

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator) -> None:
        """Draw the slot anew by the module's `reset_parameters()`; ValueError where there is none."""
        seed = int(torch.randint(2**62, (1,), generator=generator))
        reset = getattr(self._experts, "reset_parameters", None)
        if not callable(reset):
            raise ValueError("init = 'fresh' cannot draw these experts (no reset_parameters): use 'nearest' or 'mean'")
        if self._rank not in self._owners(slot):
            return
        before = [p.clone() for p in self._experts.parameters()]
        with torch.random.fork_rng():
            torch.manual_seed(seed + self._rank)
            reset()
        drawn = [(p, index, p[index].clone()) for p, index in self._entries(slot)]
        for parameter, old in zip(self._experts.parameters(), before, strict=True):
            parameter.copy_(old)
        for parameter, index, value in drawn:
            parameter[index] = value
