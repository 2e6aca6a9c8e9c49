"""Norms over the whole range of a dtype, against float64 with an exponent of its own."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_rms
from torch import Tensor

from dynmoe_tutel.kernels.norms import scaled, scaled_rows, unit

EXPONENTS = {torch.float32: (-130, -100, -60, -41, -20, 20, 41, 63, 100, 118), torch.float64: (-1000, -500, 400, 1000)}
CASES = [(dtype, exponent) for dtype, exponents in EXPONENTS.items() for exponent in exponents]


def vectors(dtype: torch.dtype) -> Tensor:
    """[9, 33]: values of few bits, so that powers of two stay exact among the subnormal numbers too."""
    return torch.randint(-60, 61, (9, 33), generator=torch.Generator().manual_seed(0)).to(dtype)


def times_two_to(v: Tensor, exponent: int) -> Tensor:
    return v * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def test_ordinary_vectors_are_not_copied() -> None:
    v = vectors(torch.float32)
    found = scaled(v, 1)
    assert found.vectors is v
    assert found.factor is None
    assert torch.equal(found.norm, torch.linalg.vector_norm(v, dim=1))
    assert torch.equal(found.inverse(), 1 / found.norm)
    v[2] = 0
    assert scaled(v, 1).vectors is v
    assert scaled(v, 1).inverse()[2] == 0
    assert scaled(v[:0], 1).vectors.shape == (0, 33)


@pytest.mark.parametrize(("dtype", "exponent"), CASES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_power_of_two_changes_no_bit_of_a_unit_vector(dtype: torch.dtype, exponent: int, dim: int) -> None:
    v = vectors(dtype)
    v = v if dim else v.t().contiguous()
    moved = v.clone()
    moved.select(1 - dim, 4).copy_(times_two_to(v.select(1 - dim, 4), exponent))
    moved.select(1 - dim, 6).zero_()
    one = unit(v, dim)
    one.select(1 - dim, 6).zero_()
    assert torch.equal(unit(moved, dim), one)
    found = scaled(moved, dim)
    wanted = torch.linalg.vector_norm(v.double(), dim=dim)
    wanted[6] = 0
    assert relative_rms(times_two_to(found.own_norm().double(), -exponent)[4], wanted[4]) < 1e-6
    assert found.norm.isfinite().all()
    assert found.norm[6] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_has_no_inverse(value: float) -> None:
    v = vectors(torch.float32)
    v[3, 5], v[4] = value, v[4] * 1e36
    found = scaled(v, 1)
    assert found.inverse().isnan().tolist() == [i == 3 for i in range(9)]
    assert found.norm.isfinite().tolist() == [i != 3 for i in range(9)]


@pytest.mark.parametrize("exponent", [-140, -110, -95, -50, 0, 50, 95, 118])
def test_rows_of_known_norm(exponent: int) -> None:
    """What the backward computes with: the unit vectors of `scaled`; none for rows that pass no gradient."""
    v = times_two_to(vectors(torch.float32), exponent)
    v[0], v[1] = float("nan"), 0
    first = scaled(v, 1)
    rows, inverse, factor = scaled_rows(v, first.own(first.inverse()))
    assert inverse[0].isnan()
    assert not rows[:2].any()
    passes = exponent > -110  # norms are near 2^8, and 2^-100 is the least
    assert torch.equal(inverse[2:] > 0, torch.full((7,), passes))
    if passes:
        assert relative_rms((rows * inverse[:, None])[2:], (first.vectors * first.inverse()[:, None])[2:]) < 1e-6
        assert factor is not None
        assert (torch.linalg.vector_norm(rows[2:], dim=1) * inverse[2:] - 1).abs().max() < 1e-6
        assert torch.equal(rows[2:], v[2:] * factor[2:, None])
