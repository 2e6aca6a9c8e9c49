"""The slots of experts that a tool wrapped, such as PEFT's LoRA on stacked tensors (`target_parameters`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..initialization import fill_uniform
from ..parts import foreign_parameters, unwrapped
from .base import Experts, SlotParameter, SlotTensor, copy_slot


class AdaptedSlots:
    """Access, slot by slot, to the experts in `wrapper` (or to ones with adapters inside) and to their adapters.

    PEFT's `ParamWrapper` adds B A to one tensor [E, m, n], with rank r for each expert: the rows of lora_A [E r, n] are
    ordered by expert and then rank, the columns of lora_B [m, r E] by rank and then expert. A grown slot takes its
    source's entries in both. `check_written` refuses, by name, a wrapper with parameters of another kind.
    """

    def __init__(self, wrapper: nn.Module) -> None:
        self.experts: Any = unwrapped(wrapper, Experts)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        stacked = {(id(owner), name) for owner, name in self.experts.slot_places()}
        for adapter in lora_of_parameters(wrapper):
            of_slots = (id(adapter.get_base_layer()), adapter.parameter_name) in stacked
            if of_slots and adapter.num_experts == self.experts.local_slots:
                self._pairs += [(adapter.lora_A[key].weight, adapter.lora_B[key].weight) for key in adapter.lora_A]
        known = {id(weight) for pair in self._pairs for weight in pair}
        self.unknown = [name for name, p in foreign_parameters(wrapper, self.experts) if id(p) not in known]
        self.wrapper = wrapper

    def check_written(self, init: str = "nearest") -> None:
        """ValueError, by name, if a slot cannot be filled as `init` says."""
        self.experts.check_written(init)
        if self.unknown:
            raise ValueError(
                f"the experts are wrapped by a {type(self.wrapper).__name__} with the parameter {self.unknown[0]}, and "
                "it is unknown which of its entries belong to a slot: experts cannot grow or move. Unwrap them (PEFT: "
                "merge_and_unload) before"
            )
        if init == "mean" and self._pairs:
            raise ValueError(
                "init = 'mean' with LoRA on the experts: the mean of several experts has no adapter of their rank: use "
                "'nearest'"
            )

    def slot_parameters(self, slot: int) -> list[SlotParameter]:
        """The experts' own entries, then those of each adapter: `lora_A`, `lora_B`."""
        found: list[Any] = self.experts.slot_parameters(slot)
        for a, b in self._pairs:
            rank = a.shape[0] // self.experts.local_slots
            found.append((a, (slice(slot * rank, (slot + 1) * rank),)))
            found.append((b, (slice(None), slice(slot, None, self.experts.local_slots))))
        return found

    def slot_tensors(self, slot: int) -> list[SlotTensor]:
        """All state of a slot: the experts' parameters and those of adapters, detached, then buffers."""
        return [(p.detach(), index) for p, index in self.slot_parameters(slot)] + self.experts.slot_buffers(slot)

    @torch.no_grad()
    def copy_slot(self, target: int, sources: list[int]) -> None:
        """Fill slot `target` with the mean of the slots `sources`: one source is an exact copy."""
        self.check_written("nearest" if len(sources) == 1 else "mean")
        copy_slot(self, target, sources)

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator | None) -> None:
        """Draw the expert anew; its adapter starts as PEFT's: A like nn.Linear, B zero."""
        self.experts.reset_slot(slot, generator)
        own = len(self.experts.slot_parameters(slot))
        for number, (weight, index) in enumerate(self.slot_parameters(slot)[own:]):
            if number % 2:
                weight.detach()[index] = 0
            else:
                fill_uniform(weight.detach()[index], weight.shape[1] ** -0.5, generator)


def slots_of(experts: Any) -> Any:
    """Access to the slots of `experts`, slot by slot in this process: their own, or with the adapters on them."""
    return experts if isinstance(experts, Experts) and not lora_of_parameters(experts) else AdaptedSlots(experts)


def lora_of_parameters(module: nn.Module) -> list[Any]:
    """Every `ParamWrapper` of PEFT in `module`."""
    names = ("parameter_name", "num_experts", "lora_A", "lora_B", "get_base_layer")
    return [m for m in module.modules() if all(hasattr(m, name) for name in names)]
