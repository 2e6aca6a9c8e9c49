"""Expert threshold routing (arXiv 2603.11535): a token activates every expert whose score passes the expert's own
threshold, a moving average of the score that a wanted share of the tokens passes. A token's experts depend on no other.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..routing import Routing
from ..validation import number
from .base import gate_type
from .histograms import BINS, histograms, quantiles, seen
from .weighted import WeightedGate


@gate_type("expert_threshold", ("target_k", "max_k", "decay"))
class ExpertThresholdGate(WeightedGate):
    """score = sigmoid(logit), also the weight; expert e is assigned where score[t, e] > `thresholds`[e].

    After each optimizer step the buffer `thresholds` [E] moves towards the scores that a share target_k / E of the
    step's tokens, on all ranks, passes: by 1 / n in the n-th step and at least by 1 - `decay`. So mean k is held at
    `target_k` and the load is balanced without a loss. Buffer `steps` [1]. The paper starts with 4000 steps of expert
    choice, which is not causal, and adds a shared expert; here the first steps average, and the residual carries a
    token without an expert. In eval such a token takes its best one, weighted by its score.
    """

    slot_axes: ClassVar[dict[str, int]] = {"wg.weight": 0, "thresholds": 0}
    falls_back = True
    target_k: float
    thresholds: Tensor
    steps: Tensor

    def __init__(self, *, target_k: float = 1.0, decay: float = 0.99, **common: Any) -> None:
        super().__init__(**common)
        self.target_k = number("gate_type['target_k']", target_k, 0, self.most, open_low=True)
        self.decay = number("gate_type['decay']", decay, 0, 1)
        self.hold("thresholds", self.slots, 0.5)
        self.hold("steps", 1, 0.0)
        self.num_counts = self.slots * BINS

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score_TE = torch.sigmoid(logits_TE)
        below_TE = score_TE <= self.thresholds.to(score_TE.dtype)
        return ~below_TE, score_TE, score_TE  # a token with NaN reaches experts, so that its output shows it

    def counted(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return histograms(routing.scores, 0.0, 1.0, routing.token_mask)

    def move(self, counts: Tensor) -> None:
        seen_E = seen(counts)
        self.steps.add_(seen_E.any())
        way_E = (1 / self.steps.clamp(min=1)).clamp(min=1 - self.decay) * seen_E
        wanted_E = quantiles(counts, 1 - self.target_k / self.slots, 0.0, 1.0).to(self.thresholds.dtype)
        self.thresholds.add_(way_E * (wanted_E - self.thresholds))
