"""Null experts (AdaMoE, arXiv 2406.13233): top-k over experts and empty ones, so that a token takes 0 to k experts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..initialization import linear
from ..parts import call_linear
from ..routing import Routing
from ..validation import number, positive_int
from .base import gate_type
from .histograms import BINS, histograms, quantiles
from .weighted import FixedSlotsGate, largest, shares

RATE, REACH, FARTHEST = 0.5, 1.0, 1e4  # of the bias: part of the way in a step, what a step sees, the end


@gate_type("null_experts", ("k", "null_experts", "target_k"))
class NullExpertsGate(FixedSlotsGate):
    """A token takes the k best of E experts and N null ones (`null_experts`, default E), which compute nothing and take
    no rows. Weights: softmax over all, normalised over the experts chosen (`normalize_gate`). `null.weight` [N, D].

    Mean k is near k E / (E + N) by the term "load_balance", (E + N) sum_e (share of tokens) (mean probability), where
    each null expert counts with their mean share. `target_k`, up to k, holds it there: the buffer `null_bias` [1],
    which choosing adds to null logits, moves after each optimizer step. To take none is a choice, in eval too.
    """

    maps = ("wg", "null")
    default_aux: ClassVar[dict[str, float]] = {"load_balance": 1.0}
    without_gshard = default_aux
    aux_choices: ClassVar[tuple[str, ...]] = ("load_balance",)
    null_bias: Tensor

    def __init__(self, *, k: int = 2, null_experts: int | None = None, target_k: float | None = None, **rest: Any):
        self.nulls = rest["slots"] if null_experts is None else positive_int("gate_type['null_experts']", null_experts)
        super().__init__(k=k, choices=rest["slots"] + self.nulls, **rest)
        self.null = linear(self.model_dim, self.nulls, False, rest.get("generator"))
        self.target_k = target_k
        if target_k is not None:
            self.target_k = number("gate_type['target_k']", target_k, 0, self.most, open_low=True)
            self.hold("null_bias", 1, 0.0)
            self.num_counts = BINS

    def logits(self, x_TD: Tensor) -> Tensor:  # [T, E + N]: of the experts, then of the null ones
        return torch.cat([super().logits(x_TD), call_linear(self.null, x_TD)], dim=1)

    def choose(self, logits_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score_TE, assigned_TE = F.softmax(logits_TM, dim=1)[:, : self.slots], self._best(logits_TM)[:, : self.slots]
        return assigned_TE, self.weights(score_TE, assigned_TE), score_TE

    def _best(self, logits_TM: Tensor) -> Tensor:
        if self.target_k is not None:
            logits_TM = logits_TM + F.pad(self.null_bias.to(logits_TM.dtype).expand(self.nulls), (self.slots, 0))
        return largest(logits_TM.detach(), self.k)

    def aux_term(self, name: str, logits_TM: Tensor, routing: Routing) -> Tensor:
        load_M, score_M = shares(routing, self._best(logits_TM), F.softmax(logits_TM, dim=1))
        load_M = torch.cat([load_M[: self.slots], load_M[self.slots :].mean().expand(self.nulls)])
        return len(load_M) * (load_M * score_M).sum()

    def counted(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The bias up to which a token's j-th expert stays: while it beats the (k + 1 - j)-th null one."""
        logits_TM = self.logits(x_TD.to(routing.scores.dtype))
        real_TE, null_TN = (t.sort(dim=1, descending=True).values for t in logits_TM.tensor_split([self.slots], dim=1))
        null_Tk = F.pad(null_TN, (0, max(self.k - self.nulls, 0)), value=-torch.inf)[:, : self.k].flip(1)
        stays_TK = real_TE[:, : self.most] - null_Tk[:, : self.most]
        mask = None if routing.token_mask is None else routing.token_mask.repeat_interleave(stays_TK.shape[1])
        return histograms(stays_TK.reshape(-1, 1), *self._reach(), mask)

    def _reach(self) -> tuple[Tensor, Tensor]:
        return self.null_bias.squeeze(0) - REACH, self.null_bias.squeeze(0) + REACH

    def move(self, counts: Tensor) -> None:
        share = 1 - (self.target_k or 0) / self.most
        way = RATE * (quantiles(counts, share, *self._reach()).to(self.null_bias.dtype) - self.null_bias)
        self.null_bias.add_(way.masked_fill(counts.sum() == 0, 0)).clamp_(-FARTHEST, FARTHEST)
