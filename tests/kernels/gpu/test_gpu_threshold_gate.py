"""Triton's threshold gate and the gradient of its scores against the torch operations in float64."""

from __future__ import annotations

import pytest
import torch
from dynmoe_tutel.kernels import threshold_gate
from dynmoe_tutel.kernels.gpu import threshold_gate as gpu
from dynmoe_tutel.kernels.threshold_gate import threshold_gate_backward
from helpers import HAS_GPU, relative_rms
from torch import Tensor

SHAPES = [  # T, D, E
    (7, 97, 5),
    (65, 47, 16),
    (130, 16, 3),
    (33, 64, 65),
    (20, 40, 200),
    (17, 33, 512),
    (1, 1, 1),
    (0, 16, 4),
]
HALF = [torch.bfloat16, torch.float16] if HAS_GPU else []
MARGIN = 1e-5


class Batch:
    """Tokens, routing vectors, and thresholds that no cosine is near to."""

    def __init__(self, T: int, D: int, E: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(T + D + E)
        self.x = torch.randn(T, D, generator=generator).to(dtype)
        self.w = torch.randn(D, E, generator=generator).to(dtype)
        self.active = torch.ones(E, dtype=torch.bool)
        self.active[1::3] = False
        self.scale = torch.tensor(2.5)
        cos_TE = self.x.double() @ self.w.double()
        cos_TE /= self.x.double().norm(dim=1, keepdim=True) * self.w.double().norm(dim=0)
        self.G = torch.full((E,), 0.1) + 0.05 * torch.rand(E, generator=generator)
        for _ in range(20):  # move thresholds away from cosines
            near = ((cos_TE - self.G.double()).abs() < MARGIN).any(dim=0)
            self.G[near] += 4 * MARGIN
        assert not near.any()

    def arguments(self, device: str) -> tuple[Tensor, ...]:
        return tuple(t.to(device) for t in (self.x, self.w, self.G, self.active, self.scale))

    def in_fp64(self) -> tuple[Tensor, ...]:
        return self.x.double(), self.w.double(), self.G.double(), self.active, self.scale.double()


def compare(batch: Batch, device: str, fallback: bool, mask: Tensor | None = None, limit: float = 1e-6) -> None:
    wanted = threshold_gate(*batch.in_fp64(), fallback, mask)
    found = gpu.threshold_gate(*batch.arguments(device), fallback, None if mask is None else mask.to(device))
    real = slice(None) if mask is None else mask
    for i, name in ((1, "bits"), (2, "unrouted"), (4, "block_counts")):
        assert found[i].dtype == wanted[i].dtype, name
        assert torch.equal(found[i].cpu(), wanted[i]), name
    for i, name in ((0, "score"), (3, "inv_norm")):
        assert found[i].dtype == torch.float32, name
        assert relative_rms(found[i].cpu()[real], wanted[i][real]) < limit, name


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_torch_operation(shape: tuple, fallback: bool, device: str, poisoned: None) -> None:
    compare(Batch(*shape), device, fallback)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_padding_gets_no_expert(shape: tuple, fallback: bool, device: str, poisoned: None) -> None:
    mask = torch.rand(shape[0], generator=torch.Generator().manual_seed(0)) < 0.6
    compare(Batch(*shape), device, fallback, mask)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 1030, 8), (257, 768, 64)], ids=str)
def test_half_precision_decides_as_fp32(shape: tuple, dtype: torch.dtype, device: str) -> None:
    compare(Batch(*shape, dtype), device, True)


def test_strides(device: str) -> None:
    batch = Batch(33, 40, 6)
    expected = gpu.threshold_gate(*batch.arguments(device), True)
    batch.x, batch.w = batch.x.t().contiguous().t(), batch.w.t().contiguous().t()
    for one, other in zip(gpu.threshold_gate(*batch.arguments(device), True), expected, strict=True):
        assert torch.equal(one, other)


def test_zero_and_non_finite_tokens_leave_the_others_alone(device: str) -> None:
    batch = Batch(20, 24, 5)
    clean = gpu.threshold_gate(*batch.arguments(device), False)
    batch.x[3], batch.x[5, 7], batch.x[9, 0] = 0, float("nan"), float("inf")
    dirty = gpu.threshold_gate(*batch.arguments(device), False)
    others = [t for t in range(20) if t not in (3, 5, 9)]
    for one, other in zip(clean[:4], dirty[:4], strict=True):
        assert torch.equal(one[others], other[others])
    assert dirty[2][[3, 5, 9]].all()  # a zero token has cosine 0, below every threshold here
    assert float(dirty[3][3]) == 0
    assert torch.equal(dirty[0][3], torch.full((5,), 0.5, device=device))


def test_a_token_does_not_depend_on_its_batch(device: str) -> None:
    batch = Batch(65, 47, 16)
    together = gpu.threshold_gate(*batch.arguments(device), True)
    batch.x = batch.x[40:41]
    alone = gpu.threshold_gate(*batch.arguments(device), True)
    for one, other in zip(alone[:4], together[:4], strict=True):
        assert torch.equal(one[0], other[40])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_the_scores(shape: tuple, device: str, poisoned: None) -> None:
    batch = Batch(*shape)
    x, w, _, _, scale = batch.arguments(device)
    score, _, _, inv_norm, _ = gpu.threshold_gate(*batch.arguments(device), False)
    d_score = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(7))
    found = gpu.threshold_gate_backward(d_score.to(device), score, x, w, inv_norm, scale)
    exact = threshold_gate(*batch.in_fp64(), False)
    wanted = threshold_gate_backward(
        d_score.double(), exact[0], batch.x.double(), batch.w.double(), exact[3], batch.scale.double()
    )
    terms = float((d_score.double() * exact[0] * (1 - exact[0])).norm())  # the gradients are differences of such
    for name, f, e in zip(("x", "w", "scale"), found, wanted, strict=True):
        assert f.dtype == torch.float32
        allowed = 1e-6 * max(float(e.norm()), terms)
        assert float((f.double().cpu() - e).norm()) <= 3 * allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(7, 97, 5), (700, 33, 4), (65, 130, 200), (0, 16, 4)], ids=str)
def test_sum_over_the_tokens(shape: tuple, dtype: torch.dtype, device: str, poisoned: None) -> None:
    T, D, E = shape
    generator = torch.Generator().manual_seed(T)
    d_cos, x = torch.randn(T, E, generator=generator), torch.randn(T, D, generator=generator).to(dtype)
    found = gpu.unit_gradient(d_cos.to(device), x.to(device))
    assert found.dtype == torch.float32
    assert relative_rms(found, d_cos.double().t() @ x.double()) < 1e-6
    assert torch.equal(found, gpu.unit_gradient(d_cos.to(device), x.to(device)))
