"""`Experts`, the base of all expert networks: from tokens and a `Routing` to expert rows, with slot surgery."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from ..initialization import seeded
from ..kernels import ACTIVATIONS
from ..parts import compute_dtype, writable
from ..routing import Routing

Activation = Callable[[Tensor], Tensor]
SlotParameter = tuple[nn.Parameter, tuple[Any, ...]]  # a parameter and the index of the slot's entries in it
SlotTensor = tuple[Tensor, tuple[Any, ...]]  # the same for a parameter, detached, or a buffer


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

    # The parameters and buffers that hold slots, [slots, ...]; they may be None. No other tensor is a slot's, whatever
    # its shape: an activation's slopes, a parameter of the user's own.
    slot_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model_dim: int, local_slots: int) -> None:
        super().__init__()
        self.model_dim, self.local_slots = model_dim, local_slots
        self.output_dim = model_dim
        self.skip_expert = False  # Tutel's SKIP_EXPERT: experts are the identity
        # for `draw`: the seed of the private generator, and these slots' place among those of all ranks
        self.seed: int | None = None
        self.first_slot, self.all_slots = 0, local_slots

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

    def compute_dtype(self, x_TD: Tensor, weight: Tensor | None = None) -> torch.dtype:
        """autocast's dtype if autocast is on (fp64 stays), else that of `weight` or the parameters, as in Tutel."""
        dtype = compute_dtype(self, x_TD) if weight is None else weight.dtype
        device = x_TD.device.type
        if dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return dtype

    @property
    def itself(self) -> Experts:
        """These experts, for `parts.unwrapped`."""
        return self

    def slot_places(self) -> list[tuple[nn.Module, str]]:
        """The tensors that hold slots, each as a module and the name that it has there; axis 0 counts slots in all."""
        return [(self, name) for name in self.slot_names if self._parameters.get(name, ...) is not None]

    def _slot_values(self, buffers: bool) -> list[Tensor]:
        return [getattr(owner, name) for owner, name in self.slot_places() if (name in owner._buffers) == buffers]

    def slot_parameters(self, slot: int) -> list[SlotParameter]:
        """The parameters that hold a slot, each with the index of its entries; a parametrised one by its value."""
        return [(cast(nn.Parameter, p), (slot,)) for p in self._slot_values(buffers=False)]

    def slot_buffers(self, slot: int) -> list[SlotTensor]:
        """The buffers that hold a slot, such as running statistics, each with the index of its entries."""
        return [(b, (slot,)) for b in self._slot_values(buffers=True)]

    def check_written(self, init: str = "nearest") -> None:
        """ValueError, by name, if a slot cannot be filled as `init` says: its tensor is parametrised or packed."""
        for owner, name in self.slot_places():
            writable("the experts", owner, name)

    def slot_tensors(self, slot: int) -> list[SlotTensor]:
        """All state of a slot, which is copied and moved together: `slot_parameters`, then `slot_buffers`."""
        return [(p.detach(), index) for p, index in self.slot_parameters(slot)] + self.slot_buffers(slot)

    @torch.no_grad()
    def keep_slots(self, first: int, count: int) -> None:
        """Keep only the `count` slots from `first` on, in new parameters and buffers."""
        self.check_written()
        for owner, name in self.slot_places():
            tensor = getattr(owner, name)
            kept = tensor.detach()[first : first + count].clone()
            if isinstance(tensor, nn.Parameter):
                kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
            setattr(owner, name, kept)
        self.local_slots = count
        self.first_slot += first

    @torch.no_grad()
    def copy_slot(self, target: int, sources: list[int]) -> None:
        """Fill slot `target` with the mean of the slots `sources`: one source is an exact copy."""
        self.check_written()
        copy_slot(self, target, sources)

    def reset_slot(self, slot: int, generator: torch.Generator | None) -> None:
        """Draw a slot's weights anew from `generator` (None: the global random state), as at construction."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw all weights anew, as at construction: with a seed, bitwise those; else from the global random state."""
        self.draw(seeded(self.seed))

    def draw(self, generator: torch.Generator | None) -> None:
        """Draw all weights from `generator` (None: the global random state): the bits that one process would draw."""
        for slot in range(self.first_slot + self.local_slots):  # slots of lower ranks are drawn too, then overwritten
            self.reset_slot(max(slot - self.first_slot, 0), generator)


def copy_slot(slots: Any, target: int, sources: list[int]) -> None:
    """Fill slot `target` of `slots`, which has `slot_tensors`, with the mean of the slots `sources`."""
    of_sources = [slots.slot_tensors(source) for source in sources]
    for i, (tensor, index) in enumerate(slots.slot_tensors(target)):
        tensor[index] = mean_of([tensors[i][0][tensors[i][1]] for tensors in of_sources])


def mean_of(values: list[Tensor]) -> Tensor:
    """The mean of equal shapes; one value stays exact, integers (counts of batches) round down."""
    if len(values) == 1:
        return values[0]
    stacked = torch.stack(values)
    if stacked.dtype.is_floating_point or stacked.is_complex():
        return stacked.mean(dim=0)
    return stacked.double().mean(dim=0).to(stacked.dtype)


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
