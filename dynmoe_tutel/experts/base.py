"""`Experts`, the base of all expert networks: from tokens and a `Routing` to expert rows, with slot surgery."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..kernels import ACTIVATIONS
from ..routing import Routing

Activation = Callable[[Tensor], Tensor]
SlotParameter = tuple[nn.Parameter, tuple[Any, ...]]  # a parameter and the index of the slot's entries in it


@dataclass(frozen=True)
class ExpertKind:
    """What a name in `experts["type"]` means: a class and the dict's allowed keys; None: the class checks them."""

    cls: type[Experts]
    keys: frozenset[str] | None


EXPERT_KINDS: dict[str, ExpertKind] = {}
X = TypeVar("X", bound="type[Experts]")


def expert_kind(name: str, keys: Collection[str] | None) -> Callable[[X], X]:
    """Register a class of expert networks as the kind `name`, with the allowed keys of its dict."""

    def register(cls: X) -> X:
        EXPERT_KINDS[name] = ExpertKind(cls, None if keys is None else frozenset(keys))
        return cls

    return register


class Experts(nn.Module):
    """Base of all expert networks: this rank's slots of networks D -> output_dim."""

    def __init__(self, model_dim: int, local_slots: int) -> None:
        super().__init__()
        self.model_dim, self.local_slots = model_dim, local_slots
        self.output_dim = model_dim
        self.skip_expert = False  # Tutel's SKIP_EXPERT: experts are the identity

    def forward(
        self, x_TD: Tensor, routing: Routing, gate_A: Tensor, token_shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """Expert rows [rows, output_dim] for tokens [T, D]; `gate_A` [rows] from `routing.row_gates`.

        `token_shape` is the shape of a token in the layer's input (its product is D), for modules that need it.
        """
        raise NotImplementedError

    def fuses(self, routing: Routing) -> bool:
        """Whether `mean` can do `routing.row_gates`, these experts and `routing.combine` in one operation."""
        return False

    def mean(self, x_TD: Tensor, routing: Routing, combine_gradient: str) -> Tensor:
        """The mean of each token's experts, [T, output_dim]; only if `fuses`."""
        raise NotImplementedError

    def compute_dtype(self, x_TD: Tensor) -> torch.dtype:
        """autocast's dtype if autocast is on (fp64 stays), else the weights' dtype, as in Tutel."""
        parameter = next(self.parameters(), None)
        dtype = x_TD.dtype if parameter is None else parameter.dtype
        device = x_TD.device.type
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return dtype

    def slot_parameters(self, slot: int) -> list[SlotParameter]:
        """The parameters that hold a slot, each with the index of its entries; axis 0 counts slots in all of them."""
        return [(p, (slot,)) for p in self.parameters() if p.shape[:1] == (self.local_slots,)]

    @torch.no_grad()
    def keep_slots(self, first: int, count: int) -> None:
        """Keep only the `count` slots from `first` on, in new parameters."""
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.shape[:1] == (self.local_slots,):
                    kept = parameter.detach()[first : first + count].clone()
                    setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        self.local_slots = count

    @torch.no_grad()
    def copy_slot(self, target: int, sources: list[int]) -> None:
        """Fill slot `target` with the mean of the slots `sources`: one source is an exact copy."""
        of_sources = [self.slot_parameters(source) for source in sources]
        for i, (parameter, index) in enumerate(self.slot_parameters(target)):
            values = [params[i][0][params[i][1]] for params in of_sources]
            parameter[index] = values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)

    def reset_slot(self, slot: int, generator: torch.Generator) -> None:
        """Draw a slot's weights anew from `generator`, as at construction."""
        raise NotImplementedError


def activation_function(name: str, value: Activation | str | None, default: Activation) -> Activation:
    """The function for the option `name`: a callable, or a name in `kernels.ACTIVATIONS`; else ValueError."""
    if isinstance(value, str):
        if value not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"experts[{name!r}] = {value!r}: allowed names are {names}; or give a function or module")
        return ACTIVATIONS[value].value
    check_activation(name, value)
    return default if value is None else value


def check_activation(name: str, function: object) -> None:
    """ValueError unless `function` is None or can be called on pre-activations."""
    if function is not None and (not callable(function) or isinstance(function, type)):
        hint = " (an instance, not the class)" if isinstance(function, type) else ""
        raise ValueError(f"experts[{name!r}] = {function!r}: give a function or module, [rows, H] to [rows, H]{hint}")
