"""Drop-in for `tutel.moe`: `from dynmoe_tutel import moe as tutel_moe`.

`moe_layer` builds a layer; as in Tutel, no `group` means all ranks of the job. To build your own: `top_any_routing` and
`top_k_routing` assign tokens to experts, `fast_encode` dispatches token rows to padded expert rows [E, C, D],
`fast_decode` combines them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import losses
from .capacity import combine_weights, expert_capacity, locations, picks
from .kernels import gate_dtype, threshold_gate
from .kernels.operation import FLOATS
from .layer import MoELayer
from .layer_config import MoEConfig
from .routing import Capacity, PaddedRows, Routing, check_capacity
from .validation import describe, number, positive_int, warn_once

CriticalData = tuple[int, list[Tensor], list[Tensor], list[Tensor], int, Tensor]

__all__ = [
    "FastDispatcher",
    "MOELayer",
    "extract_critical",
    "fast_cumsum_sub_one",
    "fast_decode",
    "fast_dispatcher",
    "fast_encode",
    "moe_layer",
    "top_any_routing",
    "top_k_routing",
]


class _TutelsClass(type):
    """Tutel has one class of layers: `isinstance` against its name finds every `MoELayer`, however it was made."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or (cls._is_tutels() and isinstance(instance, MoELayer))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return super().__subclasscheck__(subclass) or (cls._is_tutels() and issubclass(subclass, MoELayer))

    def _is_tutels(cls) -> bool:
        """Whether Tutel's name stands for this class, and not for one that a user derives from it."""
        return cls.__name__ == "MOELayer" and cls.__module__.partition(".")[0] == __package__


class MOELayer(MoELayer, metaclass=_TutelsClass):
    """A `MoELayer` whose arguments mean what they mean in Tutel.

    Without a `group`, the experts are divided over all ranks, where torch.distributed is initialised; in a `MoELayer`,
    each process then holds them all. A k above the number of experts means all experts, in `gate_type` and in the call.
    Start weights have the bits of Tutel 0.3, also without seeds.
    """

    _experts_first = True

    @staticmethod
    def _meant(config: MoEConfig) -> MoEConfig:
        """The configuration with Tutel's defaults filled in."""
        group = _ranks_of_job() if config.group is None else config.group
        start = config.experts_per_rank * (1 if group is None else dist.get_world_size(group))
        gates = [{**gate, "k": _at_most(start, gate["k"])} if "k" in gate else gate for gate in config.gates]
        return replace(config, group=group, gate_type=gates)

    def _get_name(self) -> str:
        return MoELayer.__name__  # printed models are alike

    def _k_of_call(self, top_k: int | None) -> int | None:
        return _at_most(self.slots, top_k) if top_k else None  # 0 is the gate's k, as in Tutel


moe_layer = MOELayer


def _at_most(experts: int, k: Any) -> Any:
    """k, at most the number of experts, with a warning; what is no integer is left to the gate to refuse."""
    if not isinstance(k, Integral) or isinstance(k, bool) or k <= experts:
        return k
    warn_once(f"k = {k} is more than the {experts} experts of a layer: a token takes them all, as in Tutel")
    return experts


def _ranks_of_job() -> Any:
    """The group of all ranks; None in a process without others, whose layers then hold no group and can be pickled."""
    group = _all_ranks()
    if group is None and os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        warn_once(
            "moe_layer was called before torch.distributed.init_process_group() in a job of WORLD_SIZE = "
            f"{os.environ['WORLD_SIZE']} processes: this process holds all experts. Initialise first to divide them "
            "over the ranks, or write dynmoe_tutel.MoELayer where each process is to hold them all"
        )
    return None if group is None or dist.get_world_size(group) == 1 else group


def top_any_routing(
    x: Tensor,
    sim_matrix: Tensor,
    gates: Tensor,
    experts_mask: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    fallback: bool = False,
    capacity: Capacity = "exact",
) -> Routing:
    """Route tokens x [T, D] by routing vectors sim_matrix [D, E] and thresholds gates [E] (before the sigmoid).

    `experts_mask` [E] is > 0 for active slots (default: all); `scale` is tau; `fallback` gives unrouted tokens their
    best expert, as in eval. Differentiable in x, sim_matrix, gates and scale through the combine.
    """
    for name, tensor in (("x", x), ("sim_matrix", sim_matrix)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be a floating-point matrix of 16, 32 or 64 bits, got {describe(tensor)}")
    D, E = sim_matrix.shape
    if x.shape[1] != D:
        raise ValueError(f"x must be [T, D] and sim_matrix [D, E], got {list(x.shape)} and {list(sim_matrix.shape)}")
    mask = torch.ones(E, device=x.device) if experts_mask is None else experts_mask
    for name, tensor in (("gates", gates), ("experts_mask", mask)):
        if not isinstance(tensor, Tensor) or tensor.shape != (E,) or tensor.is_complex():
            raise ValueError(f"{name} must have shape [{E}], one real number an expert, got {describe(tensor)}")
    for name, tensor in (("sim_matrix", sim_matrix), ("gates", gates), ("experts_mask", mask)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move one with .to()")
    if fallback and not torch.compiler.is_compiling() and not (mask > 0).any():
        raise ValueError("experts_mask has no active expert to fall back to")
    check_capacity(capacity)
    dtype = gate_dtype(x)
    tau = _scale(scale).to(x.device, dtype)
    score_TE, bits_TW, unrouted_T, *_ = threshold_gate(x, sim_matrix, gates.detach(), mask > 0, tau, fallback)
    thresholds = torch.sigmoid(tau * gates.to(dtype))
    return Routing.from_bits(bits_TW, score_TE, unrouted=unrouted_T, thresholds=thresholds, capacity=capacity)


def _scale(scale: object) -> Tensor:
    """tau as a 0-dim tensor; ValueError unless it is one number above 0."""
    if not isinstance(scale, Tensor):
        return torch.tensor(number("scale", scale, 0, open_low=True), dtype=torch.float64)
    if scale.numel() != 1:
        raise ValueError(f"scale must be one number, got {list(scale.shape)}")
    return scale.reshape(())


def gshard_loss(scores: Tensor, top_ids: Tensor) -> Tensor:
    """GShard's loss of scores [T, E] and picks [T, K] (-1 for none), by the first picks; arXiv 2006.16668."""
    first_TE = F.one_hot(top_ids[:, 0] + 1, scores.shape[1] + 1)[:, 1:]
    return losses.gshard_loss(scores, first_TE)


def top_k_routing(
    scores: Tensor | Routing,
    top_k: int | Tensor | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = gshard_loss,
    capacity_factor: float = 1.0,
    batch_prioritized_routing: bool = False,
    normalize_gate: bool = True,
    alignment: int = 1,
    group: Any = None,
    inequivalent_tokens: bool = False,
) -> tuple[CriticalData, Tensor | None]:
    """(data, l_aux): Tutel's critical data of scores [T, E] and `loss_fn(scores, picks)`; see `expert_capacity`.

    `top_k` is k, or each token's k as integers [T] from 0. The picks [T, max k] are the best experts by score, padded
    with -1. A `Routing` instead of scores brings its own picks and weights. `normalize_gate` divides the scores of
    k > 1 picks by their sum. As in Tutel, the data keeps rows beyond the capacity; its readers drop them.
    """
    if isinstance(scores, Routing):
        data = critical_data(scores)
        picks_TK, weights = torch.stack(data[1], dim=1).long(), data[3]
        scores = scores.scores
    else:
        picks_TK = _best(scores, top_k)
        weight_TK = scores.gather(1, picks_TK.clamp(min=0)).masked_fill(picks_TK < 0, 0)
        if picks_TK.shape[1] > 1 and normalize_gate:
            weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).eps)
        weights = [weight_T.contiguous() for weight_T in weight_TK.unbind(dim=1)]
    (T, K), E = picks_TK.shape, scores.shape[1]
    place_TK = locations(picks_TK, E, scores.amax(dim=1) if batch_prioritized_routing else None)
    load_E = torch.zeros(E + 1, dtype=torch.int64, device=picks_TK.device)
    load_E = load_E.scatter_add_(0, picks_TK.remainder(E + 1).flatten(), torch.ones_like(picks_TK).flatten())[:E]
    capacity = expert_capacity(
        number("capacity_factor", capacity_factor, -math.inf),
        T,
        E,
        K,
        int(load_E.max()),
        alignment=alignment,
        group=_all_ranks() if group is None else group,
        inequivalent_tokens=inequivalent_tokens,
    )
    l_aux = None if loss_fn is None else loss_fn(scores, picks_TK)
    columns = [[column.contiguous() for column in x.int().unbind(dim=1)] for x in (picks_TK, place_TK)]
    return (E, *columns, weights, capacity, load_E.int()), l_aux  # type: ignore[return-value]


extract_critical = top_k_routing  # Tutel's other name


def fast_cumsum_sub_one(data: Tensor, dim: int = 0) -> Tensor:
    """The sums of `data` [T, E] down to each row, minus one: with 0 and 1, each token's place in its expert's queue."""
    if not isinstance(data, Tensor) or data.dim() != 2 or dim != 0:
        raise ValueError(f"fast_cumsum_sub_one takes a matrix [T, E] and dim = 0, got {describe(data)} and {dim!r}")
    return data.cumsum(dim=0) - 1


def _all_ranks() -> Any:
    """The group that None means in Tutel's functions: all ranks of the job, if there are several."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _best(scores: Tensor, top_k: int | Tensor | None) -> Tensor:
    """The picks [T, K] int64, padded with -1."""
    if not isinstance(scores, Tensor) or scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"scores must be a floating-point matrix [T, E], or a Routing, got {describe(scores)}")
    T, E = scores.shape
    if not isinstance(top_k, Tensor):
        return scores.topk(min(positive_int("top_k", top_k), E), dim=1).indices
    if top_k.shape != (T,) or top_k.is_floating_point() or top_k.dtype == torch.bool:
        raise ValueError(f"top_k must be an integer or integers [{T}], one a token, got {describe(top_k)}")
    if T and not 0 <= int(top_k.min()) <= int(top_k.max()) <= E:
        raise ValueError(f"top_k has values from {int(top_k.min())} to {int(top_k.max())}: allowed are 0 to {E}")
    K = max(int(top_k.max()) if T else 0, 1)
    behind_TK = torch.arange(K, device=scores.device) >= top_k.unsqueeze(1)
    return scores.topk(K, dim=1).indices.masked_fill(behind_TK, -1)


class FastDispatcher:
    """Tutel's dispatcher: token rows [T, D] to padded expert rows [E * C, D] and back, by gates and picks.

    `update` takes Tutel's lists (K tensors of [T]: experts, -1 for none; positions in the experts' queues; gates), or
    one `Routing`. `decode` applies the gates if `is_postscore`, else `encode` does. Differentiable in data and gates,
    in the dtype of the data, with a fixed order of sums.
    """

    def __init__(self, num_global_experts: int, capacity: int, model_dim: int, dispatch_dtype: torch.dtype) -> None:
        self.num_global_experts, self.capacity = int(num_global_experts), int(capacity)
        self.model_dim, self.dtype = int(model_dim), dispatch_dtype
        self.routing: Routing | None = None

    def update(
        self,
        indices_: Sequence[Tensor] | Routing,
        locations_: Sequence[Tensor] | None = None,
        gates_: Sequence[Tensor] | None = None,
        capacity: int | None = None,
        is_postscore: bool = True,
        combine_gradient: str = "mean",
    ) -> None:
        """Set the assignment of a batch; `combine_gradient` applies to a `Routing`."""
        self.is_postscore = is_postscore
        if isinstance(indices_, Routing):
            self.routing = indices_
            self.places = PaddedRows(indices_, capacity or self.capacity or None)
            self.capacity, self.gate_A = self.places.capacity, indices_.row_gates(combine_gradient)
            if not is_postscore and indices_.weights is None:
                token_A = indices_.token_of_row
                self.gate_A = self.gate_A / indices_.k_per_token.index_select(0, token_A.clamp(min=0))
            return
        if locations_ is None or gates_ is None or not len(indices_) == len(locations_) == len(gates_) > 0:
            raise ValueError("update takes indices, locations and gates as lists of equal length, or one Routing")
        self.routing = None
        self.capacity = int(capacity or 0) or self.capacity
        self.sample_size = indices_[0].numel()
        self._columns = []
        for expert_T, place_T, gate_T in zip(indices_, locations_, gates_, strict=True):
            expert_T, place_T = expert_T.reshape(-1).long(), place_T.reshape(-1).long()
            held_T = ((expert_T >= 0) & (place_T < self.capacity)).nonzero().squeeze(1)
            self._columns.append((held_T, (expert_T * self.capacity + place_T)[held_T], gate_T.reshape(-1)))

    def encode(self, data: Tensor) -> Tensor:
        """[T, D] to [E * C, D], padded with zeros."""
        if self.routing is not None:
            rows = self.routing.dispatch(self._checked(data, self.routing.num_tokens))
            if not self.is_postscore:
                rows = rows * self.gate_A.unsqueeze(1).to(rows.dtype)
            return self.places.pad(rows).flatten(0, 1)
        self._checked(data, self.sample_size)
        padded = data.new_zeros((self.num_global_experts * self.capacity, data.shape[1]))
        for held_T, place_A, gate_T in self._columns:
            rows = data.index_select(0, held_T)
            if not self.is_postscore:
                rows = rows * gate_T.index_select(0, held_T).unsqueeze(1).to(data.dtype)
            padded = padded.index_copy(0, place_A, rows)
        return padded

    def decode(self, data: Tensor) -> Tensor:
        """[E * C, D] to [T, D], 0 for a token without a row."""
        if data.dim() != 2 or data.shape[0] != self.num_global_experts * self.capacity:
            wanted = f"[{self.num_global_experts} * {self.capacity}, D]"
            raise ValueError(f"data must be {wanted} as encode made it, got {describe(data)}")
        if self.routing is not None:
            rows = self.places.unpad(data.view(self.num_global_experts, self.capacity, -1))
            if self.is_postscore:
                rows = rows * self.gate_A.unsqueeze(1).to(rows.dtype)
                return self.routing.combine(rows)
            return self.routing.sum(rows)
        out = data.new_zeros((self.sample_size, data.shape[1]))
        for held_T, place_A, gate_T in self._columns:
            rows = data.index_select(0, place_A)
            if self.is_postscore:
                rows = rows * gate_T.index_select(0, held_T).unsqueeze(1).to(data.dtype)
            out = out.index_add(0, held_T, rows)
        return out

    @staticmethod
    def _checked(data: Tensor, num_tokens: int) -> Tensor:
        if not isinstance(data, Tensor) or data.dim() != 2 or data.shape[0] != num_tokens:
            raise ValueError(f"data must be [T, D] with T = {num_tokens} routed tokens, got {describe(data)}")
        return data


fast_dispatcher = FastDispatcher


def fast_encode(data: Tensor, critical_data: Routing | CriticalData, is_postscore: bool = True) -> Tensor:
    """Token rows [T, D] to expert rows [E, C, D], padded with zeros; see `FastDispatcher`.

    `routing.dispatch(data)` gives packed rows, [A, D] without padding.
    """
    dispatcher = _dispatcher(data, critical_data, is_postscore)
    return dispatcher.encode(data).view(dispatcher.num_global_experts, dispatcher.capacity, -1)


def fast_decode(
    data: Tensor,
    critical_data: Routing | CriticalData,
    is_postscore: bool = True,
    combine_gradient: str = "mean",
) -> Tensor:
    """Padded expert rows [E, C, D] back to tokens [T, D]: the mean of each token's rows (top-any), or a weighted sum.

    For packed rows use `routing.combine(rows)`, with rows times `routing.row_gates()` for the router's gradient.
    """
    if not isinstance(data, Tensor) or data.dim() != 3:
        raise ValueError(f"data must be [E, C, D], got {describe(data)}")
    dispatcher = _dispatcher(data, critical_data, is_postscore, combine_gradient)
    return dispatcher.decode(data.flatten(0, 1))


def _dispatcher(
    data: Tensor, critical_data: Routing | CriticalData, is_postscore: bool, combine_gradient: str = "mean"
) -> FastDispatcher:
    if isinstance(critical_data, Routing):
        capacity = data.shape[1] if isinstance(data, Tensor) and data.dim() == 3 else 0
        dispatcher = FastDispatcher(critical_data.num_experts, capacity, data.shape[-1], data.dtype)
        dispatcher.update(critical_data, is_postscore=is_postscore, combine_gradient=combine_gradient)
        return dispatcher
    if not isinstance(critical_data, tuple | list) or len(critical_data) != 6:
        raise ValueError(f"critical_data must be a Routing or Tutel's tuple of six, got {describe(critical_data)}")
    dispatcher = FastDispatcher(critical_data[0], critical_data[4], data.shape[-1], data.dtype)
    dispatcher.update(*critical_data[1:5], is_postscore=is_postscore)
    return dispatcher


def critical_data(routing: Routing, capacity: int | None = None, combine_gradient: str = "mean") -> CriticalData:
    """Tutel's tuple of a ragged assignment, for Tutel's own `fast_encode` and `fast_decode`.

    (E, indices, locations, gates, capacity, loads [E]): each list has K tensors [T], one a pick, int32, int32 and
    floating point; index -1 where a token has fewer picks. The default capacity is the largest load: no drops.
    """
    expert_TK = picks(routing)
    E = routing.num_experts
    if expert_TK.shape[1] == 0:  # no assignment: Tutel needs at least one column
        expert_TK = expert_TK.new_full((routing.num_tokens, 1), -1)
    weight_TK = combine_weights(routing, combine_gradient).gather(1, expert_TK.clamp(min=0))
    weight_TK = weight_TK.masked_fill(expert_TK < 0, 0)
    place_TK = locations(expert_TK, E)
    if capacity is None:
        capacity = max(int(routing.counts.max()), 1)
    columns = [[c.contiguous() for c in x.unbind(dim=1)] for x in (expert_TK.int(), place_TK.int(), weight_TK)]
    return (E, *columns, positive_int("capacity", capacity), routing.counts)  # type: ignore[return-value]
