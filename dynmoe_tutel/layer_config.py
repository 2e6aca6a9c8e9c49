"""`MoEConfig`: every argument of a layer, checked once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Concatenate, ParamSpec

import torch.distributed as dist
from torch import Tensor, nn

from .experts import experts_at_start
from .gates import combine_gradient_of, gate_class, gate_config, max_experts
from .routing import COMBINE_GRADIENTS, Capacity, check_capacity
from .validation import flag, number, positive_int, refuse_unknown

_FLAGS = (
    "is_postscore",
    "batch_prioritized_routing",
    "normalize_gate",
    "use_2dh",
    "one_score_gate",
    "normalize_one_score_gate",
    "value_norm_weighted",
    "check_finite",
)
_KEPT = ("result_func", "parallel_type", "capacity")
_OWN = ("capacity", "combine_gradient", "aux_losses", "check_finite", "record_group", "exchange")
P = ParamSpec("P")


@dataclass(frozen=True)
class MoEConfig:
    """The arguments of a `MoELayer`: Tutel's, in Tutel's order, then this package's own.

    Args:
        gate_type: a dict such as ``{"type": "top_any", "max_expert_num": 16}``, a name, or a list of them (chosen by
            ``gate_index`` in forward). Types: top_any, gated_multi_gate, gated_multi_gate_t, top, cosine_top, relu,
            top_p, expert_threshold, null_experts, quantile_top_k, custom.
        model_dim: D.
        experts: a dict such as ``{"type": "ffn", "num_experts_per_device": 8, "hidden_size_per_expert": 1536}``; types
            ffn, llama_ffn, custom. ``num_experts_per_device`` (or ``count_per_node``) experts are active at start.
        scan_expert_func: called with (name, parameter) for every expert parameter.
        result_func: applied to the output, which carries ``l_aux``.
        group: process group over whose ranks the experts are divided: slot e is on rank e // (E / ranks), and
            ``num_experts_per_device`` are active on each at start. None: this process holds them all; for
            `moe.moe_layer`, as in Tutel: all ranks, where torch.distributed is initialised.
        seeds: (gates, experts) seeds of private generators; the global random state is never reseeded.
        a2a_ffn_overlap_degree: chunks of tokens (exact capacity only): one is sent while another is computed.
        is_postscore: False applies scores before the experts and needs stock Tutel.
        batch_prioritized_routing: a ``capacity_factor`` keeps tokens of high score instead of early ones.
        normalize_gate: for fixed k > 1, normalise weights over the chosen experts.
        is_gshard_loss: None: the loss of the gate's kind; True: GShard's; False: diversity and simplicity (top-any) or
            load and importance (fixed k).
        parallel_type, use_2dh: accepted for Tutel's scripts; they change nothing outside Tutel.
        one_score_gate, normalize_one_score_gate, value_norm_weighted, update_momentum: EMoE's avg-k gate, see
            `MoELayer.update_one_score_gate`.
        capacity: rows of memory: "exact" (one an assignment), "full" (T * E), or a factor of T. A factor gives static
            shapes and drops the assignments of smallest margin (where a budget raises thresholds, a token's best one
            after all others), with one warning; ``dropped_assignments`` counts them since construction. A token's
            output then depends on its batch, and records count what is left. None: as a budget's ``max_k`` allows
            (max_k * T rows: static, and nothing is dropped) where all experts are in this process, else "exact".
        combine_gradient: gradient of a top-any assignment: "mean" (<dy, expert(x)> / k) or "normalized"
            ((<dy, expert(x)> - <dy, y>) / k, DynMoE-Tutel's, the default of upstream's gate names).
        aux_losses: weights of the terms of ``l_aux`` by name, instead of the default of is_gshard_loss.
        check_finite: raise ValueError for non-finite tokens (waits for the device).
        record_group: process group over which records are summed; None: all ranks.
        exchange: makes the `Exchange` of a layer from its configuration; None: chosen by `group`.

    Raises ValueError that names the argument, its value and the allowed values.
    """

    gate_type: str | Mapping[str, Any] | list[Any]
    model_dim: int
    experts: Mapping[str, Any] | None = None
    scan_expert_func: Callable[[str, nn.Parameter], Any] | None = None
    result_func: Callable[[Tensor], Any] | None = None
    group: Any = None
    seeds: tuple[int | None, ...] | None = None
    a2a_ffn_overlap_degree: int = 1
    is_postscore: bool = True
    batch_prioritized_routing: bool = False
    normalize_gate: bool = True
    is_gshard_loss: bool | None = None
    parallel_type: str = "adaptive:1"
    use_2dh: bool = False
    one_score_gate: bool = False
    normalize_one_score_gate: bool = False
    value_norm_weighted: bool = False
    update_momentum: float = 0.0
    _: KW_ONLY
    capacity: Capacity | None = None
    combine_gradient: str | None = None
    aux_losses: Mapping[str, float] | None = None
    check_finite: bool = False
    record_group: Any = None
    exchange: Callable[[MoEConfig], Any] | None = None

    @classmethod
    def named(cls, *arguments: Any) -> dict[str, Any]:
        """Positional arguments, in Tutel's order, by name."""
        names = [field.name for field in fields(cls)][: -len(_OWN)]
        if len(arguments) > len(names):
            raise TypeError(f"moe_layer takes {len(names)} positional arguments, got {len(arguments)}")
        return dict(zip(names, arguments, strict=False))

    @classmethod
    def of(cls, *arguments: Any, **options: Any) -> MoEConfig:
        """From a layer's arguments; ValueError that names an unknown one, TypeError for one given twice or missing."""
        refuse_unknown("moe_layer", options, [field.name for field in fields(cls)])
        return cls(**cls.named(*arguments), **options)

    def __post_init__(self) -> None:
        if self.capacity is not None:
            check_capacity(self.capacity)
        if not isinstance(self.experts, Mapping):
            raise ValueError(f"experts must be a dict, got {type(self.experts).__name__}")
        for name in ("scan_expert_func", "result_func", "exchange"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise ValueError(f"{name} = {function!r}: give a function or None")
        for name in ("group", "record_group"):
            value = getattr(self, name)
            if value is not None and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
                raise ValueError(f"{name} = {value!r}: give a process group of torch.distributed, or None")
        self._set("model_dim", positive_int("model_dim", self.model_dim))
        for name in _FLAGS:
            self._set(name, flag(name, getattr(self, name)))
        if self.is_gshard_loss is not None:
            self._set("is_gshard_loss", flag("is_gshard_loss", self.is_gshard_loss))
        self._set("update_momentum", number("update_momentum", self.update_momentum, 0, 1))
        self._set("a2a_ffn_overlap_degree", overlap_degree(self.a2a_ffn_overlap_degree))
        if self.combine_gradient is not None and self.combine_gradient not in COMBINE_GRADIENTS:
            raise ValueError(f"combine_gradient = {self.combine_gradient!r}: allowed are 'mean' and 'normalized'")
        if not self.gates:
            raise ValueError("gate_type = []: give at least one gate")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def gates(self) -> list[dict[str, Any]]:
        """The configuration of each gate, copied."""
        given = self.gate_type if isinstance(self.gate_type, list) else [self.gate_type]
        return [gate_config(gate) for gate in given]

    @property
    def experts_per_rank(self) -> int:
        """The experts active on each rank at start."""
        assert self.experts is not None
        return experts_at_start(self.experts)

    @property
    def attributes(self) -> tuple[str, ...]:
        """The fields that a layer also has as attributes, as Tutel's layer does."""
        return (*_FLAGS, "is_gshard_loss", "update_momentum", "a2a_ffn_overlap_degree", *_KEPT)

    def described(self, slots: int, gates: Iterable[nn.Module]) -> dict[str, Any]:
        """The values, by name, that must be equal on all ranks that hold the layer's experts."""
        assert self.experts is not None
        return {
            "max_expert_num": slots,
            "model_dim": self.model_dim,
            "experts": {name: value for name, value in self.experts.items() if isinstance(value, int | str)},
            "gates": [type(gate).__name__ for gate in gates],
            "budgets": [str(getattr(gate, "budget", None)) for gate in gates],
            "capacity": self.capacity,
            "a2a_ffn_overlap_degree": self.a2a_ffn_overlap_degree,
        }

    def slots(self, start: int) -> int:
        """E: the largest number of slots that a gate asks for, with `start` experts active at start."""
        slots = [max_experts(config, start) for config in self.gates]
        for config, count in zip(self.gates, slots, strict=True):
            if count < start:
                raise ValueError(
                    f"gate_type['max_expert_num'] = {count} is less than the {start} experts at start "
                    f"(num_experts_per_device, summed over the ranks) of type {config.get('type')!r}: give at least "
                    f"{start}"
                )
        if len(set(slots)) > 1 and any(not gate_class(c).adaptive for c in self.gates):
            raise ValueError(
                f"gate_type: the gates want {slots} experts, and a fixed-k gate uses all: give every gate the same "
                "number"
            )
        return max(slots)

    def combine_gradients(self) -> list[str]:
        """ "mean" or "normalized" for each gate; the default depends on the gate's type."""
        return [self.combine_gradient or combine_gradient_of(config) for config in self.gates]

    def aux_weights(self) -> list[dict[str, float]]:
        """For each gate, the weights of l_aux's terms by name: from `aux_losses`, else from is_gshard_loss."""
        if self.aux_losses is None:
            return [gate_class(config).aux_weights(self.is_gshard_loss) for config in self.gates]
        if not isinstance(self.aux_losses, Mapping):
            raise ValueError(
                f"aux_losses = {self.aux_losses!r}: give a dict of weights by name, such as {{'diversity': 1.0}}"
            )
        weights = {name: number(f"aux_losses[{name!r}]", weight, -math.inf) for name, weight in self.aux_losses.items()}
        return [dict(weights) for _ in self.gates]


def overlap_degree(value: object) -> int:
    """The number of chunks; Tutel's 0 means 1."""
    return positive_int("a2a_ffn_overlap_degree", 1 if value == 0 else value)


def takes_arguments_of(
    config: Callable[P, MoEConfig],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give a constructor the fields of the configuration as its signature, for `help` and type checkers."""

    def decorate(constructor: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        own = next(iter(inspect.signature(constructor).parameters.values()))
        parameters = inspect.signature(config).parameters.values()
        constructor.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
        return constructor

    return decorate
