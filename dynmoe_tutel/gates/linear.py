"""`LinearLogits`: the router that is one linear map."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..initialization import fill_linear, linear, reset_modules, seed_of, seeded
from ..parts import call_linear, writable
from .base import Gate


class LinearLogits(Gate):
    """logits = x wg^T; `wg.weight` [E, D]. `maps` names the linear maps that are drawn, in this order."""

    slot_axes: ClassVar[dict[str, int]] = {"wg.weight": 0}
    maps: ClassVar[tuple[str, ...]] = ("wg",)

    def __init__(self, *, generator: torch.Generator | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.seed = seed_of(generator)
        self.wg = linear(self.model_dim, self.slots, False, generator)

    def reset_parameters(self) -> None:
        """Draw the router as at construction."""
        weights = [self.weight_of(name) for name in self.maps]
        if self.seed is None:
            reset_modules("the gate", [part for name in self.maps for part in getattr(self, name).modules()])
        else:
            generator = seeded(self.seed)
            for weight in weights:
                fill_linear(weight, None, generator)

    def weight_of(self, name: str) -> Tensor:
        """The weight of the map `name`, to write; ValueError if a tool replaced or parametrised it."""
        return writable(f"the gate's {name}", getattr(self, name), "weight")

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E] in the dtype of `x_TD`, which is fp32 or fp64."""
        return call_linear(self.wg, x_TD)
