"""moe-ops (github.com/echogujy/moe_ops) 0.1: permute, grouped GEMM, unpermute; the activation is torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Peer, PeerCase, leaf

PACKAGE = "moe_ops"


def unfit(case: PeerCase) -> str | None:
    E = case.shape.E
    return None if E & (E - 1) == 0 else "its histogram needs a power of two of experts"


def build(case: PeerCase) -> Peer:
    from moe_ops import grouped_gemm, permute, unpermute

    T, E, k = case.shape.T, case.shape.E, case.k
    index_TK, weight_TK = case.index_TK.to(torch.int32), case.weight_TK.float()
    w1, w2 = leaf(case.w1_EDH.transpose(1, 2)), leaf(case.w2_EHD.transpose(1, 2))  # [E, out, in]
    w3 = None if case.w3_EDH is None else leaf(case.w3_EDH.transpose(1, 2))

    def forward(x_TD: Tensor) -> Tensor:
        rows, row_id_map, offsets = permute(x_TD, index_TK, E=E)
        a = case.activation(grouped_gemm(rows, w1, offsets, trans_b=True))
        if w3 is not None:
            a = a * grouped_gemm(rows, w3, offsets, trans_b=True)
        rows = grouped_gemm(a, w2, offsets, trans_b=True)
        return unpermute(rows, row_id_map, weight_TK, num_tokens=T, num_topK=k)

    return Peer(forward, [w for w in (w1, w2, w3) if w is not None])
