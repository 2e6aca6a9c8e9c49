"""Tutel's exchange between tokens and experts: rows padded to [E, C, D], Tutel's all-to-all and expert modules."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tutel.impls import communicate, overlap

from ..capacity import drop_beyond_capacity, room_for
from ..experts import COUNT_KEYS, experts_at_start
from ..experts.custom import ExpertContext, takes_context
from ..initialization import reset_modules, seed_of
from ..layer_config import MoEConfig
from ..parallel.exchange import Call, Exchange, LocalExchange
from ..parallel.placement import Placement
from ..parallel.slots import SlotAccess
from ..parts import compute_dtype
from ..routing import PaddedRows, Routing
from .experts import TutelSlots, tutel_experts

LAYOUTS = ("auto", "packed", "padded")


def tutel_exchange(config: MoEConfig, layout: str) -> Exchange:
    """A packed exchange in this process if `layout` allows it and no Tutel feature is used, else a padded one."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: allowed are {', '.join(map(repr, LAYOUTS))}")
    group = config.group or (dist.group.WORLD if dist.is_initialized() else None)
    ranks = communicate.get_world_size(group)
    assert config.experts is not None
    start = _experts_at_start(config.experts, ranks)
    placement = Placement(config.slots(start), group, communicate.get_world_rank(group), ranks)
    _degree_of(config.parallel_type, placement.shards)  # refuses what Tutel does not know, in either layout
    module = config.experts.get("module") if config.experts.get("type") == "custom" else None
    of_tutel = config.experts.get("type", "ffn") not in ("ffn", "llama_ffn") and (
        module is None or takes_context(module)
    )
    reasons = [
        *[f"experts over {ranks} ranks"] * (ranks > 1),
        *["is_postscore = False"] * (not config.is_postscore),
        *["experts of Tutel's custom kind"] * of_tutel,
    ]
    if layout == "packed" and reasons:
        raise ValueError(f"layout = 'packed' does not support {' and '.join(reasons)}: give 'auto' or 'padded'")
    if layout != "padded" and not reasons:
        return LocalExchange(placement, start)
    if module is not None and not of_tutel:
        raise ValueError(
            "experts['module'] is not of Tutel's kind (a class whose forward takes x [E, C, D] and ctx), which the "
            f"padded layout needs ({', '.join(reasons) or 'layout'})"
        )
    return PaddedExchange(placement, start, config)


def _experts_at_start(experts: Mapping[str, Any], ranks: int) -> int:
    """Experts at start over all ranks; 1 / n or -n means one expert on n ranks."""
    given = next((experts[key] for key in COUNT_KEYS if key in experts), 1)
    if (not isinstance(given, float) or given >= 1) and given > 0:
        if isinstance(given, float):
            raise ValueError(f"experts['num_experts_per_device'] = {given}: give an integer, -n, or 1 / n")
        return experts_at_start(experts) * ranks
    shards = round(1 / given) if isinstance(given, float) and given > 0 else -int(given)
    if shards < 1 or ranks % shards:
        raise ValueError(
            f"experts['num_experts_per_device'] = {given!r} is an expert on {shards} devices, and there are "
            f"{ranks}: give a number that divides them"
        )
    return ranks // shards


class PaddedExchange:
    """Tutel's expert modules behind Tutel's all-to-all, on rows padded to [E, C, D].

    `adaptive_degree` is Tutel's r: the number of slices that a sharded expert's work is split into; 0 gathers the
    weights on every rank. Raises ValueError if the placement does not allow the r of `config.parallel_type`.
    """

    def __init__(self, placement: Placement, start: int, config: MoEConfig) -> None:
        self.placement, self.start = placement, start
        self.model_dim, self.is_postscore, self.use_2dh = config.model_dim, config.is_postscore, config.use_2dh
        shards = placement.shards
        self.valid_rs = [0, *(r for r in range(1, shards + 1) if shards % r == 0)]
        assert config.experts is not None
        self._gathers = config.experts.get("type") == "llama_ffn"
        self.adaptive_degree = self.checked_degree("parallel_type", _degree_of(config.parallel_type, shards))
        self.dispatch_count: Tensor | None = None  # of the last forward, as Tutel's layer keeps it

    def use_adaptive_degree(self, degree: int) -> None:
        """Set r for this call and later ones; ValueError if Tutel's experts cannot be split like that."""
        self.adaptive_degree = self.checked_degree("adaptive_r", degree)

    def checked_degree(self, name: str, degree: int) -> int:
        """`degree`; ValueError if Tutel's experts cannot be split like that."""
        if degree not in self.valid_rs:
            raise ValueError(
                f"{name}: r = {degree!r} with {self.placement.shards} ranks an expert: give {self.valid_rs}"
            )
        if degree > 1 and self._gathers:
            raise ValueError(
                f"{name}: r = {degree}: Tutel's llama_ffn gathers its weights on every rank, and its result would "
                f"count {degree} times: give 0 or 1"
            )
        return degree

    def agree(self, gates: nn.ModuleList, own: dict[str, Any]) -> None:
        """Left to the caller's seeds and data parallelism, as in Tutel."""

    def make_experts(self, config: Mapping[str, Any], model_dim: int, generator: torch.Generator | None) -> Any:
        """Tutel's module for this rank's slots."""
        self._seed = seed_of(generator)
        return tutel_experts(config, model_dim, self.placement.local, self.placement.shards, generator)

    def bounded(self, routing: Routing, call: Call) -> Routing:
        """The routing with its experts' `room`, without the rows that the capacity factor drops."""
        alignment = self.placement.shards * call.degree
        group = self.placement.group
        room = room_for(routing, call.capacity_factor, alignment, group, call.inequivalent_tokens)
        if call.capacity_factor:
            routing = drop_beyond_capacity(
                routing, room, call.combine_gradient, batch_prioritized=call.batch_prioritized
            )
        return replace(routing, room=room)

    def __call__(self, experts: Any, x_TD: Tensor, routing: Routing, call: Call) -> Tensor:
        """Pad, exchange, experts, exchange, unpad; scores are applied before the experts unless `is_postscore`."""
        x_TD = x_TD.to(_compute_dtype(experts, x_TD))
        self.dispatch_count = routing.counts
        places = PaddedRows(routing, routing.room)
        gate_A1 = routing.row_gates(call.combine_gradient).unsqueeze(1)
        rows = routing.dispatch(x_TD)
        if not self.is_postscore:
            if routing.weights is None:
                gate_A1 = gate_A1 / routing.k_per_token.index_select(0, routing.token_of_row.clamp(min=0)).unsqueeze(1)
            rows = rows * gate_A1.to(rows.dtype)
        made = self._exchanged(experts, places.pad(rows), call)
        rows = places.unpad(made.flatten(2))
        y_TO = routing.combine(rows * gate_A1.to(rows.dtype)) if self.is_postscore else routing.sum(rows)
        return y_TO.reshape(-1, *made.shape[-len(call.token_shape) :])

    def slots(self, experts: Any) -> SlotAccess:
        """Access to the slots in Tutel's parameters, on any rank."""
        return TutelSlots(experts, self.placement)

    def reset_experts(self, experts: Any) -> None:
        """By the method of Tutel's module, from the seed of construction if there was one."""
        with torch.random.fork_rng() if self._seed is not None else nullcontext():
            if self._seed is not None:
                torch.manual_seed(self._seed)
            reset_modules("the experts", experts.modules())

    def _exchanged(self, experts: Any, rows_ECD: Tensor, call: Call) -> Tensor:
        """Run Tutel's experts on all ranks: [E, C, D] to [E, C, ...]."""
        if self.adaptive_degree == 0:
            return self._local_experts(experts, rows_ECD, call)
        place, slices = self.placement, self.adaptive_degree
        spread = place.ranks > place.slots  # every slice of an expert gets all of its rows
        if spread:
            rows_ECD = rows_ECD.repeat(1, slices, 1).view(place.ranks, -1, rows_ECD.shape[2])
        shape: list[int] = []

        def local(rows: Tensor) -> Tensor:
            made = self._local_experts(experts, rows, call)
            shape[:] = made.shape[2:]
            return made.flatten(2)

        if call.degree > 1 and rows_ECD.is_cuda:
            y = overlap.a2a_ffn_overlap_forward(
                rows_ECD,
                expert_fn=local,
                a2a_ffn_overlap_degree=call.degree,
                use_2dh=self.use_2dh,
                group=place.group,
            )
        else:
            y = communicate.all_to_all(rows_ECD, 1, 0, use_2dh=self.use_2dh, group=place.group)
            y = communicate.all_to_all(local(y), 0, 1, use_2dh=self.use_2dh, group=place.group)
        if spread:
            y = y.view(place.slots, slices, -1, y.shape[2]).sum(dim=1)
        return y.view(*y.shape[:2], *shape)

    def _local_experts(self, experts: Any, rows_ECD: Tensor, call: Call) -> Tensor:
        rows = rows_ECD.view(*rows_ECD.shape[:2], *call.token_shape)
        place = self.placement
        context = ExpertContext(
            model_dim=self.model_dim,
            num_global_experts=place.slots,
            num_local_experts=place.local,
            group=place.group,
            world_size=place.ranks,
            sharded_count=place.shards,
            adaptive_degree=self.adaptive_degree,
            dispatch_count=self.dispatch_count,
        )
        y = experts(rows, context)
        if not isinstance(y, Tensor) or y.shape[:2] != rows.shape[:2]:
            made = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"the experts returned {made} for {list(rows.shape)}: return [E, C, ...], same E and C")
        return y


def _degree_of(parallel_type: object, shards: int) -> int:
    """The r for Tutel's parallel_type."""
    kind, _, text = str(parallel_type).partition(":")
    if kind == "adaptive":
        if not text.isdigit():
            raise ValueError(f"parallel_type = {parallel_type!r}: give a number of slices, such as 'adaptive:1'")
        return min(int(text), shards)
    degrees = {"data": 1, "auto": 1, "model": shards}
    if kind not in degrees:
        raise ValueError(f"parallel_type = {parallel_type!r}: allowed are 'adaptive:<r>', 'data', 'model', 'auto'")
    return degrees[kind]


def _compute_dtype(experts: nn.Module, x_TD: Tensor) -> torch.dtype:
    """autocast's dtype if autocast is on, else the experts' dtype, as in Tutel."""
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return compute_dtype(experts, x_TD)
