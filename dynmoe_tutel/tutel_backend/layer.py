"""Tutel's layer with a top-any gate: a subclass of Tutel's `MOELayer`, which takes its place.

For every gate type of Tutel's own it is that class, untouched. A layer with a top-any gate has one of two layouts,
which give the same numbers: *packed* rows through this package's grouped experts where one rank holds all experts, and
*padded* rows, [E, C, D], through Tutel's exchange and Tutel's expert modules wherever a feature of Tutel's needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import tutel.impls.moe_layer
from torch import Tensor, nn
from tutel.experts.llama_ffn import LlamaFFNNetwork
from tutel.impls import communicate, overlap

from ..capacity import drop_beyond_capacity, expert_capacity
from ..experts import COUNT_KEYS, experts_at_start
from ..experts.custom import takes_context
from ..gates import Gate, gate_config
from ..layer import MoELayer
from ..layer_config import chosen_factor
from ..routing import PaddedRows, Routing
from .experts import TutelSlots, tutel_experts

LAYOUTS = ("auto", "packed", "padded")
TOP_ANY = ("top_any", "gated_multi_gate", "gated_multi_gate_t")
_UPSTREAM_OPTIONS = {
    "one_score_gate": False,
    "normalize_one_score_gate": False,
    "value_norm_weighted": False,
    "update_momentum": 0.0,
}
_ORDER = (
    "scan_expert_func",
    "result_func",
    "group",
    "seeds",
    "a2a_ffn_overlap_degree",
    "is_postscore",
    "batch_prioritized_routing",
    "normalize_gate",
    "is_gshard_loss",
    "parallel_type",
    "use_2dh",
)
_Stock: Any = tutel.impls.moe_layer.MOELayer


def _is_ours(gate_type: Any, options: Mapping[str, Any]) -> bool:
    """Whether a layer needs this package: a top-any gate, or EMoE's one_score_gate, which Tutel does not know."""
    if options.get("one_score_gate"):
        return True
    for gate in gate_type if isinstance(gate_type, list) else [gate_type]:
        config = gate_config(gate) if isinstance(gate, str | Mapping) else {}
        if config.get("type") in TOP_ANY:
            return True
    return False


class MOELayer(_Stock):
    """Tutel's layer; with a top-any gate, a `TopAnyMOELayer`."""

    def __new__(cls, gate_type: Any = None, *arguments: Any, **options: Any) -> Any:
        """The class that `gate_type` needs."""
        ours = cls is MOELayer and _is_ours(gate_type, options)
        return super().__new__(TopAnyMOELayer if ours else cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        for name, default in _UPSTREAM_OPTIONS.items():
            if options.get(name) == default:
                del options[name]
        super().__init__(*arguments, **options)


class _OwnInit(nn.Module):
    """Between this package's layer and Tutel's: what the first asks of its parent is nn.Module's, not Tutel's."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    _load_from_state_dict = nn.Module._load_from_state_dict


class TopAnyMOELayer(MoELayer, _OwnInit, MOELayer):
    """A `dynmoe_tutel.MoELayer` that is a Tutel `MOELayer` too, over the ranks of `group`.

    `max_expert_num` slots are divided over the ranks: slots / ranks on each, or, where they are fewer, ranks / slots
    ranks to an expert (Tutel's sharded experts). `num_experts_per_device` of each rank's slots are active at start; a
    fraction 1 / n or -n is one expert on n devices. Arguments are Tutel's and those of `dynmoe_tutel.MoELayer`, and

        layout: "packed", "padded", or "auto", which is packed where it can be.
    """

    layout: str
    l_aux: Any
    _reserve_shape: tuple[int, ...]

    def __init__(self, gate_type: Any, model_dim: int, experts: Any = None, *arguments: Any, **options: Any) -> None:
        named = dict(zip(_ORDER, arguments, strict=False))
        options = {**named, **options}
        if options.pop("pad_samples", None) is not None:
            pass  # Tutel says that it is deprecated and means nothing
        layout = options.pop("layout", "auto")
        if layout not in LAYOUTS:
            raise ValueError(f"layout = {layout!r}: allowed are {', '.join(map(repr, LAYOUTS))}")
        self.__dict__["_wanted"] = layout, bool(options.pop("is_postscore", True)), options.get("group")
        seeds = options.pop("seeds", None)
        options["seeds"] = None if seeds is None else tuple(seeds)[:2]
        parallel_type = options.get("parallel_type", "adaptive:1")
        super().__init__(gate_type, model_dim, experts, **options)
        self.is_postscore = self.__dict__.pop("_wanted")[1]
        self.record_group = None  # all ranks train the same gates, whatever group shares their experts
        self.adaptive_degree = self._degree_of(parallel_type)
        self._spread_active(experts_per_rank=int(self._num_global_experts) // self.world_size)
        self._room: int | None = None
        self._inequivalent_tokens, self._reserve_shape = False, (self.model_dim,)
        if seeds is not None and len(seeds) > 2 and seeds[2] is not None:
            torch.manual_seed(seeds[2])  # Tutel's contract: the caller asks for it

    # What is where

    def _start(self, experts: Mapping[str, Any]) -> int:
        self.group = self.__dict__["_wanted"][2] or (dist.group.WORLD if dist.is_initialized() else None)
        self.world_size, self.rank = communicate.get_world_size(self.group), communicate.get_world_rank(self.group)
        self.sharded_count = 1
        given = next((experts[key] for key in COUNT_KEYS if key in experts), 1)
        whole = not isinstance(given, float) or given >= 1
        if whole and given > 0:
            if isinstance(given, float):
                raise ValueError(f"experts['num_experts_per_device'] = {given}: give an integer, -n, or 1 / n")
            return experts_at_start(experts) * self.world_size
        ranks = round(1 / given) if isinstance(given, float) and given > 0 else -int(given)
        if ranks < 1 or self.world_size % ranks:
            raise ValueError(
                f"experts['num_experts_per_device'] = {given!r} is an expert on {ranks} devices, and there are "
                f"{self.world_size}: give a number that divides them"
            )
        return self.world_size // ranks

    def _make_experts(self, config: Mapping[str, Any], generator: torch.Generator | None) -> Any:
        slots, ranks = self.slots, self.world_size
        if max(slots, ranks) % min(slots, ranks):
            raise ValueError(
                f"gate_type['max_expert_num'] = {slots} slots cannot be divided over {ranks} ranks: give a multiple or "
                "a divisor"
            )
        self.sharded_count, self.local_slots = max(1, ranks // slots), max(1, slots // ranks)
        layout, is_postscore, _ = self.__dict__["_wanted"]
        module = config.get("module") if config.get("type") == "custom" else None
        of_tutel = config.get("type", "ffn") not in ("ffn", "llama_ffn") and (module is None or takes_context(module))
        reasons = [
            *[f"experts over {ranks} ranks"] * (ranks > 1),
            *["is_postscore = False"] * (not is_postscore),
            *["experts of Tutel's custom kind"] * of_tutel,
        ]
        if layout == "packed" and reasons:
            raise ValueError(f"layout = 'packed' cannot have {' and '.join(reasons)}: leave it 'auto' or 'padded'")
        self.layout = "packed" if layout != "padded" and not reasons else "padded"
        if self.layout == "packed":
            return super()._make_experts(config, generator)
        if module is not None and not of_tutel:
            raise ValueError(
                "experts['module'] is not of Tutel's kind (a class whose forward takes x [E, C, D] and ctx), which the "
                f"padded layout needs ({', '.join(reasons) or 'layout'})"
            )
        return tutel_experts(config, self.model_dim, self.local_slots, self.sharded_count, generator)

    def _degree_of(self, parallel_type: str) -> int:
        """Tutel's r: into how many slices a sharded expert's work is split; 0 gathers the weights everywhere."""
        self.valid_rs = [0, *(r for r in range(1, self.sharded_count + 1) if self.sharded_count % r == 0)]
        kind, _, text = str(parallel_type).partition(":")
        if kind == "adaptive":
            if not text.isdigit():
                raise ValueError(f"parallel_type = {parallel_type!r}: give a number of slices, such as 'adaptive:1'")
            return self._checked_degree("parallel_type", min(int(text), self.sharded_count))
        degrees = {"data": 1, "auto": 1, "model": self.sharded_count}
        if kind not in degrees:
            raise ValueError(f"parallel_type = {parallel_type!r}: allowed are 'adaptive:<r>', 'data', 'model', 'auto'")
        return self._checked_degree("parallel_type", degrees[kind])

    def _checked_degree(self, name: str, degree: int) -> int:
        if degree not in self.valid_rs:
            raise ValueError(f"{name}: r = {degree!r} with {self.sharded_count} ranks an expert: give {self.valid_rs}")
        if degree > 1 and isinstance(self.experts, LlamaFFNNetwork):
            raise ValueError(
                f"{name}: r = {degree}: Tutel's llama_ffn gathers its weights on every rank, and its result would "
                f"count {degree} times: give 0 or 1"
            )
        return degree

    @torch.no_grad()
    def _spread_active(self, experts_per_rank: int) -> None:
        """The same number of active slots on every rank, the first ones of each."""
        if self.world_size == 1 or self.sharded_count > 1:
            return
        slot_E = torch.arange(self.slots) % self.local_slots
        for gate in self.gates:
            if gate.adaptive:
                gate.experts_mask.copy_(slot_E < experts_per_rank)  # type: ignore[operator]

    @property
    def num_local_experts(self) -> int:
        """Experts active on this rank."""
        used_E = self._used_slots()
        if self.sharded_count > 1 or self.world_size == 1:
            return min(int(used_E.sum()), self.local_slots) if self.world_size > 1 else int(used_E.sum())
        return int(used_E.view(self.world_size, -1)[communicate.get_world_rank(self.group)].sum())

    @property
    def max_num_local_experts(self) -> int:
        """Slots on this rank."""
        return self.local_slots

    @property
    def expert_slots(self) -> Any:
        """Access to the slots, on whichever rank they are."""
        return self.experts if self.layout == "packed" else TutelSlots(self)

    @staticmethod
    def global_expert_count(num_local_experts: float, group: Any = None) -> int:
        """Tutel's."""
        return _Stock.global_expert_count(num_local_experts, group)

    # A forward

    def forward(
        self,
        input: Tensor,
        gate_index: int = 0,
        capacity_factor: float | None = None,
        top_k: int | None = None,
        a2a_ffn_overlap_degree: int | None = None,
        reserve_dims: int = 1,
        inequivalent_tokens: bool = False,
        adaptive_r: int | None = None,
        megablocks_size: int = 0,
        *,
        token_mask: Tensor | None = None,
    ) -> Any:
        """As `dynmoe_tutel.MoELayer`'s, with Tutel's arguments.

        `a2a_ffn_overlap_degree` and `adaptive_r` stay for later calls, as in Tutel. `megablocks_size` changes nothing:
        packed rows have no padding to skip.
        """
        if adaptive_r is not None:
            self.adaptive_degree = self._checked_degree("adaptive_r", adaptive_r)
        self._inequivalent_tokens = inequivalent_tokens
        if type(reserve_dims) is int and isinstance(input, Tensor):
            self._reserve_shape = tuple(input.shape[-reserve_dims:])
        return super().forward(
            input,
            gate_index,
            capacity_factor,
            top_k,
            a2a_ffn_overlap_degree,
            reserve_dims,
            inequivalent_tokens,
            token_mask=token_mask,
        )

    def _within_capacity(self, routing: Routing, gate: Gate, gate_index: int, capacity_factor: float | None) -> Routing:
        if self.layout == "packed":
            return super()._within_capacity(routing, gate, gate_index, capacity_factor)
        factor = chosen_factor(capacity_factor, gate)
        if factor and self.capacity != "exact":
            raise ValueError(f"capacity_factor = {factor} and capacity = {self.capacity!r}: give one of them")
        k, load = (int(n.max()) if n.numel() else 0 for n in (routing.k_per_token, routing.counts))
        self._room = expert_capacity(
            factor,
            routing.num_tokens,
            self.slots,
            k,
            load,
            alignment=self.sharded_count * self.a2a_ffn_overlap_degree,
            group=self.group,
            inequivalent_tokens=self._inequivalent_tokens,
        )
        if factor == 0:
            return routing
        return drop_beyond_capacity(
            routing,
            self._room,
            self.combine_gradients[gate_index],
            batch_prioritized=self.batch_prioritized_routing,
        )

    def _through_experts(self, x_TD: Tensor, routing: Routing, combine_gradient: str) -> Tensor:
        if self.layout == "packed":
            return super()._through_experts(x_TD, routing, combine_gradient)
        x_TD = x_TD.to(self._compute_dtype(x_TD))
        self.dispatch_count = routing.counts
        places = PaddedRows(routing, self._room)
        gate_A1 = routing.row_gates(combine_gradient).unsqueeze(1)
        rows = routing.dispatch(x_TD)
        if not self.is_postscore:
            if routing.weights is None:
                gate_A1 = gate_A1 / routing.k_per_token.index_select(0, routing.token_of_row.clamp(min=0)).unsqueeze(1)
            rows = rows * gate_A1.to(rows.dtype)
        rows = places.unpad(self._exchange(places.pad(rows)))
        if not self.is_postscore:
            return routing.sum(rows)
        return routing.combine(rows * gate_A1.to(rows.dtype))

    def _compute_dtype(self, x_TD: Tensor) -> torch.dtype:
        """autocast's dtype where it is on, else that of the experts, as Tutel casts."""
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next((p.dtype for p in self.experts.parameters()), x_TD.dtype)

    def _exchange(self, rows_ECD: Tensor) -> Tensor:
        """Through Tutel's experts on whichever ranks they are: [E, C, D] to [E, C, D_out]."""
        if self.adaptive_degree == 0:
            return self._local_experts(rows_ECD)
        E, ranks, slices = self.slots, self.world_size, self.adaptive_degree
        if ranks > E:  # every slice of an expert sees the expert's rows
            rows_ECD = rows_ECD.repeat(1, slices, 1).view(ranks, -1, rows_ECD.shape[2])
        degree = self.a2a_ffn_overlap_degree
        if degree > 1 and rows_ECD.is_cuda:
            y = overlap.a2a_ffn_overlap_forward(
                rows_ECD,
                expert_fn=self._local_experts,
                a2a_ffn_overlap_degree=degree,
                use_2dh=self.use_2dh,
                group=self.group,
            )
        else:
            y = communicate.all_to_all(rows_ECD, 1, 0, use_2dh=self.use_2dh, group=self.group)
            y = communicate.all_to_all(self._local_experts(y), 0, 1, use_2dh=self.use_2dh, group=self.group)
        return y.view(E, slices, -1, y.shape[2]).sum(dim=1) if ranks > E else y

    def _local_experts(self, rows_ECD: Tensor) -> Tensor:
        rows = rows_ECD.view(*rows_ECD.shape[:2], *self._reserve_shape)
        y = self.experts(rows, _ExpertContext(self))
        if not isinstance(y, Tensor) or y.shape[:2] != rows.shape[:2]:
            made = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"the experts made {made} of {list(rows.shape)}: give [E, C, ...] with the same E and C")
        self.protected_shape = y.shape
        return y.reshape(*y.shape[:2], -1)

    def _output_shape(self, x: Tensor, reserve_dims: int, output_dim: int) -> tuple[int, ...]:
        if self.layout == "packed":
            return super()._output_shape(x, reserve_dims, output_dim)
        return (*x.shape[: x.dim() - reserve_dims], *self.protected_shape[-reserve_dims:])


class _ExpertContext:
    """What Tutel's expert modules read of the layer; experts are counted by slots there."""

    def __init__(self, layer: TopAnyMOELayer) -> None:
        self._layer = layer
        self.num_global_experts, self.num_local_experts = layer.slots, layer.local_slots
        self.adaptive_degree, self.megablocks_size = layer.adaptive_degree, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
