"""SonicMoE (github.com/Dao-AILab/sonic-moe) 0.1.2: `moe_general_routing_inputs`, which takes any number of experts a
token, as a list of pairs sorted by token. SwiGLU experts; Hopper and Blackwell."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Peer, PeerCase, leaf

PACKAGE = "sonicmoe"


def unfit(case: PeerCase) -> str | None:
    if not case.shape.gated:
        return "gated experts only"
    if case.device.type == "cuda" and torch.cuda.get_device_capability(case.device)[0] < 9:
        return "needs Hopper or Blackwell"
    return None


def build(case: PeerCase) -> Peer:
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    assert case.w3_EDH is not None
    T, E, k = case.shape.T, case.shape.E, case.k
    both = torch.stack([case.w1_EDH, case.w3_EDH], dim=3).flatten(2)  # interleaved columns, [E, D, 2 H]
    first, second = leaf(both.transpose(1, 2)), leaf(case.w2_EHD.transpose(1, 2))  # [E, out, in], permuted at the call
    token_A = torch.arange(T, dtype=torch.int32, device=case.device).repeat_interleave(k)
    expert_A = case.index_TK.to(torch.int32).flatten()
    weight_A = case.weight_TK.float().flatten()
    stream = torch.cuda.current_stream(case.device).cuda_stream

    def forward(x_TD: Tensor) -> Tensor:
        weights = (first.permute(1, 2, 0), None, second.permute(1, 2, 0), None)
        y_TD, _ = moe_general_routing_inputs(
            x_TD, weight_A, token_A, expert_A, *weights, E, stream, ActivationType.SWIGLU
        )
        return y_TD

    return Peer(forward, [first, second])
