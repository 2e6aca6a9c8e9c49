"""`Exchange`: how token rows reach the experts and come back. `LocalExchange` is the one within a process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..capacity import drop_beyond_capacity, room_for
from ..experts import make_experts
from ..kernels.activations import has_hooks
from ..routing import Capacity, Routing
from .placement import Placement
from .slots import SlotAccess


class Call(NamedTuple):
    """What one forward of a layer asks for beside its tokens."""

    capacity: Capacity  # the layer's
    capacity_factor: float  # Tutel's, of the call or of the gate; 0: dropless
    combine_gradient: str
    token_shape: tuple[int, ...]  # of a token as the caller gave it; its product is D
    degree: int = 1  # chunks of tokens that travel while others are computed
    batch_prioritized: bool = False
    inequivalent_tokens: bool = False  # Tutel's: ranks bring different numbers of tokens


class Exchange(Protocol):
    """What a layer asks of the way between its tokens and its experts."""

    placement: Placement
    start: int  # experts active at start, of all ranks
    adaptive_degree: int  # Tutel's r
    valid_rs: list[int]  # the values that it can have

    def use_adaptive_degree(self, degree: int) -> None:
        """Tutel's r for this call and later ones; it changes speed, never a result."""

    def agree(self, gates: nn.ModuleList, own: dict[str, Any]) -> None:
        """Give all ranks the same gates; ValueError on every rank where one of `own` is not the same on all."""

    def make_experts(self, config: Mapping[str, Any], model_dim: int, generator: torch.Generator | None) -> Any:
        """The expert networks of this rank's slots, drawn as one process draws them."""

    def bounded(self, routing: Routing, call: Call) -> Routing:
        """The routing without what the capacities of `call` drop."""

    def __call__(self, experts: Any, x_TD: Tensor, routing: Routing, call: Call) -> Tensor:
        """Dispatch, experts, combine: [T, ...], the mean (or weighted sum) of each token's experts."""

    def slots(self, experts: Any) -> SlotAccess:
        """Access to the slots of `experts`, on whichever rank they are."""


class LocalExchange:
    """All experts are in this process."""

    adaptive_degree, valid_rs = 1, [0, 1]

    def __init__(self, placement: Placement, start: int) -> None:
        self.placement, self.start = placement, start

    def use_adaptive_degree(self, degree: int) -> None:
        """No expert is split here."""

    def agree(self, gates: nn.ModuleList, own: dict[str, Any]) -> None:
        """Nothing to agree on."""

    def make_experts(self, config: Mapping[str, Any], model_dim: int, generator: torch.Generator | None) -> Any:
        """All slots."""
        return make_experts(config, model_dim, self.placement.slots, generator=generator)

    def bounded(self, routing: Routing, call: Call) -> Routing:
        """The gate has bounded the routing; here Tutel's factor drops."""
        return within_factor(routing, call, None) if call.capacity_factor else routing

    def __call__(self, experts: Any, x_TD: Tensor, routing: Routing, call: Call) -> Tensor:
        """In one operation where the experts fuse, else by stages."""
        if experts.fuses(routing) and not has_hooks(experts):
            y_TO = experts.mean(x_TD, routing, call.combine_gradient)
        else:
            gate_A = routing.row_gates(call.combine_gradient)
            y_TO = routing.combine(experts(x_TD, routing, gate_A, call.token_shape))
        return as_tokens(y_TO, x_TD.shape[1], call.token_shape)

    def slots(self, experts: Any) -> SlotAccess:
        """The experts' own."""
        return experts


def within_factor(routing: Routing, call: Call, group: Any) -> Routing:
    """The routing without the rows that Tutel's capacity factor drops, on all ranks of `group` by one capacity."""
    room = room_for(routing, call.capacity_factor, call.degree, group)
    return drop_beyond_capacity(routing, room, call.combine_gradient, batch_prioritized=call.batch_prioritized)


def as_tokens(y_TO: Tensor, model_dim: int, token_shape: tuple[int, ...]) -> Tensor:
    """Outputs in the shape of the tokens, where they are as wide as those."""
    return y_TO.reshape(-1, *token_shape) if y_TO.shape[1] == model_dim else y_TO
