"""ScatterMoE (github.com/shawntan/scattermoe): `MLP` and `GLUMLP`, called with weights and expert ids."""

from __future__ import annotations

import torch

from . import Peer, PeerCase

PACKAGE = "scattermoe"


def unfit(case: PeerCase) -> str | None:
    return None


def build(case: PeerCase) -> Peer:
    from scattermoe.mlp import GLUMLP, MLP

    s = case.shape
    kind = GLUMLP if s.gated else MLP
    with torch.device(case.device):
        layer = kind(s.D, s.H, s.E, case.k, activation=case.activation).to(case.dtype)
    first = case.w1_EDH.transpose(1, 2)
    if case.w3_EDH is not None:  # the first half is the factor, the second gets the activation
        first = torch.cat([case.w3_EDH.transpose(1, 2), first], dim=1)
    with torch.no_grad():
        layer.experts.weight.copy_(first)
        layer.output_experts.weight.copy_(case.w2_EHD.transpose(1, 2))
    weight_TK = case.weight_TK.to(case.dtype)
    return Peer(lambda x_TD: layer(x_TD, weight_TK, case.index_TK), list(layer.parameters()))
