"""`ExpertParallelExchange`: between tokens and experts over DeepSpeed's expert-parallel group, known only later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel.collectives import Wire
from ..parallel.exchange import Call, LocalExchange
from ..parallel.placement import Placement
from ..parallel.rank_exchange import RankExchange
from ..parallel.slots import SlotAccess
from ..routing import Routing
from .experts import DeepSpeedExperts


class ExpertParallelExchange:
    """Experts divided over `ranks` consecutive blocks of slots, within this process or between the ranks of a group.

    A layer holds its rank's experts from the start. DeepSpeed makes the groups when it makes the engine, which calls
    `join`; until then a divided layer has its parameters and no forward. Dropless: no capacity bounds it.
    """

    adaptive_degree, valid_rs = 1, [0, 1]

    def __init__(self, slots: int, ranks: int, start: int) -> None:
        self.placement, self.start = Placement(slots, None, 0, ranks), start
        self._within: LocalExchange | RankExchange | None = None
        if ranks == 1:
            self._within = LocalExchange(self.placement, start)

    def join(self, group: Any) -> None:
        """Work between the ranks of `group` from now on; ValueError if it has another size than the layer was made for.

        The experts stay as they are: rank r of the group holds the r-th block of slots.
        """
        placement = Placement.over(self.placement.slots, group)
        if placement.ranks != self.placement.ranks:
            raise ValueError(
                f"the expert-parallel group has {placement.ranks} ranks and the layer was made for ep_size = "
                f"{self.placement.ranks}: make it anew with ep_size = {placement.ranks}"
            )
        if placement.ranks > 1 and placement.group is not self.placement.group:
            self.placement, self._within = placement, RankExchange(placement, self.start)

    @property
    def within(self) -> LocalExchange | RankExchange:
        """The exchange that does the work; ValueError before the layer knows the other ranks."""
        if self._within is None:
            raise ValueError(
                f"a MoE with ep_size = {self.placement.ranks} needs the other ranks of its group: give the model to "
                "deepspeed.initialize(), or call set_deepspeed_parallelism(), before it computes or grows"
            )
        return self._within

    @property
    def wire(self) -> Wire | None:
        """The collectives between the ranks; None within this process and before `join`."""
        return getattr(self._within, "wire", None)

    @property
    def is_divided(self) -> bool:
        """Whether this process holds a part of the slots."""
        return self.placement.ranks > 1

    def use_adaptive_degree(self, degree: int) -> None:
        """Ignored: experts are not split."""

    def agree(self, gates: nn.ModuleList, own: dict[str, Any]) -> None:
        """Left to the engine, which broadcasts parameters."""

    def make_experts(
        self, config: Mapping[str, Any], model_dim: int, generator: torch.Generator | None
    ) -> DeepSpeedExperts:
        """A copy of the expert for each slot of this rank."""
        return DeepSpeedExperts(model_dim, self.placement.local, config["module"], config["group_name"])

    def bounded(self, routing: Routing, call: Call) -> Routing:
        """The routing as it is."""
        return routing

    def __call__(self, experts: Any, x_TD: Tensor, routing: Routing, call: Call) -> Tensor:
        """Dispatch, experts, combine."""
        return self.within(experts, x_TD, routing, call)

    def slots(self, experts: Any) -> SlotAccess:
        """Access to the slots on all ranks of the group."""
        return self.within.slots(experts)

    def reset_experts(self, experts: Any) -> None:
        """By their own method."""
        experts.reset_parameters()
