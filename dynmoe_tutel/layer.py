"""`MoELayer`: gate -> routing -> exchange -> experts -> combine, nothing else.

`adaptive` records routing and grows and prunes experts; the exchange sends rows to experts on other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adaptive.slots import AdaptiveExperts
from .capacity import LateCount
from .experts import FFNExperts
from .forwards import in_backward, is_training, without_autocast
from .gates import Gate, TopKGate, make_gate
from .initialization import generators_of
from .layer_config import MoEConfig, overlap_degree, takes_arguments_of
from .parallel.collectives import Wire, gathered
from .parallel.exchange import Call, Exchange, LocalExchange
from .parallel.placement import Placement
from .parallel.rank_exchange import RankExchange
from .refusals import refuse_script, refuse_transforms
from .routing import Capacity, Routing
from .silence import SilenceWatch
from .temporary_hooks import without_temporary_hooks
from .validation import describe, environment_flag, has_no_data, number, positive_int, warn_once

ONE_SCORE_NEEDS = "update_one_score_gate needs one_score_gate = True, a gate of type 'top' and 'ffn' experts"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def exchange_of(config: MoEConfig) -> Exchange:
    """The exchange over the ranks of `config.group`; within this process without a group or with one rank."""
    if not config.is_postscore:
        raise ValueError("is_postscore = False (scores applied before the experts) needs stock Tutel")
    ranks = 1 if config.group is None else dist.get_world_size(config.group)
    start = config.experts_per_rank * ranks
    placement = Placement.over(config.slots(start), config.group)
    return LocalExchange(placement, start) if ranks == 1 else RankExchange(placement, start)


class MoELayer(AdaptiveExperts):
    """A mixture of experts layer, [..., D] to [..., D]; its arguments are the fields of `MoEConfig`.

    Arguments and tensor names are those of Tutel's layer and of upstream DynMoE's. With `group`, every rank must
    call the same forwards and backwards in the same order. With exact capacity, ranks may have different numbers of
    tokens; a bounded capacity needs equal numbers, and a factor allows ceil(factor * T / ranks) assignments from one
    rank to another. ``wire.traffic`` counts bytes. Environment variables SKIP_MOE and SKIP_EXPERT make the layer, or
    its experts, the identity, as in Tutel.

    After a forward, ``l_aux`` (0-dim fp32, also on the output) is the weighted auxiliary loss and ``aux_terms`` its
    unweighted terms by name.
    """

    _experts_first: ClassVar[bool] = False  # without seeds: whether experts are drawn before gates, as in Tutel
    l_aux: Tensor | None
    aux_terms: dict[str, Tensor]
    _dropped: Tensor
    _is_replica = False  # nn.DataParallel sets it on its copies
    _room_by_budget = False  # no capacity was given; so in layers that were pickled before there were budgets
    drops_are_repaired = False  # `OverflowRepair` repeats a step that drops: no warning
    # set from the configuration
    capacity: Capacity
    result_func: Callable[[Tensor], Any] | None
    a2a_ffn_overlap_degree: int
    batch_prioritized_routing: bool
    check_finite: bool
    one_score_gate: bool
    value_norm_weighted: bool
    update_momentum: float

    @takes_arguments_of(MoEConfig)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        config = self._meant(MoEConfig.of(*arguments, **options))
        exchange: Exchange = (config.exchange or exchange_of)(config)
        assert config.experts is not None
        generators = generators_of(config.seeds, len(config.gates))
        weights = config.aux_weights()
        experts = None
        if self._experts_first and exchange.placement.ranks == 1:
            experts = exchange.make_experts(config.experts, config.model_dim, generators[-1])
        gates = nn.ModuleList()
        for gate, terms, generator in zip(config.gates, weights, generators, strict=False):
            gates.append(self._made_gate(gate, config, exchange, tuple(terms), generator))
        exchange.agree(gates, config.described(exchange.placement.slots, gates))
        if experts is None:
            experts = exchange.make_experts(config.experts, config.model_dim, generators[-1])
        super().__init__(gates, experts, exchange, config.model_dim, config.record_group)
        if (seed := getattr(exchange, "seed", None)) is not None:
            self._share_seeds(seed)
        for name in config.attributes:
            setattr(self, name, getattr(config, name))
        self._room_by_budget = config.capacity is None
        self.capacity = "exact" if config.capacity is None else config.capacity
        self.combine_gradients, self._aux_weights = config.combine_gradients(), weights
        self.skip_moe = environment_flag("SKIP_MOE")
        self.experts.skip_expert = environment_flag("SKIP_EXPERT")
        self.l_aux, self.aux_terms = None, {}
        self.dropped_assignments = torch.zeros_like(self._num_global_experts)
        self._dropped_late = LateCount()  # for the warning, without waiting for a GPU
        self._silence = SilenceWatch()
        if config.scan_expert_func is not None:
            for name, parameter in self.experts.named_parameters():
                config.scan_expert_func(name, parameter)
            self._note_marks()
        if config.one_score_gate:
            for made in gates:
                made.freeze_keys()  # type: ignore[operator]

    @staticmethod
    def _made_gate(
        gate: dict[str, Any],
        config: MoEConfig,
        exchange: Exchange,
        aux_names: tuple[str, ...],
        generator: torch.Generator | None,
    ) -> Any:
        """The gate that a layer of this class makes from its dict `gate`."""
        made = make_gate(
            gate,
            model_dim=config.model_dim,
            num_experts=exchange.start,
            slots=exchange.placement.slots,
            aux_names=aux_names,
            generator=generator,
            normalize_gate=config.normalize_gate,
            one_score_gate=config.one_score_gate,
            normalize_one_score_gate=config.normalize_one_score_gate,
        )
        if made.adaptive:
            made.start_with(exchange.placement.at_start(exchange.start))  # type: ignore[operator]
            made.reset_mask()  # type: ignore[operator]
        return made

    @staticmethod
    def _meant(config: MoEConfig) -> MoEConfig:
        """The configuration that a layer of this class takes `config` for: the same."""
        return config

    def _k_of_call(self, top_k: int | None) -> int | None:
        """The k that a call's `top_k` asks for; None: the gate's."""
        return top_k

    def route(
        self, x: Tensor, gate_index: int = 0, token_mask: Tensor | None = None, max_k: int | None = None
    ) -> Routing:
        """Run the gate alone: the `Routing` of the tokens x [..., D], in the layer's mode (train or eval)."""
        gate = self._gate(gate_index)
        refuse_transforms(x)
        limit = _limit_of_call(gate, max_k)
        x_TD, mask_T = self._real_tokens(x, 1, token_mask)
        capacity = self._capacity_for(x, gate, max_k)
        with without_autocast(x):
            routing: Routing = self.gates[gate_index](x_TD, capacity, None, mask_T, **limit)
            return replace(routing, theta=routing.thresholds)

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
        max_k: int | None = None,
    ) -> Any:
        """y [..., output_dim] in the dtype of `input` [..., D], with `l_aux`; or the result of `result_func` on it.

        1. The gate routes the tokens; 2. a capacity may drop assignments; 3. an open window records the routing;
        4. the exchange dispatches rows to their experts, on any rank, and combines the results.

        `gate_index` chooses the gate; `top_k` overrides k of a fixed-k gate; the last `reserve_dims` dimensions make D.
        Tokens where `token_mask` (bool, `input`'s shape without those dimensions) is False are padding: they are read
        as zeros, reach no expert, record or loss, and give output 0.
        `max_k` (gates without a fixed k) is the largest number of experts a token in this call, beside the gate's own.
        `capacity_factor` (default: the gate's, else 0, dropless) drops rows as Tutel does, see `expert_capacity`.
        `a2a_ffn_overlap_degree` and `adaptive_r` stay for later calls. `inequivalent_tokens` and `adaptive_r` matter
        inside Tutel only; `megablocks_size` is ignored: packed rows have no padding to skip.
        """
        if self.skip_moe:
            y = input.view_as(input)  # a view: l_aux must not land on the caller's tensor
            y.l_aux = None  # type: ignore[attr-defined]
            return self.result_func(y) if self.result_func is not None else y
        refuse_transforms(input)
        if self._is_replica and (self.training or self.record_routing):
            raise NotImplementedError(
                "a MoELayer under nn.DataParallel would lose l_aux and records with its replicas: use "
                "DistributedDataParallel"
            )
        recompute, degree = in_backward(), self.a2a_ffn_overlap_degree
        if a2a_ffn_overlap_degree is not None:
            degree = overlap_degree(a2a_ffn_overlap_degree)
            if not recompute:
                self.a2a_ffn_overlap_degree = degree
        if adaptive_r is not None:
            self.exchange.use_adaptive_degree(adaptive_r)
        x_TD, mask_T = self._real_tokens(input, reserve_dims, token_mask)
        gate = self._gate(gate_index)
        limit, factor = _limit_of_call(gate, max_k), self._capacity_factor(capacity_factor, gate)
        call = Call(
            self._capacity_for(input, gate, max_k, factor),
            factor,
            self.combine_gradients[gate_index],
            tuple(input.shape[input.dim() - reserve_dims :]),
            degree,
            self.batch_prioritized_routing,
            inequivalent_tokens,
        )
        with without_autocast(input):
            routing = self.gates[gate_index](x_TD, call.capacity, self._k_of_call(top_k), mask_T, **limit)
            routing = self.exchange.bounded(routing, call)
        if is_training(self) and not recompute and not has_no_data(input):
            gate.keep_sample(x_TD, routing)
        recorded = self.record_routing and (self.record_eval or is_training(self))
        if recorded and not recompute and not has_no_data(input):
            self.records[gate_index].add(x_TD, routing)
        y = self.exchange(self.experts, x_TD, routing, call)
        y = y.reshape(*input.shape[: input.dim() - reserve_dims], *y.shape[1:]).to(input.dtype)
        l_aux = self._weighted_aux(routing, gate_index)
        if not recompute:
            self.l_aux, self.aux_terms = l_aux, routing.aux
            if routing.dropped is not None and not has_no_data(input):
                self._count_dropped(routing.dropped)
            if gate.adaptive and not torch.compiler.is_compiling() and is_training(self) and not has_no_data(input):
                self._silence.see(routing)
        if self.lineage.is_copy and y.requires_grad:
            self.lineage.watch(y)
        y.l_aux = l_aux  # type: ignore[attr-defined]
        return self.result_func(y) if self.result_func is not None else y

    def _real_tokens(self, x: Tensor, reserve_dims: int, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as [T, D] with padding set to zero, and the mask [T]: a NaN in padding would reach the gradients."""
        self._check_tokens(x, reserve_dims)
        x_TD = x.reshape(-1, self.model_dim)
        mask_T = None
        if token_mask is not None:
            expected = (torch.bool, x.shape[: x.dim() - reserve_dims], x.device)
            if (
                not isinstance(token_mask, Tensor)
                or (token_mask.dtype, token_mask.shape, token_mask.device) != expected
            ):
                raise ValueError(
                    f"token_mask must be bool {list(expected[1])} on {x.device}, True for real tokens, got "
                    f"{describe(token_mask)}"
                )
            mask_T = token_mask.reshape(-1)
            x_TD = x_TD.masked_fill(~mask_T.unsqueeze(1), 0)
        if self.check_finite and not has_no_data(x) and not (finite_T := x_TD.isfinite().all(dim=1)).all():
            raise ValueError(
                f"input has {int((~finite_T).sum())} of {x_TD.shape[0]} tokens with a non-finite value (the first is "
                f"token {int(finite_T.logical_not().nonzero()[0])}): a lower learning rate may help"
            )
        return x_TD, mask_T

    def _check_tokens(self, x: Tensor, reserve_dims: int) -> None:
        """ValueError unless x is [..., D] on the layer's device, with D in the last `reserve_dims` dimensions."""
        if not isinstance(x, Tensor) or x.dim() < 2:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"input must be a tensor [..., {self.model_dim}] of at least two dimensions, got {got}")
        if x.is_nested or x.layout != torch.strided:
            kind = "nested" if x.is_nested else f"of layout {x.layout}"
            raise ValueError(f"input is {kind}: give a dense tensor [..., {self.model_dim}], padded with a token_mask")
        if x.dtype not in _DTYPES:
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

    def _capacity_factor(self, of_call: object, gate: Gate) -> float:
        """The call's capacity factor, or the gate's if the call has None or 0, as in Tutel."""
        factor = 0.0 if of_call is None else number("capacity_factor", of_call, -math.inf)
        factor = factor or gate.capacity_factor
        if factor and self.capacity != "exact":
            raise ValueError(
                f"capacity_factor = {factor} and capacity = {self.capacity!r} both bound the rows: give one of them"
            )
        return factor

    def _weighted_aux(self, routing: Routing, gate_index: int) -> Tensor:
        weights = self._aux_weights[gate_index]
        terms = [routing.aux[n].float() if w == 1 else w * routing.aux[n].float() for n, w in weights.items()]
        return sum(terms[1:], terms[0]) if terms else routing.scores.new_zeros((), dtype=torch.float32)

    def _count_dropped(self, dropped: Tensor) -> None:
        self.dropped_assignments.add_(dropped)
        if torch.compiler.is_compiling() or self.drops_are_repaired or dropped.device.type not in ("cpu", "cuda"):
            return
        if dropped > 0 if dropped.device.type == "cpu" else self._dropped_late.above_zero(self.dropped_assignments):
            if self.capacity == "exact":
                warn_once("a capacity_factor drops rows of full experts; layer.dropped_assignments counts them")
                return
            warn_once(
                f"capacity = {self.capacity} was too small: the assignments of smallest margin were dropped; "
                "layer.dropped_assignments counts them"
            )

    def update_one_score_gate(self) -> None:
        """EMoE's avg-k gate: set wg.weight [E, D] to the mean of fc1_w over H; call it on all ranks.

        The layer's options: `value_norm_weighted` weights the mean by the norms of fc2_w's rows;
        `normalize_one_score_gate` makes unit rows; `update_momentum` m: m * old + (1 - m) * new. Source: EMoE (arXiv
        2310.10908).
        """
        gate, experts = self._gate(0), self.held_experts
        if not self.one_score_gate or not isinstance(gate, TopKGate) or not isinstance(experts, FFNExperts):
            raise ValueError(ONE_SCORE_NEEDS)
        self.refuse_wrapped("update_one_score_gate")
        keys_LD = experts.mean_keys(self.value_norm_weighted).detach()
        gate.set_keys(gathered(keys_LD, self.placement.group), self.update_momentum)

    @property
    def dropped_assignments(self) -> Tensor:
        """Assignments that a bounded capacity or a capacity factor dropped, [] int64 on the layer's device.

        No buffer: DistributedDataParallel would overwrite it with another rank's, and loaders leave buffers outside
        the state dict as uninitialised memory.
        """
        device = self._num_global_experts.device
        if self._dropped.device != device:  # the layer's tensors were replaced one by one
            self._dropped = self._on_device(self._dropped, device)
        return self._dropped

    @dropped_assignments.setter
    def dropped_assignments(self, count: Tensor) -> None:
        self._dropped = count

    @staticmethod
    def _on_device(count: Tensor, device: torch.device) -> Tensor:
        """`count` on `device`; 0 where it comes from or goes to the meta device."""
        if "meta" in (device.type, count.device.type):
            return torch.zeros_like(count, device=device)
        return count.to(device)

    def _apply(self, *args: Any, **options: Any) -> Any:
        super()._apply(*args, **options)
        self._dropped = self._on_device(self._dropped, self._num_global_experts.device)
        return self

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.dropped_assignments.zero_()

    def _capacity_for(self, x: Tensor, gate: Gate, max_k: int | None = None, factor: float = 0.0) -> Capacity:
        """The layer's capacity. Without one, room for as many experts a token as a budget allows, which drops nothing.

        For tokens without values, whose assignments cannot be counted, room for all.
        """
        if self._room_by_budget and self.capacity == "exact" and not factor and self.placement.ranks == 1:
            most = gate.limit_of_call(max_k)
            if most is not None and most < self.slots:
                return float(most)
        if not has_no_data(x):
            return self.capacity
        if self.placement.ranks > 1:
            raise NotImplementedError(
                "a layer divided over ranks cannot run on tokens without values (meta device, FakeTensorMode): they "
                "cannot be sent"
            )
        return "full" if self.capacity == "exact" else self.capacity

    @property
    def wire(self) -> Wire | None:
        """The collectives between the ranks that hold the experts, with their traffic counts; None in one process."""
        return getattr(self.exchange, "wire", None)

    @property
    def adaptive_degree(self) -> int:
        """The exchange's r, as in Tutel; 1 outside Tutel."""
        return self.exchange.adaptive_degree

    @adaptive_degree.setter
    def adaptive_degree(self, degree: int) -> None:
        self.exchange.use_adaptive_degree(degree)

    @property
    def valid_rs(self) -> list[int]:
        """The values of r that the exchange allows."""
        return self.exchange.valid_rs

    @staticmethod
    def global_expert_count(num_local_experts: int, group: Any = None) -> int:
        """Experts over all ranks of `group`, given the number on each, as Tutel counts them."""
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

    def __prepare_scriptable__(self) -> Any:
        """Called by torch.jit.script, which would stop at the first annotation."""
        refuse_script()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out temporary hooks, and the last forward's losses, whose graph cannot be copied or pickled."""
        state = without_temporary_hooks(self.__dict__)
        return {**state, "l_aux": None, "aux_terms": {}}


def _limit_of_call(gate: Gate, max_k: int | None) -> dict[str, int]:
    """The gate's argument for a call with `max_k`, checked; other gates than top-any's need not have it."""
    if max_k is None:
        return {}
    gate.limit_of_call(positive_int("max_k", max_k))
    return {"max_k": int(max_k)}
