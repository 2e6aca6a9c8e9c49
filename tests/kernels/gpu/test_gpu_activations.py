"""gelu and its derivative by a formula of this project, against float64 over the whole range."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dynmoe_tutel.kernels.gpu.activations import activate, derivative


@triton.jit
def _both_kernel(h_in, value_out, derivative_out, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_in + n, mask=n < N, other=0.0)
    tl.store(value_out + n, activate(h, "gelu"), mask=n < N)
    tl.store(derivative_out + n, derivative(h, "gelu"), mask=n < N)


def both(h: Tensor, device: str) -> tuple[Tensor, Tensor]:
    h = h.to(device)
    value, slope = torch.empty_like(h), torch.empty_like(h)
    _both_kernel[(triton.cdiv(h.numel(), 4096),)](h, value, slope, h.numel(), BLOCK=4096)
    return value.cpu(), slope.cpu()


def test_gelu_is_exact_to_3e_7(device: str) -> None:
    """The error is absolute up to |h| = 1 and relative beyond, where fp32 itself has no finer steps."""
    large = torch.logspace(-30, 38, 2000)
    h = torch.cat([torch.linspace(-14, 14, 60001), large, -large])
    value, slope = (t.double() for t in both(h, device))
    exact = h.double()
    phi = torch.exp(-exact.square() / 2) * 0.3989422804014327
    cdf = torch.special.ndtr(exact)
    assert float(((value - exact * cdf).abs() / exact.abs().clamp(min=1)).max()) < 3e-7
    assert float((slope - (cdf + exact * phi)).abs().max()) < 3e-7


def test_the_tail_is_exact_to_the_rounding_of_half_precision(device: str) -> None:
    h = torch.linspace(-7, -1, 20001)
    exact = h.double() * torch.special.ndtr(h.double())
    assert float((both(h, device)[0].double() / exact - 1).abs().max()) < 2**-11


@pytest.mark.parametrize("which", [0, 1])
def test_infinity_and_nan_as_by_erf(which: int, device: str) -> None:
    h = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    cdf = 0.5 * (1 + torch.erf(h * 0.5**0.5))
    wanted = (h * cdf, cdf + h * 0.3989422804014327 * torch.exp(-h * h / 2))
    torch.testing.assert_close(both(h, device)[which], wanted[which], equal_nan=True)
