"""Quantile-balanced top-k (Kimi K3, arXiv 2607.24653): top-k of biased scores, biases solved for balance."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..routing import Routing
from .base import gate_type
from .histograms import BINS, histograms, quantiles, seen
from .weighted import FixedSlotsGate, largest


@gate_type("quantile_top_k", ("k",))
class QuantileTopKGate(FixedSlotsGate):
    """score = sigmoid(logit). A token takes the k experts of largest score[t, e] + `score_bias`[e]; weights are the
    scores without the bias, as shares of their sum (k > 1 and `normalize_gate`). No loss.

    After each optimizer step the buffer `score_bias` [E], of mean 0, becomes what would have given each expert a share
    k / E of the step's tokens on all ranks, had the tokens' cut-offs, their (k + 1)-th largest biased scores, stayed:
    the quantile k / E of cut-off - score, from a histogram of 1000 bins.
    """

    slot_axes: ClassVar[dict[str, int]] = {"wg.weight": 0, "score_bias": 0}
    score_bias: Tensor

    def __init__(self, *, k: int = 1, **common: Any) -> None:
        super().__init__(k=k, **common)
        self.hold("score_bias", self.slots, 0.0)
        self.num_counts = self.slots * BINS if k < self.slots else 0  # with all experts there is nothing to balance

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score_TE = torch.sigmoid(logits_TE)
        assigned_TE = largest(self._biased(score_TE), self.k)
        return assigned_TE, self.weights(score_TE, assigned_TE), score_TE

    def _biased(self, score_TE: Tensor) -> Tensor:
        return score_TE.detach() + self.score_bias.to(score_TE.dtype)

    def counted(self, x_TD: Tensor, routing: Routing) -> Tensor:
        cut_off_T1 = self._biased(routing.scores).topk(self.k + 1, dim=1).values[:, -1:]
        return histograms(cut_off_T1 - routing.scores, *self._reach(), routing.token_mask)

    def _reach(self) -> tuple[Tensor, Tensor]:
        return self.score_bias.amin() - 1, self.score_bias.amax() + 1

    def move(self, counts: Tensor) -> None:
        wanted_E = quantiles(counts, self.k / self.slots, *self._reach())
        centred_E = (wanted_E - wanted_E.mean()).to(self.score_bias.dtype)
        self.score_bias.copy_(torch.where(seen(counts).all(), centred_E, self.score_bias))
