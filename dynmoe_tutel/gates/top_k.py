"""Fixed-k gates: a linear router with softmax scores, like Tutel's `top`; baselines of the experiments."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import losses
from ..kernels import gate_dtype, pack_bits
from ..routing import Capacity, Routing
from ..validation import positive_int
from .base import Gate, gate_type
from .linear import LinearLogits


class FixedKGate(Gate):
    """Softmax over `logits(x)`; each token takes its k best experts, with weights normalised over them (k > 1).

    With `one_score_gate` (EMoE's avg-k gate) the weights are 1. In training, logits get normal noise of standard
    deviation gate_noise / E.
    """

    default_aux: ClassVar[dict[str, float]] = {"gshard": 1.0}
    without_gshard: ClassVar[dict[str, float]] = {"load_importance": 1.0}
    aux_choices: ClassVar[tuple[str, ...]] = ("gshard", "load_importance")

    def __init__(
        self,
        *,
        k: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.top_k = positive_int("gate_type['k']", k)
        if k > self.slots:
            raise ValueError(f"gate_type['k'] = {k} is more than the {self.slots} experts: give at most {self.slots}")
        if "load_importance" in self.aux_names and self.gate_noise <= 0:
            raise ValueError(
                "the load_importance loss (is_gshard_loss = False of a fixed-k gate) needs gate_type['gate_noise'] > 0"
            )

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E] in the dtype of `x_TD`, which is fp32 or fp64."""
        raise NotImplementedError

    def forward(
        self,
        x_TD: Tensor,
        capacity: Capacity = "exact",
        top_k: int | None = None,
        token_mask: Tensor | None = None,
    ) -> Routing:
        """Route the tokens [T, D] where `token_mask` [T] is not False; `top_k` overrides k for this call."""
        logits_TE = self.logits(x_TD.to(gate_dtype(x_TD)))
        return self.route_logits(logits_TE, capacity, top_k, token_mask)

    def route_logits(
        self, logits_TE: Tensor, capacity: Capacity, top_k: int | None, token_mask: Tensor | None = None
    ) -> Routing:
        """Softmax, top-k, weights and auxiliary terms, over the tokens that are not padding."""
        k = self.top_k if top_k is None else positive_int("top_k", top_k)
        if k > self.slots:
            raise ValueError(f"top_k = {k} is more than the {self.slots} experts: give at most {self.slots}")
        noisy_TE = logits_TE
        if self.training and self.gate_noise > 0:
            noisy_TE = logits_TE + self.gate_noise / self.slots * torch.randn_like(logits_TE)
        score_TE = F.softmax(noisy_TE, dim=1)
        score_TK, expert_TK = score_TE.topk(k, dim=1)
        if self.one_score_gate:
            weight_TK = torch.ones_like(score_TK)
        elif k > 1 and self.normalize_gate:
            weight_TK = score_TK / score_TK.sum(dim=1, keepdim=True).clamp(min=torch.finfo(score_TK.dtype).eps)
        else:
            weight_TK = score_TK
        assigned_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, expert_TK, True)
        weight_TE = torch.zeros_like(score_TE).scatter(1, expert_TK, weight_TK)
        if token_mask is not None:
            assigned_TE &= token_mask.unsqueeze(1)
        routing = Routing.from_bits(
            pack_bits(assigned_TE), score_TE, weights=weight_TE, token_mask=token_mask, capacity=capacity
        )
        for name in self.aux_names:
            if name == "gshard":
                first_TE = F.one_hot(expert_TK[:, 0], self.slots) * assigned_TE
                counted_TE = score_TE if token_mask is None else score_TE * token_mask.unsqueeze(1)
                routing.aux[name] = losses.gshard_loss(counted_TE, first_TE, num_tokens=routing.real_tokens)
            else:
                routing.aux[name] = losses.load_importance_loss(
                    F.softmax(logits_TE, dim=1),
                    noisy_TE.gather(1, expert_TK[:, -1:]),
                    self.gate_noise / self.slots,
                    token_mask,
                )
        return routing


@gate_type("top", ("k",))
class TopKGate(LinearLogits, FixedKGate):
    """logits = x wg^T. `wg.weight` [E, D]; `normalize_one_score_gate` makes x unit vectors first."""

    def freeze_keys(self) -> None:
        """For one_score_gate: stop training the keys; only `update_one_score_gate` changes them."""
        self.wg.weight.requires_grad_(False)

    @torch.no_grad()
    def set_keys(self, keys_ED: Tensor, momentum: float) -> None:
        """Set `wg.weight` to momentum * itself + (1 - momentum) * `keys_ED`; unit rows if tokens are normalised."""
        if self.normalize_one_score_gate:
            keys_ED = F.normalize(keys_ED, dim=1)
        weight = self.weight_of("wg")
        weight.lerp_(keys_ED.to(weight), 1 - momentum)

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E]."""
        if self.normalize_one_score_gate:
            x_TD = F.normalize(x_TD, dim=1)
        return super().logits(x_TD)
