"""Top-p routing (arXiv 2403.07652): a token activates its best experts until their probabilities sum to p.

With `target_k`, a PI controller moves p, and logits are normalised first (DTop-p, arXiv 2512.13996).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing
from ..validation import number
from .base import gate_type
from .budget import checked_scope
from .weighted import WeightedGate, mean_k, mean_of_tokens, shares

PROPORTIONAL, INTEGRAL = 0.05, 0.05  # change of p per relative error of mean k
FIXED_POINT = 2.0**40  # probabilities as integers: the order of a sum does not change it


@gate_type("top_p", ("p", "target_k", "max_k", "scope"))
class TopPGate(WeightedGate):
    """The fewest experts, best first, whose softmax probabilities sum to at least `p`; at least one. Weights are these
    probabilities, not normalised.

    `target_k`, 1 to E: p starts at `p`; after each optimizer step it moves by the relative error of mean k over all
    ranks, in the velocity form of a PI controller, within 0 and 1. The logits of a token are then standardised over
    its experts and multiplied by `logit_scale` [1], which is learnt. Buffers `p` [1] and `error` [1]; `scope` "model"
    (published): one p for all layers; "layer": each layer its own. Terms: "load_balance", E sum_e (share of tokens)
    (mean probability); "entropy", of a token's probabilities. The published loss is 0.01 times their default sum.
    """

    default_aux: ClassVar[dict[str, float]] = {"load_balance": 1.0, "entropy": 0.01}
    without_gshard = default_aux
    aux_choices: ClassVar[tuple[str, ...]] = ("load_balance", "entropy")

    p: Any  # a number, or a buffer where there is a target

    def __init__(self, *, p: float = 0.4, target_k: float | None = None, scope: str = "model", **common: Any) -> None:
        super().__init__(**common)
        p = number("gate_type['p']", p, 0, 1, open_low=True)
        self.scope, self.target_k = checked_scope("gate_type['scope']", scope), target_k
        if target_k is None:
            self.p = p
            return
        self.target_k = number("gate_type['target_k']", target_k, 1, self.most)
        self.hold("p", 1, p)
        self.hold("error", 1, 0.0)
        self.hold("logit_scale", 1, 1.0, learnt=True)
        self.num_counts = 2

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().logits(x_TD)
        if self.target_k is None:
            return logits_TE
        return self.get_parameter("logit_scale").to(logits_TE.dtype) * F.layer_norm(logits_TE, (self.slots,))

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score_TE = F.softmax(logits_TE, dim=1)
        fixed_TE = (score_TE.detach().double() * FIXED_POINT).long()
        sorted_TE, order_TE = fixed_TE.sort(dim=1, descending=True, stable=True)
        before_TE = sorted_TE.cumsum(dim=1) - sorted_TE
        needed_TE = (before_TE == 0) | (before_TE < self.p * FIXED_POINT)  # the best one at p = 0 too
        return torch.zeros_like(needed_TE).scatter(1, order_TE, needed_TE), score_TE, score_TE

    def aux_term(self, name: str, logits_TE: Tensor, routing: Routing) -> Tensor:
        if name == "entropy":
            return mean_of_tokens(routing, -(routing.scores * F.log_softmax(logits_TE, dim=1)).sum(dim=1))
        load_E, score_E = shares(routing, routing.assigned, routing.scores)
        return self.slots * (load_E * score_E).sum()

    def move(self, counts: Tensor) -> None:
        target_k, before = self.target_k or 1.0, self.get_buffer("error")
        error = (1 - mean_k(counts, target_k) / target_k).where(counts[1] > 0, before)
        change = PROPORTIONAL * (error - before) + INTEGRAL * error
        self.p.add_(change * (counts[1] > 0)).clamp_(0, 1)
        before.copy_(error)
