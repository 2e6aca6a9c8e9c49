"""Tutel's dispatcher and routing functions, extended to take a ragged `Routing` as well as Tutel's critical data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import tutel.impls.fast_dispatch
from torch import Tensor

from .. import moe
from ..capacity import bits_of_picks
from ..routing import Routing

_noted: ContextVar[list[Any] | None] = ContextVar("noted", default=None)


def extract_critical(*arguments: Any, **options: Any) -> Any:
    """Tutel's own, for Tutel's own layers: inside `noting` the critical data that it returns are noted too."""
    made = tutel.impls.fast_dispatch.extract_critical(*arguments, **options)
    if (noted := _noted.get()) is not None:
        noted.append(made[0])
    return made


@contextmanager
def noting() -> Iterator[list[Any]]:
    """The critical data of the layers that run inside, in this thread."""
    noted: list[Any] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def kept_routing(critical_data: Any) -> Routing:
    """The assignments that Tutel's critical data keep within the capacity; for records: it has no scores or weights."""
    num_experts, experts, places, _, capacity, *_ = critical_data
    expert_TK, place_TK = (torch.stack(list(columns), dim=1).long() for columns in (experts, places))
    bits_TW = bits_of_picks(expert_TK, (expert_TK >= 0) & (place_TK < capacity), num_experts)
    scores = torch.zeros((len(expert_TK), num_experts), device=expert_TK.device)
    return Routing.from_bits(bits_TW, scores, unrouted=(expert_TK < 0).all(dim=1))


class FastDispatcher(tutel.impls.fast_dispatch.TutelMoeFastDispatcher):
    """Tutel's dispatcher; its `update` also takes a ragged `Routing`; see `dynmoe_tutel.moe.FastDispatcher`."""

    capacity: int

    def update(self, indices_: Any, *arguments: Any, **options: Any) -> None:
        """Set the assignment: Tutel's lists, or a `Routing` with `is_postscore` and `combine_gradient`."""
        self._ragged: moe.FastDispatcher | None = None
        if not isinstance(indices_, Routing):
            super().update(indices_, *arguments, **options)
            return
        self._ragged = moe.FastDispatcher(self.num_global_experts, self.capacity, self.model_dim, self.original_dtype)
        self._ragged.update(indices_, *arguments, **options)
        self.capacity = self._ragged.capacity

    def encode(self, data: Tensor) -> Tensor:
        """[T, D] to [E * C, D]."""
        return super().encode(data) if self._ragged is None else self._ragged.encode(data)

    def decode(self, data: Tensor) -> Tensor:
        """[E * C, D] to [T, D]."""
        return super().decode(data) if self._ragged is None else self._ragged.decode(data)


def fast_encode(data: Tensor, critial_data: Any, is_postscore: bool = True) -> Tensor:
    """Tutel's `fast_encode`; for a `Routing`, [E, C, D] with C its largest load."""
    if isinstance(critial_data, Routing):
        return moe.fast_encode(data, critial_data, is_postscore)
    return tutel.impls.fast_dispatch.fast_encode(data, critial_data, is_postscore)


def fast_decode(data: Tensor, critial_data: Any, is_postscore: bool = True, combine_gradient: str = "mean") -> Tensor:
    """Tutel's `fast_decode`; for a `Routing`, [E, C, D] to the mean of each token's rows."""
    if isinstance(critial_data, Routing):
        return moe.fast_decode(data, critial_data, is_postscore, combine_gradient)
    return tutel.impls.fast_dispatch.fast_decode(data, critial_data, is_postscore)


def top_k_routing(scores: Any, top_k: Any = None, *arguments: Any, **options: Any) -> Any:
    """Tutel's `extract_critical`; ragged for a k per token or a `Routing`: index -1 means no pick."""
    if isinstance(scores, Routing) or isinstance(top_k, Tensor):
        return moe.top_k_routing(scores, top_k, *arguments, **options)
    return tutel.impls.fast_dispatch.extract_critical(scores, top_k, *arguments, **options)
