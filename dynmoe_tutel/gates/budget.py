"""`Budget`: how many experts a token may activate on average and at most; the setting of a top-any gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..validation import positive_int, refuse_unknown

SCOPES = ("layer", "model")


@dataclass(frozen=True)
class Budget:
    """The key `budget` of a top-any gate, as a dict with any of these keys.

    Args:
        target_k: the mean number of experts a token in training, from 1 to the experts active at start. It is held by
            a shift of all thresholds, in cosine units, which `adaptive.budget` moves after each optimizer step. None:
            thresholds are not shifted.
        max_k: the largest number of experts a token, an integer of at least 1; of more, those of largest margin
            cos - G stay, of equal margins those of lower slots. None: no limit.
        scope: "layer": each layer holds `target_k`; "model": the mean over all layers of scope "model" does, with one
            shift for all, so that layers share it by need.

    A token that passes a threshold of its own keeps its best expert whatever the shift. So the mean of a batch whose
    tokens all pass one can be held at 1, and not below.
    """

    target_k: float | None = None
    max_k: int | None = None
    scope: str = "layer"

    def __post_init__(self) -> None:
        if self.target_k is None and self.max_k is None:
            raise ValueError("gate_type['budget'] has neither 'target_k' nor 'max_k': give at least one of them")
        checked_scope("gate_type['budget']['scope']", self.scope)

    @classmethod
    def of(cls, value: object, experts: int) -> Budget:
        """From the gate's key `budget`, for a gate with `experts` active at start; ValueError that says the range."""
        if not isinstance(value, Mapping):
            raise ValueError(f"gate_type['budget'] = {value!r}: give a dict such as {{'target_k': 2.0, 'max_k': 4}}")
        refuse_unknown("gate_type['budget']", dict(value), ("target_k", "max_k", "scope"))
        given: dict[str, Any] = dict(value)
        target_k, max_k = given.get("target_k"), given.get("max_k")
        if max_k is not None:
            given["max_k"] = max_k = positive_int("gate_type['budget']['max_k']", max_k)
        if target_k is not None:
            given["target_k"] = checked_target(
                "gate_type['budget']['target_k']", target_k, experts if max_k is None else min(experts, max_k)
            )
        return cls(**given)


def checked_target(name: str, value: Any, most: int) -> float:
    """A mean number of experts a token from 1 to `most`; ValueError that says this range and why."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 1 <= value <= most:
        raise ValueError(
            f"{name} = {value!r}: give a number from 1 (a token that passes a threshold keeps its best expert) to "
            f"{most} (the active experts, or max_k if less)"
        )
    return float(value)


def checked_scope(name: str, value: object) -> str:
    """ "layer" or "model"; ValueError for anything else."""
    if not isinstance(value, str) or value not in SCOPES:
        raise ValueError(f"{name} = {value!r}: allowed are 'layer' and 'model'")
    return value
