"""`..grouped_ffn` on a CPU."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..operands import ExpertWeights, Index
from .experts import Experts, backward, blocks_of, gather, products, takes, with_torch


def grouped_ffn(
    x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights, activation: str, apply_gate: bool, save: bool,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not takes(x_TD, weights, x_TD.dtype):
        return with_torch("grouped_ffn", x_TD, gate_A, index, weights, activation, apply_gate, save)
    experts = Experts(x_TD, index, weights, activation)
    rows_AO = x_TD.new_empty((index.rows, weights.w2_EHO.shape[2]))
    h_AH, u_AH = weights.pre_activations(x_TD, index.rows if save else 0)
    xs, a_s = experts.room(experts.D), experts.room(experts.H)
    for block in blocks_of(index, experts.H):
        n, rows = len(block.tokens), block.rows
        x, a = xs[:n], a_s[:n]
        gather(x_TD, index.token_of_row[rows], x)
        experts.hidden(block, x, *experts.pre_activations(block, h_AH, u_AH), a)
        products(a, experts.w2, block, rows_AO[rows], weights.b2_EO)
        if apply_gate:
            rows_AO[rows].mul_(gate_A[rows].unsqueeze(1))
    return rows_AO, h_AH, u_AH


def grouped_ffn_backward(
    d_rows_AO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights,
    activation: str, apply_gate: bool, wanted: bool, engine: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    if not takes(x_TD, weights, x_TD.dtype):
        options = (activation, apply_gate, wanted)
        return with_torch("grouped_ffn_backward", d_rows_AO, h_AH, u_AH, x_TD, gate_A, index, weights, *options)
    experts = Experts(x_TD, index, weights, activation)
    rows = (d_rows_AO, np.arange(index.rows, dtype=np.int32), np.ones(index.rows, np.float32))
    gate = gate_A if apply_gate else None
    d_x_TD, d_gate_A, grads = backward(experts, h_AH, u_AH, index, *rows, gate, wanted)
    return d_x_TD.to(x_TD.dtype), d_gate_A.to(gate_A.dtype), *grads
