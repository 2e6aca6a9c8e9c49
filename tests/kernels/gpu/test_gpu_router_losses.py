"""Triton's diversity and simplicity against the torch operation in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_rms

from dynmoe_tutel.kernels.gpu import router_losses as gpu
from dynmoe_tutel.kernels.router_losses import vector_losses, vector_losses_backward

SHAPES = [(16, 4, 3), (97, 65, 40), (5, 1, 1), (33, 17, 17), (70, 32, 30)]  # D, E, active


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("d_losses", [(2.0, 3.0), (None, 3.0), (2.0, None)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient(
    shape: tuple[int, int, int], d_losses: tuple[float | None, ...], strided: bool, device: str, poisoned: None
) -> None:
    D, E, count = shape
    generator = torch.Generator().manual_seed(D + E)
    active_E = torch.zeros(E, dtype=torch.bool)
    active_E[torch.randperm(E, generator=generator)[:count]] = True
    w = torch.randn(D, E, generator=generator)
    w = w.t().contiguous().t() if strided else w
    wanted = vector_losses(w.double(), active_E)
    found = gpu.vector_losses(w.to(device), active_E.to(device))
    for f, e in zip(found[:2], wanted[:2], strict=True):
        assert relative_rms(f, e) < 1e-6
    d_losses = tuple(None if d is None else torch.tensor(d) for d in d_losses)
    gradient = gpu.vector_losses_backward(
        found[0], *(None if d is None else d.to(device) for d in d_losses), *found[2:], w.to(device)
    )
    exact = vector_losses_backward(
        wanted[0], *(None if d is None else d.double() for d in d_losses), *wanted[2:], w.double()
    )
    assert relative_rms(gradient, exact) < 1e-6
    assert gradient.is_contiguous()
    assert not gradient[:, ~active_E.to(device)].any()


def test_strides_of_the_mask_and_what_inactive_slots_hold(device: str, poisoned: None) -> None:
    w, active = torch.randn(24, 7, generator=torch.Generator().manual_seed(0)).to(device), torch.arange(14) % 4 == 0
    thin = active.to(device)[::2]
    assert not thin.is_contiguous()
    d_losses = torch.tensor(2.0, device=device), torch.tensor(3.0, device=device)
    results = []
    for mask, value in ((thin.contiguous(), None), (thin, None), (thin, float("nan")), (thin, float("inf"))):
        if value is not None:
            w[:, ~thin] = value
        found = gpu.vector_losses(w, mask)
        results.append((*found[:2], gpu.vector_losses_backward(found[0], *d_losses, *found[2:], w)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_active_slot(device: str, poisoned: None) -> None:
    w, none = torch.ones(8, 3, device=device), torch.zeros(3, dtype=torch.bool, device=device)
    found = gpu.vector_losses(w, none)
    assert [float(f) for f in found[:2]] == [0, 0]
    one = torch.ones((), device=device)
    assert not gpu.vector_losses_backward(found[0], one, one, *found[2:], w).any()


def test_more_tiles_than_are_added_at_once(device: str) -> None:
    """As with 257 slots or more: 289 tiles."""
    sums, inv_norm = (
        torch.rand(289, generator=torch.Generator().manual_seed(0)).to(device),
        torch.ones(2, device=device),
    )
    active, diversity = torch.ones(2, dtype=torch.bool, device=device), torch.zeros((), device=device)
    gpu.losses_kernel[(1,)](
        sums,
        inv_norm,
        active,
        diversity,
        *(torch.zeros_like(diversity) for _ in range(2)),
        289,
        2,
        BLOCK_T=256,
        BLOCK_E=2,
    )
    assert relative_rms(diversity, sums.double().sum().sqrt()) < 1e-6
