"""`MoELayer`: gate -> routing -> dispatch -> experts -> combine, nothing else.

The arguments and tensor names are those of Tutel's layer and of upstream DynMoE's; what is recorded, grown and pruned
is in `adaptive`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adaptive.records import RoutingRecord
from .adaptive.slots import AdaptiveExperts
from .capacity import LateCount, bounded_pairs, drop_beyond_capacity, expert_capacity
from .experts import CustomExperts, Experts, experts_at_start, make_block, make_experts
from .gates import Gate, gate_config, make_gate
from .initialization import generators_of
from .kernels.activations import has_hooks
from .layer_config import aux_weights, chosen_factor, combine_gradients, overlap_degree, slots_of
from .layer_state import fit_slots
from .parallel.collectives import Wire, check_alike, copy_from_first, shared_seed
from .parallel.exchange import through_ranks
from .parallel.slots import ShardedSlots
from .routing import Capacity, Routing, check_capacity
from .validation import describe, environment_flag, flag, number, positive_int, refuse_unknown, warn_once

_TOKEN_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class MoELayer(AdaptiveExperts):
    """A mixture of experts layer, [..., D] to [..., D].

    Args:
        gate_type: a dict such as ``{"type": "top_any", "max_expert_num": 16}``, a name, or a list of them (chosen by
            ``gate_index`` in forward). Types: top_any, gated_multi_gate, gated_multi_gate_t, top, cosine_top, custom.
        model_dim: D.
        experts: a dict such as ``{"type": "ffn", "num_experts_per_device": 8, "hidden_size_per_expert": 1536}``; types
            ffn, llama_ffn, custom. ``num_experts_per_device`` (or ``count_per_node``) experts are active at start.
        scan_expert_func: called with (name, parameter) for every expert parameter.
        result_func: applied to the output, which carries ``l_aux``.
        group: process group whose ranks divide the experts: slot e is on rank e // (E / ranks), and
            ``num_experts_per_device`` are active on each at start. None: this process holds them all.
        seeds: (gates, experts) seeds of private generators; the global random state is never reseeded.
        normalize_gate: fixed k > 1: weights normalised over the chosen experts.
        is_gshard_loss: None: the loss of the gate's kind; True: GShard's; False: diversity and simplicity (top-any) or
            load and importance (fixed k).
        one_score_gate, normalize_one_score_gate, value_norm_weighted, update_momentum: EMoE's avg-k gate, see
            `update_one_score_gate`.
        capacity: rows of memory: "exact" (one an assignment), a factor of T (static shapes; the assignments of smallest
            margin are dropped, counted in ``dropped_assignments`` since construction, and warned about once; what a
            token gets then depends on its batch, and records count what is left), or "full" (T * E).
        combine_gradient: gradient of a top-any assignment: "mean" (<dy, expert(x)> / k) or "normalized"
            ((<dy, expert(x)> - <dy, y>) / k, DynMoE-Tutel's, the default of upstream's gate names).
        aux_losses: weights by name of the terms of ``l_aux``, instead of the default of is_gshard_loss.
        check_finite: refuse non-finite tokens by ValueError (waits for the device).
        record_group: process group of the ranks whose records are summed; None: all ranks.

    With `group`, every rank of it must call the same forwards and backwards in the same order; exact capacity takes any
    number of tokens on each, a bounded one the same number. A factor then allows ceil(factor * T / ranks) assignments
    from one rank to another. ``a2a_ffn_overlap_degree`` chunks of tokens (exact only) travel while others are computed.
    ``wire.traffic`` counts bytes. Not needed and accepted for scripts: parallel_type, use_2dh. Environment variables
    SKIP_MOE and SKIP_EXPERT make the layer, or its experts, the identity, as in Tutel.

    After a forward, ``l_aux`` (0-dim fp32, also on the output) is the weighted auxiliary loss and ``aux_terms`` its
    unweighted terms by name.
    """

    l_aux: Tensor | None
    aux_terms: dict[str, Tensor]
    dropped_assignments: Tensor
    world_size: int
    rank: int
    _num_global_experts: Tensor
    _max_num_global_experts: Tensor

    def __init__(
        self,
        gate_type: str | Mapping[str, Any] | list[Any],
        model_dim: int,
        experts: Mapping[str, Any] | None = None,
        scan_expert_func: Callable[[str, nn.Parameter], Any] | None = None,
        result_func: Callable[[Tensor], Any] | None = None,
        group: Any = None,
        seeds: tuple[int | None, ...] | None = None,
        a2a_ffn_overlap_degree: int = 1,
        is_postscore: bool = True,
        batch_prioritized_routing: bool = False,
        normalize_gate: bool = True,
        is_gshard_loss: bool | None = None,
        parallel_type: str = "adaptive:1",
        use_2dh: bool = False,
        one_score_gate: bool = False,
        normalize_one_score_gate: bool = False,
        value_norm_weighted: bool = False,
        update_momentum: float = 0.0,
        *,
        capacity: Capacity = "exact",
        combine_gradient: str | None = None,
        aux_losses: Mapping[str, float] | None = None,
        check_finite: bool = False,
        record_group: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown("moe_layer", unknown, _ARGUMENTS)
        check_capacity(capacity)
        if not isinstance(experts, Mapping):
            raise ValueError(f"experts must be a dict, got {type(experts).__name__}")
        for name, function in (("scan_expert_func", scan_expert_func), ("result_func", result_func)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} = {function!r}: give a function or None")
        if not flag("is_postscore", is_postscore):
            raise ValueError("is_postscore = False (scores applied before the experts) needs stock Tutel")
        self.model_dim = positive_int("model_dim", model_dim)
        for name, value in (("group", group), ("record_group", record_group)):
            if value is not None and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
                raise ValueError(f"{name} = {value!r}: give a process group of torch.distributed, or None")
        self.group, self.result_func, self.capacity = group, result_func, capacity
        self.wire: Wire | None = None  # where ranks divide the experts
        self.check_finite = flag("check_finite", check_finite)
        self.record_group = record_group  # the ranks whose records are summed
        self.skip_moe = environment_flag("SKIP_MOE")
        self.normalize_gate = flag("normalize_gate", normalize_gate)
        self.is_gshard_loss = None if is_gshard_loss is None else flag("is_gshard_loss", is_gshard_loss)
        self.one_score_gate = flag("one_score_gate", one_score_gate)
        self.normalize_one_score_gate = flag("normalize_one_score_gate", normalize_one_score_gate)
        self.value_norm_weighted = flag("value_norm_weighted", value_norm_weighted)
        self.update_momentum = number("update_momentum", update_momentum, 0, 1)
        self.a2a_ffn_overlap_degree = overlap_degree(a2a_ffn_overlap_degree)
        self.use_2dh, self.parallel_type = flag("use_2dh", use_2dh), parallel_type
        self.batch_prioritized_routing = flag("batch_prioritized_routing", batch_prioritized_routing)

        configs = [gate_config(g) for g in (gate_type if isinstance(gate_type, list) else [gate_type])]
        if not configs:
            raise ValueError("gate_type = []: give at least one gate")
        start = self._start(experts)
        slots = self.slots = slots_of(configs, start)
        generators = generators_of(seeds, len(configs))
        self._aux_weights: list[dict[str, float]] = []
        gates = []
        for config, generator in zip(configs, generators, strict=False):
            gates.append(self._make_gate(config, start, slots, generator, aux_losses))
        self.gates = nn.ModuleList(gates)
        self.combine_gradients = combine_gradients(combine_gradient, configs)
        self.experts: Experts = self._make_experts(experts, generators[-1])

        self.register_buffer("_num_global_experts", torch.tensor(start))
        self.register_buffer("_max_num_global_experts", torch.tensor(slots))
        self.records = [RoutingRecord(slots, model_dim) for _ in gates]
        self.record_routing, self.record_eval = False, False
        self.l_aux, self.aux_terms = None, {}
        self.register_buffer("dropped_assignments", torch.tensor(0), persistent=False)
        self._dropped_late = LateCount()  # a GPU's count of them, for the warning
        if scan_expert_func is not None:
            for name, parameter in self.experts.named_parameters():
                scan_expert_func(name, parameter)
        self._mark_experts()
        if one_score_gate:
            for gate in gates:
                gate.freeze_keys()

    def _start(self, experts: Mapping[str, Any]) -> int:
        """Experts active at start, of all ranks."""
        self.sharded_count = 1
        self.world_size, self.rank = (1, 0) if self.group is None else (self.group.size(), self.group.rank())
        return experts_at_start(experts) * self.world_size

    def _make_experts(self, config: Mapping[str, Any], generator: torch.Generator | None) -> Any:
        if self.world_size == 1:
            self.local_slots = self.slots
            experts = make_experts(config, self.model_dim, self.slots, generator=generator)
        else:
            experts = self._divided_experts(config, generator)
        experts.skip_expert = environment_flag("SKIP_EXPERT")
        return experts

    def _divided_experts(self, config: Mapping[str, Any], generator: torch.Generator | None) -> Experts:
        """This rank's block of slots, drawn as one process draws them, with as many active on every rank."""
        if self.slots % self.world_size:
            raise ValueError(
                f"gate_type['max_expert_num'] = {self.slots} slots cannot be divided over the {self.world_size} ranks "
                "of group: give a multiple"
            )
        self.local_slots = self.slots // self.world_size
        self.wire = Wire(self.group)
        own = {
            "max_expert_num": self.slots,
            "model_dim": self.model_dim,
            "experts": {name: value for name, value in config.items() if isinstance(value, int | str)},
            "gates": [type(gate).__name__ for gate in self.gates],
            "capacity": self.capacity,
            "a2a_ffn_overlap_degree": self.a2a_ffn_overlap_degree,
        }
        check_alike("moe_layer over the ranks of group", own, self.group)
        if generator is None:
            generator = torch.Generator().manual_seed(shared_seed(self.group))
        per_rank = experts_at_start(config)
        for gate in self.gates:
            if gate.adaptive:
                slot_E = torch.arange(self.slots, device=gate.experts_mask.device)  # type: ignore[arg-type]
                gate.experts_mask.copy_(slot_E % self.local_slots < per_rank)  # type: ignore[operator]
        copy_from_first(self.gates, self.group)
        return make_block(config, self.model_dim, self.slots, self.first_slot, self.local_slots, generator)

    @property
    def first_slot(self) -> int:
        """The first of this rank's slots, which are `local_slots` in a row."""
        return 0 if self.wire is None else self.rank * self.local_slots

    @property
    def expert_slots(self) -> Any:
        """What reads and writes the slots of `experts`: `slot_parameters`, `copy_slot`, `reset_slot`."""
        if self.wire is None:
            return self.experts
        return ShardedSlots(self.experts, self.group, self.rank, self.local_slots)

    def _mark_experts(self) -> None:
        """Tutel's mark, by which optimizers and gradient reductions tell experts."""
        for parameter in self.experts.parameters():
            parameter._tutel_expert = True  # type: ignore[attr-defined]

    def _make_gate(
        self,
        config: dict[str, Any],
        start: int,
        slots: int,
        generator: torch.Generator | None,
        aux_losses: Mapping[str, float] | None,
    ) -> Gate:
        weights = aux_weights(aux_losses, config, self.is_gshard_loss)
        self._aux_weights.append(weights)
        return make_gate(
            config,
            model_dim=self.model_dim,
            num_experts=start,
            slots=slots,
            aux_names=tuple(weights),
            generator=generator,
            normalize_gate=self.normalize_gate,
            one_score_gate=self.one_score_gate,
            normalize_one_score_gate=self.normalize_one_score_gate,
        )

    def route(self, x: Tensor, gate_index: int = 0, token_mask: Tensor | None = None) -> Routing:
        """The gate alone: `Routing` of the tokens of x [..., D], in the layer's mode (train or eval)."""
        gate = self._gate(gate_index)
        x_TD, mask_T = self._real_tokens(x, 1, token_mask)
        with torch.autocast(x.device.type, enabled=False):
            return gate(x_TD, self.capacity, None, mask_T)

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
        *,
        token_mask: Tensor | None = None,
    ) -> Any:
        """y [..., output_dim] in the dtype of `input` [..., D], with `l_aux`; or what `result_func` makes of it.

        `gate_index` chooses the gate; `top_k` overrides k of a fixed-k gate; `reserve_dims` trailing dimensions make D.
        Where `token_mask` (bool, the shape of `input` without them) is False, there is padding: read as zeros, no
        expert, output 0, in no record and no loss.
        `capacity_factor` (default: the gate's, else 0, dropless) drops rows as Tutel does, see `expert_capacity`.
        `a2a_ffn_overlap_degree` stays for later calls. The other arguments are Tutel's and change nothing here.
        """
        if self.skip_moe:
            y = input.view_as(input)  # the caller's tensor stays as it is
            y.l_aux = None  # type: ignore[attr-defined]
            return self.result_func(y) if self.result_func is not None else y
        if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
            raise NotImplementedError(
                "forward-mode differentiation (jvp, jacfwd, dual tensors) of a MoELayer: only backward is there"
            )
        if a2a_ffn_overlap_degree is not None:
            self.a2a_ffn_overlap_degree = overlap_degree(a2a_ffn_overlap_degree)
        x_TD, mask_T = self._real_tokens(input, reserve_dims, token_mask)
        if isinstance(self.experts, CustomExperts):
            self.experts.reserve_shape = tuple(input.shape[input.dim() - reserve_dims :])
        gate = self._gate(gate_index)
        recompute = in_backward()
        with torch.autocast(input.device.type, enabled=False):
            routing = gate(x_TD, self.capacity, top_k, mask_T)
            routing = self._within_capacity(routing, gate, gate_index, capacity_factor)
        if self.record_routing and (self.training or self.record_eval) and not recompute:
            self.records[gate_index].add(x_TD, routing)
        y_TO = self._through_experts(x_TD, routing, self.combine_gradients[gate_index])
        y = y_TO.reshape(self._output_shape(input, reserve_dims, y_TO.shape[1])).to(input.dtype)
        l_aux = self._weighted_aux(routing, gate_index)
        if not recompute:
            self.l_aux, self.aux_terms = l_aux, routing.aux
            if routing.dropped is not None:
                self._count_dropped(routing.dropped)
        y.l_aux = l_aux  # type: ignore[attr-defined]
        return self.result_func(y) if self.result_func is not None else y

    def _real_tokens(self, x: Tensor, reserve_dims: int, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as [T, D], zeros for padding, whatever it held: as a factor of 0, a NaN would still reach the gradients."""
        x_TD = self._token_rows(x, reserve_dims)
        mask_T = _mask_of_rows(token_mask, x.shape[: x.dim() - reserve_dims], x.device)
        if mask_T is not None:
            x_TD = x_TD.masked_fill(~mask_T.unsqueeze(1), 0)
        if self.check_finite and not (finite_T := x_TD.isfinite().all(dim=1)).all():
            raise ValueError(
                f"input has {int((~finite_T).sum())} of {x_TD.shape[0]} tokens with a non-finite value (the first is "
                f"token {int(finite_T.logical_not().nonzero()[0])}): a lower learning rate may help"
            )
        return x_TD, mask_T

    def _token_rows(self, x: Tensor, reserve_dims: int) -> Tensor:
        """x as [T, D], checked."""
        if not isinstance(x, Tensor) or x.dim() < 2:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"input must be a tensor [..., {self.model_dim}] of at least two dimensions, got {got}")
        if x.dtype not in _TOKEN_DTYPES:
            raise ValueError(f"input has dtype {x.dtype}: give float32, float64, bfloat16 or float16")
        if type(reserve_dims) is not int or not 1 <= reserve_dims < x.dim():
            raise ValueError(f"reserve_dims = {reserve_dims!r}: give an integer from 1 to {x.dim() - 1} for this input")
        if x.shape[-reserve_dims:].numel() != self.model_dim:
            raise ValueError(
                f"input has shape {list(x.shape)}: its last {reserve_dims} dimension(s) must "
                f"be model_dim = {self.model_dim}"
            )
        device = self._num_global_experts.device
        if x.device != device:
            raise ValueError(f"input is on {x.device}, the layer on {device}: move one with .to()")
        return x.reshape(-1, self.model_dim)

    def _within_capacity(self, routing: Routing, gate: Gate, gate_index: int, capacity_factor: float | None) -> Routing:
        """The routing without what Tutel's capacity factor, the call's or the gate's, drops."""
        factor = chosen_factor(capacity_factor, gate)
        if factor == 0:
            if self.wire is None or isinstance(self.capacity, str):
                return routing
            return bounded_pairs(routing, self.world_size, self.capacity)
        if self.capacity != "exact":
            raise ValueError(
                f"capacity_factor = {factor} and capacity = {self.capacity!r} both bound the rows: give one of them"
            )
        k, load = (int(n.max()) if n.numel() else 0 for n in (routing.k_per_token, routing.counts))
        capacity = expert_capacity(
            factor,
            routing.num_tokens,
            self.slots,
            k,
            load,
            alignment=self.a2a_ffn_overlap_degree,
            group=None if self.wire is None else self.group,
        )
        return drop_beyond_capacity(
            routing,
            capacity,
            self.combine_gradients[gate_index],
            batch_prioritized=self.batch_prioritized_routing,
        )

    def _through_experts(self, x_TD: Tensor, routing: Routing, combine_gradient: str) -> Tensor:
        """Dispatch, experts, combine: [T, output_dim]."""
        if self.wire is not None:
            degree = self.a2a_ffn_overlap_degree
            return through_ranks(self.experts, self.wire, x_TD, routing, combine_gradient, self.capacity, degree)
        if self.experts.fuses(routing) and not has_hooks(self.experts):
            return self.experts.mean(x_TD, routing, combine_gradient)
        return routing.combine(self.experts(x_TD, routing, routing.row_gates(combine_gradient)))

    def _gate(self, gate_index: int) -> Gate:
        if type(gate_index) is not int or not 0 <= gate_index < len(self.gates):
            raise ValueError(f"gate_index = {gate_index!r}: this layer has gates 0 to {len(self.gates) - 1}")
        return self.gates[gate_index]  # type: ignore[return-value]

    def _output_shape(self, x: Tensor, reserve_dims: int, output_dim: int) -> tuple[int, ...]:
        if output_dim == self.model_dim:
            return tuple(x.shape)
        return (*x.shape[: x.dim() - reserve_dims], output_dim)

    def _weighted_aux(self, routing: Routing, gate_index: int) -> Tensor:
        weights = self._aux_weights[gate_index]
        terms = [routing.aux[n].float() if w == 1 else w * routing.aux[n].float() for n, w in weights.items()]
        return sum(terms[1:], terms[0]) if terms else routing.scores.new_zeros((), dtype=torch.float32)

    def _count_dropped(self, dropped: Tensor) -> None:
        self.dropped_assignments += dropped
        if torch.compiler.is_compiling() or dropped.device.type not in ("cpu", "cuda"):
            return
        if dropped > 0 if dropped.device.type == "cpu" else self._dropped_late.above_zero(self.dropped_assignments):
            if self.capacity == "exact":
                warn_once("a capacity_factor drops rows of full experts; layer.dropped_assignments counts them")
                return
            warn_once(
                f"capacity = {self.capacity} was too small: the assignments of smallest margin were dropped; "
                "layer.dropped_assignments counts them"
            )

    @property
    def num_global_experts(self) -> int:
        """Experts active now, by any gate."""
        return int(self._num_global_experts)

    @property
    def max_num_global_experts(self) -> int:
        """E: slots."""
        return self.slots

    @property
    def num_local_experts(self) -> int:
        """Experts active on this rank."""
        return int(self._used_slots().view(self.world_size, -1)[self.rank].sum())

    @property
    def max_num_local_experts(self) -> int:
        """Slots on this rank."""
        return self.local_slots

    @staticmethod
    def global_expert_count(num_local_experts: int, group: Any = None) -> int:
        """Experts over all ranks of `group` for a number on each, as Tutel counts them."""
        if not (dist.is_available() and dist.is_initialized()):
            return num_local_experts
        return num_local_experts * dist.get_world_size(group)

    def get_parameter_iterator(self, param_type: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of "gate" or "local_experts"."""
        if param_type == "gate":
            return self.gates.named_parameters()
        if param_type == "local_experts":
            return self.experts.named_parameters()
        raise ValueError(f"param_type = {param_type!r}: allowed are 'gate' and 'local_experts'")

    def extra_repr(self) -> str:
        active = "?" if self._num_global_experts.is_meta else self.num_global_experts
        return f"experts={active} of {self.slots} slots, capacity={self.capacity!r}"

    def _apply(self, *args: Any, **options: Any) -> Any:
        moved = super()._apply(*args, **options)
        for record in self.records:  # no tensors of the module, which would be in its state
            record.move(self._num_global_experts.device)
        return moved

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.wire is not None and hasattr(destination, "_metadata"):  # whose block it is, or it would fit any rank
            destination._metadata[prefix[:-1]]["slots"] = (self.first_slot, self.first_slot + self.local_slots)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):  # type: ignore[no-untyped-def]
        fit_slots(self, state_dict, prefix, local_metadata.get("slots"))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.dropped_assignments.device == self._num_global_experts.device:
            self.dropped_assignments.zero_()  # in no state dict: maybe uninitialised
        else:
            self.dropped_assignments = torch.zeros_like(self._num_global_experts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Process groups cannot be copied: the copy's ranks talk over the same ones."""
        memo.update({id(group): group for group in (self.group, self.record_group)})
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Without the last forward's losses: they hold its graph, which can be neither copied nor pickled."""
        return {**self.__dict__, "l_aux": None, "aux_terms": {}, "_dropped_late": LateCount()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_experts()


def _mask_of_rows(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    """The mask as [T], checked."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or (mask.dtype, mask.shape, mask.device) != (torch.bool, shape, device):
        raise ValueError(
            f"token_mask must be bool {list(shape)} on {device}, True for real tokens, got {describe(mask)}"
        )
    return mask.reshape(-1)


def in_backward() -> bool:
    """Whether this forward is a recompute of gradient checkpointing: it runs inside the backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


_ARGUMENTS = [
    name
    for name, parameter in inspect.signature(MoELayer.__init__).parameters.items()
    if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
]
