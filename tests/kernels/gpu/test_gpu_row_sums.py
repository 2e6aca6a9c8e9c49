"""Sums over rows with more tiles than programs, and more parts than a block, against float64."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_rms
from torch import Tensor

from dynmoe_tutel.kernels import Index, pack_bits, ragged_index
from dynmoe_tutel.kernels.gpu import row_sums

T, E = 70, 24  # the interpreter has 16 programs, and every expert fills two tiles, the second in part


def case(device: str) -> tuple[Index, list[tuple[int, int]]]:
    """An index in which expert 1 has no tokens, and the (token, expert) of each row."""
    assigned_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(0)) < 0.95
    assigned_TE[:, 1] = False
    index = ragged_index(pack_bits(assigned_TE), E)
    pairs = [(int(t), e) for e in range(E) for t in assigned_TE[:, e].nonzero()]
    assert len(pairs) == index[2].shape[0] > 64 * 22
    return Index(*(t.to(device) for t in index)), pairs


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_expert(rows: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    expert_A = torch.tensor([e for _, e in pairs])
    return torch.zeros(E, rows.shape[1], dtype=torch.float64).index_add_(0, expert_A, rows.double())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("from_tokens", [False, True])
def test_gradient_of_a_bias(from_tokens: bool, gated: bool, device: str, poisoned: None) -> None:
    index, pairs = case(device)
    N, A = row_sums.BLOCK_COLUMNS + 3, len(pairs)
    d = draw(T if from_tokens else A, N)
    gate_A = torch.rand(A, generator=torch.Generator().manual_seed(2)) if gated else None
    token_A = torch.tensor([t for t, _ in pairs])
    rows = d.double()
    if from_tokens:
        rows = (rows / torch.bincount(token_A, minlength=T)[:, None])[token_A]
    if gate_A is not None:
        rows = rows * gate_A.double()[:, None]
    like = torch.empty(E, N, device=device)
    on_device = None if gate_A is None else gate_A.to(device)
    found = row_sums.bias_gradient(d.to(device), on_device, index, like, from_tokens=from_tokens)
    assert relative_rms(found, by_expert(rows, pairs)) < 1e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", [1, 16, 37])
def test_gradient_of_the_gates(parts: int, bias: bool, device: str, poisoned: None) -> None:
    index, pairs = case(device)
    A, O = len(pairs), 67
    parts_AN, d_rows_AO, bias_EO = draw(A, parts), draw(A, O, seed=2), draw(E, O, seed=3)
    expected = parts_AN.double().sum(1)
    if bias:
        expert_A = torch.tensor([e for _, e in pairs])
        expected += (d_rows_AO.double() * bias_EO.double()[expert_A]).sum(1)
    on_device = (parts_AN.to(device), d_rows_AO.to(device), bias_EO.to(device) if bias else None)
    like = torch.empty(A, device=device)
    found = row_sums.row_gate_gradient(*on_device, index.expert_offsets, like)
    assert relative_rms(found, expected) < 1e-6
