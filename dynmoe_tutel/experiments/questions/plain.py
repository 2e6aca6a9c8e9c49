"""Top-k routing as most code has it, without this project's kernels: the peer that step times are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe_tutel.experiments.vision.vit import MLP


class PlainTopK(nn.Module):
    """The k best of a softmax over a linear router, weighted by their shares; a loop over the experts, which are MLPs.

    Takes and gives [..., D]. It has no auxiliary loss.
    """

    def __init__(self, dim: int, hidden: int, experts: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(MLP(dim, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        score_TK, expert_TK = self.router(x_TD).softmax(dim=1).topk(self.k, dim=1)
        score_TK = score_TK / score_TK.sum(dim=1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(expert_TK == number)
            y_TD = y_TD.index_add(0, token, expert(x_TD[token]) * score_TK[token, place].unsqueeze(1))
        return y_TD.view_as(x)
