"""ReLU routing (ReMoE, arXiv 2412.14711): experts of positive logit, which is their weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..routing import Routing
from ..validation import number
from .base import gate_type
from .budget import checked_scope
from .weighted import WeightedGate, mean_k, shares

SMALLEST, LARGEST = 1e-12, 1e6  # of the coefficient, which a product could not bring back from 0


@gate_type("relu", ("target_k", "max_k", "coefficient", "rate", "scope"))
class ReLUGate(WeightedGate):
    """weight[t, e] = relu(logit[t, e]); expert e is assigned where it is not 0. Differentiable: no fallback in eval.

    Mean k is held at `target_k` by the auxiliary loss alone. Its terms carry the buffer `coefficient` [1], without
    gradient, which starts at `coefficient` and after each optimizer step is multiplied by 1 + `rate` if mean k of all
    ranks was above the target and divided if below. Terms: "balanced_l1", E / (target_k T^2) sum_e (tokens of e)
    (sum_t weight), the published method's; "l1", (1/T) sum of the weights.

    `scope`: "model" (published): one coefficient for the mean k of all layers; "layer": each layer its own.
    """

    default_aux: ClassVar[dict[str, float]] = {"balanced_l1": 1.0}
    without_gshard = default_aux
    aux_choices: ClassVar[tuple[str, ...]] = ("balanced_l1", "l1")
    num_counts = 2
    target_k: float
    coefficient: Tensor

    def __init__(
        self,
        *,
        target_k: float = 1.0,
        coefficient: float = 1e-8,
        rate: float = 0.2,
        scope: str = "model",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.target_k = number("gate_type['target_k']", target_k, 0, self.most, open_low=True)
        start = number("gate_type['coefficient']", coefficient, SMALLEST, LARGEST)
        self.rate, self.scope = number("gate_type['rate']", rate, 0), checked_scope("gate_type['scope']", scope)
        self.hold("coefficient", 1, start)

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight_TE = logits_TE.relu()
        return ~(logits_TE <= 0), weight_TE, weight_TE  # a token with NaN reaches experts, so that its output shows it

    def aux_term(self, name: str, logits_TE: Tensor, routing: Routing) -> Tensor:
        load_E, weight_E = shares(routing, logits_TE > 0, logits_TE.relu())
        coefficient = self.coefficient.to(logits_TE.dtype).squeeze(0)
        if name == "l1":
            return coefficient * weight_E.sum()
        return coefficient * self.slots / self.target_k * (load_E * weight_E).sum()

    def move(self, counts: Tensor) -> None:
        above = torch.sign(mean_k(counts, self.target_k) - self.target_k)
        self.coefficient.mul_((1 + self.rate) ** above).clamp_(SMALLEST, LARGEST)
