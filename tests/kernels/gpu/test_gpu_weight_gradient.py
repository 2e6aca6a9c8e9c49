"""Gradients of weights and biases from pieces of equal length, against float64, for any loads and any cut."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_rms
from torch import Tensor

from dynmoe_tutel.kernels import Index
from dynmoe_tutel.kernels.gpu.weight_gradient import pieces_of, weight_gradient

T, M, N = 50, 12, 20
LOADS = {  # of a step of 32 rows
    "balanced": [40, 40, 40, 40],
    "popular": [1, 150, 0, 7],
    "borders of pieces are borders of experts": [0, 64, 0, 0, 64, 0],
    "fewer rows than a step": [0, 3, 2, 0],
    "no row": [0, 0],
}


def case(loads: list[int], spare: int, device: str) -> tuple[Tensor, Tensor, Index, list[slice]]:
    """Tokens, rows, the index of the loads, and each expert's rows; spare rows hold NaN."""
    generator = torch.Generator().manual_seed(0)
    A = sum(loads)
    offsets = torch.tensor([0, *loads], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    token = torch.randint(T, (A + spare,), generator=generator, dtype=torch.int32)
    x, rows = torch.randn(T, M, generator=generator), torch.randn(A + spare, N, generator=generator)
    rows[A:] = float("nan")
    index = Index(offsets.to(device), offsets, token.to(device), token)
    bounds = offsets.tolist()
    return x.to(device), rows.to(device), index, list(map(slice, bounds[:-1], bounds[1:]))


@pytest.fixture
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of pieces, set for the test."""
    monkeypatch.setattr("dynmoe_tutel.kernels.gpu.weight_gradient.pieces_of", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("cut", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("name", LOADS)
def test_every_cut_has_the_same_sums(name: str, cut: int, device: str, poisoned: None) -> None:
    x, rows, index, experts = case(LOADS[name], 9, device)
    E = len(experts)
    token = index.token_of_row.cpu().long()
    exact = torch.stack([x.cpu().double()[token[s]].t() @ rows.cpu().double()[s] for s in experts])
    totals = torch.stack([rows.cpu().double()[s].sum(0) for s in experts])
    bias = torch.empty(E, N, device=device)
    like = torch.empty(E, N, M, device=device).transpose(1, 2)
    found, sums = weight_gradient(x, rows, index, like, bias, a_from_tokens=True)
    assert found.stride() == like.stride()
    assert relative_rms(found, exact) < 1e-6
    assert relative_rms(sums, totals) < 1e-6


@pytest.mark.parametrize("cut", [3], indirect=True)
@pytest.mark.parametrize("biased", [False, True])
def test_weights_stored_either_way(biased: bool, cut: int, device: str, poisoned: None) -> None:
    x, rows, index, experts = case(LOADS["popular"], 0, device)
    E = len(experts)
    bias = torch.empty(E, N, device=device) if biased else None
    plain, turned = torch.empty(E, M, N, device=device), torch.empty(E, N, M, device=device).transpose(1, 2)
    one, two = (weight_gradient(x, rows, index, like, bias, a_from_tokens=True) for like in (plain, turned))
    assert (one[0].stride(), two[0].stride()) == (plain.stride(), turned.stride())
    assert relative_rms(one[0], two[0].double()) < 1e-6
    assert one[1].numel() == two[1].numel() == (E * N if biased else 0)


@pytest.mark.parametrize("cut", [5], indirect=True)
def test_two_runs_are_bitwise_equal(cut: int, device: str) -> None:
    x, rows, index, experts = case(LOADS["popular"], 0, device)
    like, bias = torch.empty(len(experts), M, N, device=device), torch.empty(len(experts), N, device=device)
    one, two = (weight_gradient(x, rows, index, like, bias, a_from_tokens=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_pieces_fill_the_device_and_depend_on_shapes_alone() -> None:
    assert pieces_of(blocks=18, rows=50432, places=132) == 7  # 126 programs
    assert pieces_of(blocks=128, rows=65536, places=132) == 1
    assert pieces_of(blocks=18, rows=100, places=132) == 1  # sums of pieces would take longer than the products
