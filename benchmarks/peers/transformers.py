"""transformers (github.com/huggingface/transformers) 5: `NemotronHExperts`, its only experts without a gated product.

They take index and weights [T, K]; K is the largest k of the case's tokens. What fills the slots of a token that takes
fewer is the difference between the contestants:

* grouped_mm: sentinels, index E, whose rows sort behind all others and are not multiplied.
* grouped_mm, padded: real experts of weight 0, as where experts are not divided over ranks.
* eager: its loop skips no sentinels. Each assignment goes in as a token that takes one expert.

`batched_mm` is left out: it copies an expert's weights for every assignment.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import LayerPeer

if TYPE_CHECKING:
    from ..layer import Case

PACKAGE = "transformers"
KINDS = ("grouped_mm", "grouped_mm, padded", "eager")


def build(case: Case, kind: str) -> LayerPeer:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    s, ours = case.shape, case.layer.experts
    config = SimpleNamespace(
        n_routed_experts=s.E,
        hidden_size=s.D,
        moe_intermediate_size=s.H,
        moe_latent_size=None,
        mlp_hidden_act="gelu",
        _experts_implementation=kind.partition(",")[0],
    )
    experts = NemotronHExperts(config).to(case.dtype)
    experts._is_expert_parallel = kind == "grouped_mm"  # or it would not mask the rows of sentinels
    with torch.no_grad():
        experts.up_proj.copy_(ours.batched_fc1_w)
        experts.down_proj.copy_(ours.batched_fc2_w.transpose(1, 2))

    def by_tokens() -> Tensor:
        margin_TE = case.margins()
        passed_TE, weight_TE = case.weights(margin_TE)
        margin_TK, index_TK = margin_TE.topk(int(passed_TE.sum(dim=1).max()), dim=1)
        weight_TK = weight_TE.gather(1, index_TK).to(case.dtype)
        if experts._is_expert_parallel:
            index_TK = index_TK.masked_fill(margin_TK <= 0, s.E)
        return experts(case.x_TD, index_TK, weight_TK)

    def by_assignments() -> Tensor:
        passed_TE, weight_TE = case.weights(case.margins())
        token_A, expert_A = passed_TE.nonzero(as_tuple=True)
        weight_A = weight_TE[token_A, expert_A].to(case.dtype)
        rows_AD = experts(case.x_TD.index_select(0, token_A), expert_A.unsqueeze(1), weight_A.unsqueeze(1))
        return torch.zeros_like(case.x_TD).index_add(0, token_A, rows_AD)

    forward = by_assignments if kind == "eager" else by_tokens
    return LayerPeer(forward, experts.up_proj, experts.down_proj, down_transposed=True)
