"""The cosine router of GMoE (arXiv 2206.04046): fixed k over temperature-scaled cosines in a projected space."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..initialization import fill_linear, linear, reset_modules, seed_of, seeded
from ..kernels.norms import unit
from ..parts import call_linear, writable
from ..validation import number, positive_int
from .base import gate_type
from .top_any import MAX_LOG_SCALE
from .top_k import FixedKGate


@gate_type("cosine_top", ("k", "proj_dim", "init_t"))
class CosineTopKGate(FixedKGate):
    """logits = tau cos(P x, w_e), tau = exp(min(temperature, log 100)), initially 1 / init_t.

    `cosine_projector` D -> proj_dim, `sim_matrix` [proj_dim, E], `temperature` [1].
    """

    slot_axes: ClassVar[dict[str, int]] = {"sim_matrix": 1}

    def __init__(
        self,
        *,
        proj_dim: int = 256,
        init_t: float = 0.5,
        generator: torch.Generator | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        init_t = number("gate_type['init_t']", init_t, 0, open_low=True)
        self.seed, self.init_t = seed_of(generator), init_t
        self.temperature = nn.Parameter(torch.empty(1))
        proj_dim = positive_int("gate_type['proj_dim']", proj_dim)
        self.cosine_projector = linear(self.model_dim, proj_dim, True, generator)
        self.sim_matrix = nn.Parameter(torch.empty(proj_dim, self.slots))
        self._draw(generator)

    @torch.no_grad()
    def _draw(self, generator: torch.Generator | None) -> None:
        """Draw the vectors, after the projector."""
        sim_matrix = writable("the gate", self, "sim_matrix")
        self.temperature.fill_(math.log(1 / self.init_t))
        if not sim_matrix.is_meta:
            drawn = torch.empty(sim_matrix.shape, device="cpu")
            for _ in range(2):  # Tutel draws the vectors twice and keeps the second
                drawn.normal_(0, 0.01, generator=generator)
            sim_matrix.copy_(drawn)

    def reset_parameters(self) -> None:
        """Projector, routing vectors and temperature as at construction."""
        generator, projector = seeded(self.seed), self.cosine_projector
        if generator is None:
            reset_modules("the gate", projector.modules())
        else:
            owner = "the gate's cosine_projector"
            fill_linear(writable(owner, projector, "weight"), writable(owner, projector, "bias"), generator)
        self._draw(generator)

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E]."""
        dtype = x_TD.dtype
        projected = call_linear(self.cosine_projector, x_TD)
        cos_TE = unit(projected, 1) @ unit(self.sim_matrix.to(dtype), 0)
        return cos_TE * self.temperature.to(dtype).clamp(max=MAX_LOG_SCALE).exp()
