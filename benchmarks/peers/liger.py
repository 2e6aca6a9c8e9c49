"""Liger-Kernel (github.com/linkedin/Liger-Kernel) 0.8: `LigerFusedMoEFunction`, SwiGLU experts."""

from __future__ import annotations

import torch

from . import Peer, PeerCase, leaf

PACKAGE = "liger_kernel"


def unfit(case: PeerCase) -> str | None:
    return None if case.shape.gated else "SwiGLU experts only"


def build(case: PeerCase) -> Peer:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    assert case.w3_EDH is not None
    gate_up = leaf(torch.cat([case.w1_EDH, case.w3_EDH], dim=2).transpose(1, 2))  # [E, 2 H, D]
    down = leaf(case.w2_EHD.transpose(1, 2))  # [E, D, H]
    index_TK = case.index_TK.to(torch.int32)
    weight_TK = case.weight_TK.to(case.dtype)
    return Peer(
        lambda x_TD: LigerFusedMoEFunction.apply(x_TD, gate_up, down, index_TK, weight_TK),
        [gate_up, down],
    )
