"""Stock Tutel (github.com/microsoft/Tutel): its layer with its own top-k gate, which takes no external routing.

The result is compared with the same choice made in torch. Unlike the other peers' times, its time includes the routing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import LayerPeer, Peer, PeerCase

if TYPE_CHECKING:
    from ..layer import Case

PACKAGE = "tutel"


def unfit(case: PeerCase) -> str | None:
    return "its plain experts only: gated ones have another layout in every version" if case.shape.gated else None


def build(case: PeerCase) -> Peer:
    from tutel import moe

    s = case.shape
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": case.k, "capacity_factor": 0, "fp32_gate": True},
        model_dim=s.D,
        experts={
            "type": "ffn",
            "num_experts_per_device": s.E,
            "hidden_size_per_expert": s.H,
            "activation_fn": case.activation,
        },
        seeds=(1, 1),
    ).to(case.device, case.dtype)
    layer.gates[0].float()
    experts = layer.experts
    with torch.no_grad():
        experts.batched_fc1_w.copy_(case.w1_EDH.transpose(1, 2))
        experts.batched_fc2_w.copy_(case.w2_EHD)
        experts.batched_fc1_bias.zero_()
        experts.batched_fc2_bias.zero_()
        score_TE = F.softmax(layer.gates[0](case.x_TD.float()).float(), dim=1)
        weight_TK, index_TK = score_TE.topk(case.k, dim=1)
        if case.k > 1:
            weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)

    def forward(x_TD: Tensor) -> Tensor:
        return layer(x_TD)

    parameters = [p for p in layer.parameters() if p.requires_grad]
    return Peer(forward, parameters, (index_TK, weight_TK), "with its own gate")


class _TopAny(torch.nn.Module):
    """A custom gate of Tutel: logits [T, E] whose softmax is 1 / k on a token's experts and nothing on the others."""

    def __init__(self, model_dim: int, num_global_experts: int, case: Case) -> None:
        super().__init__()
        self.case, self.capacity_factor = case, 0.0
        self.top_k = int(case.routing.k_per_token.max())

    def forward(self, x_TD: Tensor) -> Tensor:
        margin_TE = self.case.margins()
        level_TE = margin_TE.detach()
        return torch.where(level_TE > 0, margin_TE - level_TE, level_TE - 40)  # exp(-40): weight 0, spread by score


def build_layer(case: Case) -> LayerPeer:
    """Its layer with the case's gate: every token takes the largest k of experts, most of them with weight 0."""
    from tutel import moe

    s, ours = case.shape, case.layer.experts
    layer = moe.moe_layer(
        gate_type={"type": "custom", "module": _TopAny, "case": case},
        model_dim=s.D,
        experts={
            "type": "ffn",
            "num_experts_per_device": s.E,
            "hidden_size_per_expert": s.H,
            "activation_fn": F.gelu,
            "has_fc1_bias": False,
            "has_fc2_bias": False,
        },
    ).to(case.dtype)
    experts = layer.experts
    with torch.no_grad():
        experts.batched_fc1_w.copy_(ours.batched_fc1_w)
        experts.batched_fc2_w.copy_(ours.batched_fc2_w)
    # the softmax cannot give a token no expert
    routed_T1 = (case.routing.k_per_token > 0).to(case.dtype).unsqueeze(1)
    return LayerPeer(
        lambda: layer(case.x_TD) * routed_T1, experts.batched_fc1_w, experts.batched_fc2_w, normalized=True
    )
