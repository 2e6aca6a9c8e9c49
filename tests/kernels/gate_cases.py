"""Inputs of the threshold gate, its formula in float64, and its decisions token by token."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(7, 97, 65), (64, 16, 4), (1, 1, 1), (33, 47, 512), (5, 8, 64), (0, 8, 3), (9, 300, 130)]
MARGIN = 2e-6  # closer to the threshold than this, a decision in fp32 may differ from float64's
ONE = torch.ones(())


def cosine(x_TD: Tensor, w_DE: Tensor) -> Tensor:
    """cos(x_t, w_e) in float64, differentiable, 0 for a zero vector."""
    x, w = x_TD.double(), w_DE.double()
    norm_T1, norm_E = x.norm(dim=1, keepdim=True), w.norm(dim=0)
    return (x @ w) / norm_T1.masked_fill(norm_T1 == 0, 1) / norm_E.masked_fill(norm_E == 0, 1)


def gate_inputs(T: int, D: int, E: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, D], w [D, E], G [E] and a mask [E] with about a third of the slots inactive, never all.

    Every cosine is at least MARGIN from its threshold, so that no decision is in doubt.
    """
    generator = torch.Generator().manual_seed(T + D + E)
    x_TD = torch.randn(T, D, generator=generator).to(dtype)
    w_DE = torch.randn(D, E, generator=generator)
    threshold_E = torch.rand(E, generator=generator) * 0.3
    active_E = torch.rand(E, generator=generator) > 0.33
    active_E[E // 2] = True
    cos_TE = cosine(x_TD, w_DE)
    while (doubt_E := ((cos_TE - threshold_E).abs() <= MARGIN).any(dim=0)).any():
        threshold_E[doubt_E] += 1e-5
    return x_TD, w_DE, threshold_E, active_E


def naive_decision(cos_TE: Tensor, threshold_E: Tensor, active_E: Tensor, fallback: bool) -> tuple[Tensor, Tensor]:
    """Assignment [T, E] and unrouted flags [T], token by token."""
    (T, E), limits, active = cos_TE.shape, threshold_E.double().tolist(), active_E.tolist()
    assigned, unrouted = [], []
    for cosines in cos_TE.tolist():
        row = [active[e] and cosines[e] > limits[e] for e in range(E)]
        unrouted.append(not any(row))
        if fallback and unrouted[-1]:
            row[max((e for e in range(E) if active[e]), key=cosines.__getitem__)] = True
        assigned.append(row)
    return torch.tensor(assigned, dtype=torch.bool).view(T, E), torch.tensor(unrouted, dtype=torch.bool)
