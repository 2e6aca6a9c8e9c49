"""`Gate`, the base of all gates: a module from tokens to a `Routing` with auxiliary loss terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..routing import Capacity, Routing
from ..temporary_hooks import without_temporary_hooks
from ..validation import environment_number, number, positive_int, warn_once


@dataclass(frozen=True)
class GateType:
    """What a gate type's name means."""

    cls: type[Gate]
    keys: frozenset[str] | None  # allowed in the dict beside "type"; None: the class checks them
    defaults: Mapping[str, Any]  # used for keys that the dict lacks
    combine_gradient: str


GATE_TYPES: dict[str, GateType] = {}
COMMON_KEYS = frozenset({"fp32_gate", "adaptive_experts", "gate_noise", "capacity_factor"})
G = TypeVar("G", bound="type[Gate]")


def gate_type(
    name: str,
    keys: Collection[str] | None = (),
    defaults: Mapping[str, Any] | None = None,
    combine_gradient: str = "mean",
) -> Callable[[G], G]:
    """Register a gate class as the type `name` of layers; what this package registers, Tutel and its stand-in know too.

    `keys` are allowed in the dict beside `COMMON_KEYS`; None: the class checks the keys.
    """

    def register(cls: G) -> G:
        allowed = None if keys is None else COMMON_KEYS | frozenset(keys)
        GATE_TYPES[name] = GateType(cls, allowed, defaults or {}, combine_gradient)
        return cls

    return register


class Gate(nn.Module):
    """Base of all gates.

    `model_dim` D; `num_experts` active at start; `slots` E >= num_experts; `aux_names` the terms put in `Routing.aux`;
    `capacity_factor` the default of the layer's forward: environment variable CAP_FACTOR, else 0 (dropless).
    """

    adaptive: ClassVar[bool] = False  # can grow and prune experts
    default_aux: ClassVar[dict[str, float]] = {}
    without_gshard: ClassVar[dict[str, float]] = {}
    aux_choices: ClassVar[tuple[str, ...]] = ()
    slot_axes: ClassVar[Mapping[str, int]] = {}  # the axis that counts slots in each tensor that has one
    exact_buffers: tuple[str, ...] = ()  # state that steps move: fp32 in half precision too, averages take it over
    takes_max_k: ClassVar[bool] = False  # whether a call may limit the experts of a token
    max_k: int | None = None  # the gate's own limit
    target_k: float | None = None  # the mean number of experts a token that steps hold, or draw to by a loss
    scope: str = "layer"  # of `target_k`: "model": the mean over all layers' gates of this class

    def __init__(
        self,
        *,
        model_dim: int,
        num_experts: int,
        slots: int,
        aux_names: Collection[str],
        gate_noise: float = 0.0,
        capacity_factor: float | None = None,
        fp32_gate: bool = True,
        adaptive_experts: bool = True,
        normalize_gate: bool = True,
        one_score_gate: bool = False,
        normalize_one_score_gate: bool = False,
    ) -> None:
        super().__init__()
        self.model_dim = positive_int("model_dim", model_dim)
        self.num_experts, self.slots = num_experts, slots
        self.seed: int | None = None  # of the private generator from which `reset_parameters` draws
        self.aux_names = tuple(aux_names)
        self.gate_noise = number("gate_type['gate_noise']", gate_noise, 0)
        self.normalize_gate, self.one_score_gate = normalize_gate, one_score_gate
        self.normalize_one_score_gate = normalize_one_score_gate
        unknown = [name for name in self.aux_names if name not in self.aux_choices]
        if unknown:
            raise ValueError(
                f"aux_losses: {unknown[0]!r} is no term of {type(self).__name__}: allowed are "
                f"{', '.join(self.aux_choices) or 'none'}"
            )
        if capacity_factor is None:
            self.capacity_factor = environment_number("CAP_FACTOR", 0.0)
        else:
            self.capacity_factor = number("gate_type['capacity_factor']", capacity_factor, -math.inf)
        if self.adaptive and not adaptive_experts:
            warn_once("gate_type['adaptive_experts'] = False is ignored: experts change only when you call an update")
        if not fp32_gate:
            warn_once("gate_type['fp32_gate'] = False is ignored: gate arithmetic is always fp32")

    def forward(
        self,
        x_TD: Tensor,
        capacity: Capacity = "exact",
        top_k: int | None = None,
        token_mask: Tensor | None = None,
    ) -> Routing:
        """Route tokens [T, D] of any float dtype; tokens where `token_mask` [T] is False are padding."""
        raise NotImplementedError

    @classmethod
    def aux_weights(cls, is_gshard_loss: bool | None) -> dict[str, float]:
        """The weights of l_aux's terms for is_gshard_loss; None: the defaults of the gate's kind."""
        if is_gshard_loss is None:
            return dict(cls.default_aux)
        return {"gshard": 1.0} if is_gshard_loss else dict(cls.without_gshard)

    def limit_of_call(self, max_k: int | None) -> int | None:
        """The largest number of experts a token in a call with `max_k`: the smaller of it and the gate's; None: any."""
        if max_k is not None and not self.takes_max_k:
            raise ValueError(
                f"max_k = {max_k!r} is for top-any gates and those of type relu, top_p and expert_threshold, not for "
                f"{type(self).__name__}: give top_k"
            )
        limits = [limit for limit in (self.max_k, max_k) if limit is not None]
        return min(limits, default=None)

    def keep_sample(self, x_TD: Tensor, routing: Routing) -> None:
        """Keep what `adaptive.Budgets` needs of a training forward's tokens, where the gate has state to move."""

    def step_counts(self) -> Tensor | None:
        """What the training forwards since the last step counted, [n] int64; None: `after_step` does nothing."""
        return None

    def after_step(self, counts: Tensor) -> None:
        """Move the gate's state after an optimizer step, by the `step_counts` of all ranks; count anew."""

    def held_values(self) -> dict[str, float]:
        """The target and the state that steps move, as numbers worth a curve, by name. Waits for the device."""
        return {}

    def freeze_keys(self) -> None:
        """For one_score_gate: stop training the keys; only `update_one_score_gate` changes them."""
        raise ValueError(f"one_score_gate = True is for gates of type 'top', not for {type(self).__name__}")

    def reset_parameters(self) -> None:
        """Set all tensors as at construction: with a seed, bitwise those; else from the global random state."""
        raise NotImplementedError

    @property
    def itself(self) -> Gate:
        """This gate, for `parts.unwrapped`."""
        return self

    def active(self) -> Tensor:
        """[E] bool: the slots that hold an expert."""
        device = next((p.device for p in self.parameters()), None)
        return torch.ones(self.slots, dtype=torch.bool, device=device)

    def _apply(self, *args: Any, **options: Any) -> Any:
        """As any module's, but `exact_buffers` stay fp32: half precision is too coarse for them."""
        exact = {name: value for name in self.exact_buffers if (value := getattr(self, name)) is not None}
        super()._apply(*args, **options)
        for name, value in exact.items():
            if not value.is_meta:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without a meter's hooks, which belong to this gate alone."""
        return without_temporary_hooks(self.__dict__)
