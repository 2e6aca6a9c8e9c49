"""MegaBlocks (github.com/databricks/megablocks) 0.10: the dropless layer with grouped products, without its router."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Peer, PeerCase

PACKAGE = "megablocks"


def unfit(case: PeerCase) -> str | None:
    return None if case.dtype in (torch.bfloat16, torch.float16) else "half precision only"


def build(case: PeerCase) -> Peer:
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    s = case.shape
    layer = ParallelDroplessMLP(
        Arguments(
            hidden_size=s.D,
            ffn_hidden_size=s.H,
            moe_num_experts=s.E,
            moe_top_k=case.k,
            moe_capacity_factor=0,
            mlp_type="glu" if s.gated else "mlp",
            mlp_impl="grouped",
            activation_fn=case.activation,
            bias=False,
            return_bias=False,
            bf16=case.dtype == torch.bfloat16,
            fp16=case.dtype == torch.float16,
            device=case.device,
        )
    ).eval()  # in training mode it appends to a global list for its loss
    with torch.no_grad():
        layer.mlp.w1.copy_(case.w1_EDH.transpose(1, 2).reshape(s.E * s.H, s.D))
        layer.mlp.w2.copy_(case.w2_EHD.reshape(s.E * s.H, s.D))
        if case.w3_EDH is not None:
            layer.mlp.v1.copy_(case.w3_EDH.transpose(1, 2).reshape(s.E * s.H, s.D))
    score_TE = torch.zeros((s.T, s.E), device=case.device, dtype=case.dtype)
    weight_TK = case.weight_TK.to(case.dtype)

    def forward(x_TD: Tensor) -> Tensor:
        return layer(x_TD.unsqueeze(1), score_TE, weight_TK, case.index_TK).squeeze(1)

    return Peer(forward, list(layer.mlp.parameters()))
