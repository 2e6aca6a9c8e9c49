"""`Exchange`: dispatches token rows to experts and combines the results. `LocalExchange` works within one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..capacity import drop_beyond_capacity, room_for
from ..experts import Experts, make_experts, slots_of
from ..kernels.activations import has_hooks
from ..parts import unwrapped
from ..routing import Capacity, Routing
from .placement import Placement
from .slots import SlotAccess


class Call(NamedTuple):
    """The arguments of one forward of a layer, beside its tokens."""

    capacity: Capacity  # the layer's
    capacity_factor: float  # Tutel's capacity factor, from the call or the gate; 0: dropless
    combine_gradient: str
    token_shape: tuple[int, ...]  # shape of a token in the caller's input; its product is D
    degree: int = 1  # chunks of tokens: one is sent while another is computed
    batch_prioritized: bool = False
    inequivalent_tokens: bool = False  # Tutel's: ranks have different numbers of tokens


class Exchange(Protocol):
    """The interface between a layer's tokens and its experts."""

    placement: Placement
    start: int  # experts active at start, over all ranks
    adaptive_degree: int  # Tutel's r
    valid_rs: list[int]  # its allowed values

    def use_adaptive_degree(self, degree: int) -> None:
        """Set Tutel's r for this call and later ones; it changes speed, never a result."""

    def agree(self, gates: nn.ModuleList, own: dict[str, Any]) -> None:
        """Give all ranks the same gates; ValueError on every rank if one of `own` differs between ranks."""

    def make_experts(self, config: Mapping[str, Any], model_dim: int, generator: torch.Generator | None) -> Any:
        """The expert networks of this rank's slots, with the same weights that one process would draw."""

    def bounded(self, routing: Routing, call: Call) -> Routing:
        """The routing without the assignments that the capacities of `call` drop."""

    def __call__(self, experts: Any, x_TD: Tensor, routing: Routing, call: Call) -> Tensor:
        """Dispatch, experts, combine: [T, ...], the mean (or weighted sum) of each token's experts."""

    def slots(self, experts: Any) -> SlotAccess:
        """Access to the slots of `experts` on all ranks."""

    def reset_experts(self, experts: Any) -> None:
        """Draw the experts of this rank as at construction."""


class LocalExchange:
    """All experts are in this process."""

    adaptive_degree, valid_rs = 1, [0, 1]

    def __init__(self, placement: Placement, start: int) -> None:
        self.placement, self.start = placement, start

    def use_adaptive_degree(self, degree: int) -> None:
        """Ignored: experts are not split."""

    def agree(self, gates: nn.ModuleList, own: dict[str, Any]) -> None:
        """Nothing to agree on in one process."""

    def make_experts(self, config: Mapping[str, Any], model_dim: int, generator: torch.Generator | None) -> Any:
        """All slots."""
        return make_experts(config, model_dim, self.placement.slots, generator=generator)

    def bounded(self, routing: Routing, call: Call) -> Routing:
        """Drop by Tutel's capacity factor; the gate has applied the layer's own capacity."""
        return within_factor(routing, call, None) if call.capacity_factor else routing

    def __call__(self, experts: Any, x_TD: Tensor, routing: Routing, call: Call) -> Tensor:
        """In one operation if the experts fuse, else in stages."""
        # what a tool put around experts is called; its own parts would be passed by otherwise
        if isinstance(experts, Experts) and experts.fuses(routing) and not has_hooks(experts):
            y_TO = experts.mean(x_TD, routing, call.combine_gradient)
        else:
            gate_A = routing.row_gates(call.combine_gradient)
            y_TO = routing.combine(experts(x_TD, routing, gate_A, call.token_shape))
        return as_tokens(y_TO, x_TD.shape[1], call.token_shape)

    def slots(self, experts: Any) -> SlotAccess:
        """The experts themselves, with the adapters around them."""
        access: SlotAccess = slots_of(experts)
        return access

    def reset_experts(self, experts: Any) -> None:
        """By their own method."""
        unwrapped(experts, Experts).reset_parameters()


def within_factor(routing: Routing, call: Call, group: Any) -> Routing:
    """The routing without the rows that Tutel's capacity factor drops; all ranks of `group` use one capacity."""
    room = room_for(routing, call.capacity_factor, call.degree, group)
    return drop_beyond_capacity(routing, room, call.combine_gradient, batch_prioritized=call.batch_prioritized)


def as_tokens(y_TO: Tensor, model_dim: int, token_shape: tuple[int, ...]) -> Tensor:
    """Outputs in the shape of the tokens, if they have the same width."""
    return y_TO.reshape(-1, *token_shape) if y_TO.shape[1] == model_dim else y_TO
