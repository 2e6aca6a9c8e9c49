"""Tutel's expert modules, or user modules of that kind: built for a rank's slots, read and written slot by slot."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import COUNT_KEYS
from ..experts.adapters import lora_of_parameters
from ..experts.base import SlotParameter, SlotTensor, activation_function, check_activation
from ..experts.custom import make_batched, may_stack
from ..parallel.slots import ShardedSlots
from ..parts import own_tensors, writable
from ..validation import refuse_unknown


def tutel_experts(
    config: Mapping[str, Any], model_dim: int, slots: int, sharded_count: int, generator: torch.Generator | None
) -> nn.Module:
    """Tutel's expert module (or the user's) for this rank's `slots` experts; the module draws its own weights."""
    options = {key: value for key, value in config.items() if key not in COUNT_KEYS}
    kind = options.pop("type", "ffn")
    for key, default in (("recompute", "none"), ("engine", "auto")):
        if options.pop(key, default) != default:
            raise ValueError(f"experts[{key!r}] is for the packed layout: Tutel's expert modules do not know it")
    if kind == "custom":
        cls = options.pop("module")
        if isinstance(cls, nn.Module):
            raise ValueError("experts['module'] is an instance: give its class, so that Tutel builds it for its slots")
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
            del options["activation_fn"]  # the module has its own default
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
    """Access to the slots of Tutel's expert modules on all ranks; every rank must make the same calls."""

    def _entries(self, slot: int) -> list[SlotParameter]:
        """Every parameter of the experts, each with the index of `slot` on its own rank."""
        return self._of(slot, buffers=False)

    def _tensors(self, slot: int) -> list[SlotTensor]:
        """Every parameter, detached, and every buffer, each with the index of `slot` on its own rank."""
        return [(parameter.detach(), index) for parameter, index in self._entries(slot)] + self._of(slot, buffers=True)

    def _of(self, slot: int, buffers: bool) -> list[Any]:
        """The tensors that hold slots, each with the index of `slot`: not those of torch.nn's layers (slopes)."""
        whole = self._placement.shards > 1
        tensors = [
            tensor
            for owner, name, tensor in own_tensors(self._experts)
            if (name in owner._buffers) == buffers and (whole or may_stack(owner))
        ]
        return [(tensor, index) for tensor in tensors if (index := self._index(tensor, slot)) is not None]

    def check_written(self, init: str = "nearest") -> None:
        """ValueError, by name, if a tensor that holds slots is parametrised or has an adapter."""
        if lora_of_parameters(self._experts):
            raise ValueError(
                "the experts are Tutel's, with LoRA on their stacked tensors: experts cannot grow or move. Merge the "
                "adapters before (merge_and_unload), or use layout = 'packed'"
            )
        for owner, name, tensor in own_tensors(self._experts):
            if may_stack(owner) and self._index(tensor, 0) is not None:
                writable("the experts", owner, name)

    def _index(self, tensor: Tensor, slot: int) -> tuple[Any, ...] | None:
        """The entries of `slot` on its own rank; None if the tensor does not hold slots."""
        local = self._placement.local
        own = slot % local
        if self._placement.shards > 1:
            return (...,)
        if tensor.dim() > 1 and tensor.shape[0] == local:
            return (slice(own, own + 1),)
        if tensor.dim() == 1 and tensor.shape[0] % local == 0:  # one axis holds all slots
            rows = tensor.shape[0] // local
            return (slice(own * rows, (own + 1) * rows),)
        return None

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator) -> None:
        """Draw the slot anew by the module's `reset_parameters()`; ValueError if it has none."""
        seed = int(torch.randint(2**62, (1,), generator=generator))
        reset = getattr(self._experts, "reset_parameters", None)
        if not callable(reset):
            raise ValueError("init = 'fresh' cannot draw these experts (no reset_parameters): use 'nearest' or 'mean'")
        if not self._holds(slot):
            return
        tensors = [*self._experts.parameters(), *self._experts.buffers()]
        before = [tensor.clone() for tensor in tensors]
        with torch.random.fork_rng():
            torch.manual_seed(seed + self._placement.rank)
            reset()
        drawn = [(tensor, index, tensor[index].clone()) for tensor, index in self._tensors(slot)]
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        for tensor, index, value in drawn:
            tensor[index] = value
