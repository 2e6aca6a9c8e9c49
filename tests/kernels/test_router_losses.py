"""Diversity and simplicity of routing vectors against their definitions, by autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_rms
from torch import Tensor

from dynmoe_tutel.kernels import vector_losses

SHAPES = [(16, 4, 3), (97, 65, 40), (5, 1, 1), (33, 17, 17), (3, 200, 7)]  # D, E, active


def vectors(D: int, E: int, count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(D + E)
    active_E = torch.zeros(E, dtype=torch.bool)
    active_E[torch.randperm(E, generator=generator)[:count]] = True
    return torch.randn(D, E, generator=generator, dtype=torch.float64).to(dtype), active_E


def by_definition(w_DE: Tensor, active_E: Tensor) -> tuple[Tensor, Tensor]:
    """||(U^T U - I) o m m^T||_F without its zero diagonal, and the mean norm."""
    unit_DE = F.normalize(w_DE, dim=0)[:, active_E]
    gram_EE = unit_DE.t() @ unit_DE
    off_diagonal = gram_EE * (1 - torch.eye(len(gram_EE), dtype=w_DE.dtype))
    return torch.linalg.vector_norm(off_diagonal), torch.linalg.vector_norm(w_DE[:, active_E], dim=0).mean()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (2.0, 3.0)])
def test_values_and_gradient(shape: tuple[int, int, int], weights: tuple[float, float]) -> None:
    w, active_E = vectors(*shape)
    gradients = []
    for losses in (vector_losses, by_definition):
        leaf = w.clone().requires_grad_()
        diversity, simplicity, *_ = losses(leaf, active_E)
        (weights[0] * diversity + weights[1] * simplicity).backward()
        gradients.append((diversity.detach(), simplicity.detach(), leaf.grad))
    for found, expected in zip(*gradients, strict=True):
        assert relative_rms(found, expected) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32(dtype: torch.dtype) -> None:
    w, active_E = vectors(64, 8, 5, dtype)
    leaf = w.clone().requires_grad_()
    diversity, simplicity, *_ = vector_losses(leaf, active_E)
    assert diversity.dtype == simplicity.dtype == torch.float32
    expected = by_definition(w.double(), active_E)
    assert relative_rms(diversity, expected[0]) < 1e-6
    assert relative_rms(simplicity, expected[1]) < 1e-6
    (diversity + simplicity).backward()
    assert leaf.grad.dtype == dtype


def test_orthogonal_vectors_have_no_gradient_of_diversity() -> None:
    leaf = torch.eye(6, 4).requires_grad_()
    diversity, *_ = vector_losses(leaf, torch.ones(4, dtype=torch.bool))
    diversity.backward()
    assert float(diversity) == 0
    assert not leaf.grad.any()


def test_a_zero_vector_is_no_nan() -> None:
    w, active_E = vectors(16, 4, 4)
    w[:, 2] = 0
    leaf = w.requires_grad_()
    diversity, simplicity, *_ = vector_losses(leaf, active_E)
    (diversity + simplicity).backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[:, 2].any()


def test_operation_checks() -> None:
    w, active_E = vectors(16, 4, 3)
    torch.library.opcheck(vector_losses, (w.requires_grad_(), active_E))
    strided = vectors(4, 16, 12)[0].t().contiguous().t()
    torch.library.opcheck(vector_losses, (strided.requires_grad_(), torch.ones(16, dtype=torch.bool)))
    torch.autograd.gradcheck(lambda w: vector_losses(w, active_E)[:2], (w,))


def test_no_active_slot_has_no_loss() -> None:
    """0, as on a GPU. Regression: it was NaN."""
    leaf = torch.ones(8, 3).requires_grad_()
    losses = vector_losses(leaf, torch.zeros(3, dtype=torch.bool))[:2]
    sum(losses).backward()
    assert [float(loss) for loss in losses] == [0, 0]
    assert not leaf.grad.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_inactive_slot_may_hold_anything(value: float) -> None:
    w, active_E = vectors(16, 6, 3)
    results = []
    for _ in range(2):
        leaf = w.clone().requires_grad_()
        losses = vector_losses(leaf, active_E)[:2]
        sum(losses).backward()
        results.append((*(loss.detach() for loss in losses), leaf.grad))
        w[:, ~active_E] = value
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
