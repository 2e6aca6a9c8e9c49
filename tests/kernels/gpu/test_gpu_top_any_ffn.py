"""Triton's top-any experts and the router's gradient against the torch operations in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import HAS_GPU, relative_rms
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dynmoe_tutel import kernels
from dynmoe_tutel.kernels.gpu import router_gradient as router
from dynmoe_tutel.kernels.gpu import router_losses
from dynmoe_tutel.kernels.gpu import top_any_ffn as gpu
from dynmoe_tutel.kernels.top_any_ffn import top_any_ffn, top_any_ffn_backward

NAMES = ("x", "w", "thresholds", "scale", "w1", "b1", "w3", "b3", "w2", "b2")
CASES = [  # T, D, H, O, E, threshold, options
    ((33, 16, 24, 8, 4, 0.1), {}),
    ((33, 40, 24, 40, 4, 0.0), {"gated": True, "activation": "silu", "biases": False}),
    ((70, 33, 47, 35, 5, 0.05), {"spare": 4, "activation": "relu"}),
    ((6, 33, 17, 33, 65, 0.2), {"gated": True}),
    ((20, 16, 24, 16, 6, 0.3), {"fallback": True}),
    ((20, 16, 24, 16, 6, 2.0), {}),  # nobody is routed
    ((20, 16, 24, 16, 3, -2.0), {"spare": 0}),  # everybody to every expert
    ((0, 16, 24, 16, 3, 0.0), {}),
]
HALF = [torch.bfloat16, torch.float16]
HALF_SHAPES = (
    [(257, 64, 96, 48, 5, 0.05), (64, 97, 47, 65, 3, 0.0), (500, 520, 1040, 520, 8, 0.0)]
    if HAS_GPU
    else [(37, 24, 40, 16, 3, 0.05), (19, 33, 23, 17, 3, 0.0)]
)


class Call:
    """A routed batch; `gate` and `experts` are the operation's arguments before and after the index."""

    def __init__(
        self,
        T: int,
        D: int,
        H: int,
        O: int,
        E: int,
        threshold: float,
        *,
        dtype: torch.dtype = torch.float32,
        gated: bool = False,
        biases: bool = True,
        spare: int = -1,
        fallback: bool = False,
        activation: str = "gelu",
    ) -> None:
        generator = torch.Generator().manual_seed(T + D + E)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        x, w, thresholds = draw(T, D), draw(D, E), torch.full((E,), threshold)
        active = torch.ones(E, dtype=torch.bool)
        if E > 3:
            active[1] = False
        scale = torch.tensor(1.7)
        score, bits, unrouted, inv_norm, *_ = kernels.threshold_gate(x, w, thresholds, active, scale, fallback)
        self.A = int(kernels.unpack_bits(bits, E).sum())
        index = kernels.Index(*kernels.ragged_index(bits, E, -1 if spare < 0 else self.A + spare))
        b1, w3 = draw(E, H) if biases else None, draw(E, D, H, scale=D**-0.5) if gated else None
        b3, b2 = draw(E, H) if gated and biases else None, draw(E, O) if biases else None
        w1, w2 = draw(E, H, D, scale=D**-0.5).transpose(1, 2), draw(E, H, O, scale=H**-0.5)
        router = kernels.Router(w, thresholds, scale, score, inv_norm, unrouted, bits)
        self.tensors = (x, router, index, kernels.ExpertWeights(w1, b1, w3, b3, w2, b2))
        self.activation, self.d_y = activation, draw(T, O)

    def on(self, device: str) -> tuple[Any, ...]:
        return tree_map_only(Tensor, lambda t: t.to(device), self.tensors)

    def in_fp64(self) -> tuple[Any, ...]:
        return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, self.tensors)


def compare(call: Call, device: str, centred: bool, dtype: torch.dtype, limit: float) -> None:
    options = (call.activation, centred)
    expected = top_any_ffn(*call.in_fp64(), *options, torch.float64, True)
    found = gpu.top_any_ffn(*call.on(device), *options, dtype, True)
    assert found[0].dtype == dtype
    assert relative_rms(found[0], expected[0]) < limit
    for f, e in zip(found[1:], expected[1:], strict=True):
        assert relative_rms(f[: call.A], e[: call.A]) < limit
        f[call.A :] = float("nan")  # not read

    saved = [t.nan_to_num() for t in expected[1:]]
    wanted = top_any_ffn_backward(call.d_y.double(), *saved, *call.in_fp64(), *options, torch.float64, True)
    gradients = gpu.top_any_ffn_backward(call.d_y.to(device), *found[1:], *call.on(device), *options, dtype, True)
    assert len(gradients) == len(NAMES)
    for name, f, e in zip(NAMES, gradients, wanted, strict=True):
        # the scale's gradient is one number, a difference of terms as large as the thresholds' gradient
        assert relative_rms(f, e, scale=float(wanted[2].norm()) if name == "scale" else 0.0) < limit, name
    for f, given in zip(gradients[:4], (call.tensors[0], *call.tensors[1]), strict=False):
        assert (f.shape, f.dtype) == (given.shape, given.dtype)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_forward_and_backward(shape: tuple, options: dict, centred: bool, device: str, poisoned: None) -> None:
    compare(Call(*shape, **options), device, centred, torch.float32, 2e-6)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", HALF_SHAPES)
def test_half_precision(shape: tuple, gated: bool, dtype: torch.dtype, device: str) -> None:
    compare(Call(*shape, dtype=dtype, gated=gated), device, False, dtype, 8e-3)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tokens_in_fp32_products_in_half_precision(dtype: torch.dtype, device: str) -> None:
    """As under autocast: tokens of the gate, all weights and their gradients stay fp32."""
    call = Call(*HALF_SHAPES[0])
    compare(call, device, False, dtype, 8e-3)
    y, h, u = gpu.top_any_ffn(*call.on(device), "gelu", False, dtype, True)
    gradients = gpu.top_any_ffn_backward(y, h, u, *call.on(device), "gelu", False, dtype, True)
    assert all(g.dtype == torch.float32 for g in gradients)


def test_two_runs_are_bitwise_equal_and_recompute_changes_nothing(device: str) -> None:
    call = Call(33, 16, 24, 8, 4, 0.1, gated=True)
    tensors, d_y = call.on(device), call.d_y.to(device)

    def run(save: bool) -> tuple[Tensor, ...]:
        y, h, u = gpu.top_any_ffn(*tensors, "gelu", True, torch.float32, save)
        assert (h.shape[0] > 0) == save
        return y, *gpu.top_any_ffn_backward(d_y, h, u, *tensors, "gelu", True, torch.float32, True)

    first = run(True)
    for other in (run(True), run(False)):
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


def test_given_unit_vectors_and_no_scale(device: str, poisoned: None) -> None:
    """The unit vectors of the losses, of which inactive ones are 0; no scale is a scale of 1."""
    call = Call(33, 16, 24, 8, 4, 0.1)
    x, gate, index, weights = call.on(device)
    active = torch.tensor([True, False, True, True], device=device)
    _, _, *unit, _, _ = router_losses.vector_losses(gate.w_DE, active)
    one, results = torch.ones((), device=device), []
    for other in (gate._replace(scale=one), gate._replace(scale=None, unit_ED=unit[0], inv_norm_E=unit[1])):
        tensors = (x, other, index, weights)
        y, h, u = gpu.top_any_ffn(*tensors, "gelu", True, torch.float32, True)
        gradients = gpu.top_any_ffn_backward(call.d_y.to(device), h, u, *tensors, "gelu", True, torch.float32, True)
        results.append((y, *gradients))
    for name, a, b in zip(("y", *NAMES), *results, strict=True):
        if name == "scale":
            assert b.numel() == 0
        else:
            assert relative_rms(b, a) < 1e-6, name


@pytest.mark.parametrize("strided", [False, True])
def test_unit_vectors_and_their_gradient(strided: bool, device: str, poisoned: None) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1030, 5, generator=generator)
    w[:, 3] = 0
    w = w.t().contiguous().t() if strided else w
    d_unit = torch.randn(7, 5, 1030, generator=generator)  # in chunks, of which a program adds several at once
    scale, G, d_scores = torch.tensor(2.0), torch.randn(5, generator=generator), torch.randn(7, 5, generator=generator)
    unit, inverse = router.unit_vectors(w.to(device))
    wd = w.double().requires_grad_()
    norm = wd.norm(dim=0)
    exact = torch.where(norm > 1e-12, wd / norm.clamp(min=1e-12), wd * 0).t()
    assert relative_rms(unit, exact.detach()) < 1e-6
    d_w, d_scale, d_G = router.direction_gradient(
        d_unit.to(device), unit, inverse, scale.to(device), w.to(device), (G.to(device), d_scores.to(device))
    )
    d_unit, d_scores = d_unit.double().sum(dim=0), d_scores.double().sum(dim=0)
    exact.backward(d_unit)
    d_expected = wd.grad
    d_expected[:, 3] = 0
    assert relative_rms(d_w, d_expected) < 1e-6
    Gd, tau = G.double().requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (-(torch.sigmoid(tau * Gd) * d_scores).sum()).backward()
    assert relative_rms(d_G, Gd.grad) < 1e-6
    through_cosines_E = (exact.detach() * d_unit).sum(dim=1) / 2
    assert abs(float(d_scale) - float(through_cosines_E.sum() + tau.grad)) < 1e-6 * float(through_cosines_E.abs().sum())


def test_the_threshold_of_an_inactive_slot_may_be_anything(device: str, poisoned: None) -> None:
    """It has no assignment, hence no gradient."""
    generator = torch.Generator().manual_seed(0)
    w, d_unit = (torch.randn(shape, generator=generator).to(device) for shape in ((8, 3), (3, 8)))
    G, d_scores = torch.randn(3, generator=generator).to(device), torch.tensor([1.0, 0.0, -2.0], device=device)
    d_unit[1] = 0
    results = []
    for value in (0.5, float("nan"), float("inf")):
        G[1] = value
        unit, inverse = router.unit_vectors(w)
        results.append(
            router.direction_gradient(
                d_unit[None], unit, inverse, torch.ones((), device=device), w, (G, d_scores[None])
            )
        )
        assert float(results[-1][2][1]) == 0
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_gradient_of_a_token_from_many_parts(device: str, poisoned: None) -> None:
    """More partial sums per row than one step adds, as with H > 1,024; experts of every word; a NaN score."""
    call = Call(6, 16, 8, 16, 65, 0.1, biases=False)
    x, gate, index, _ = call.on(device)
    gate.score_TE[:, 1] = float("nan")  # an inactive slot
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(call.A, 20, generator=generator).to(device)
    rows, d_y = (torch.randn(n, 16, generator=generator).to(device) for n in (call.A, 6))
    unit, _ = router.unit_vectors(gate.w_DE)
    found, whole = (
        router.token_gradient(rows, x, d_y, None, p, gate, index, unit, False)
        for p in (parts, parts.sum(dim=1, keepdim=True))
    )
    d_gate = (
        parts.double().sum(dim=1).cpu()
        / index[1].diff().cpu().double().repeat_interleave(index[1].diff().cpu())[index[3].cpu().long().argsort()]
    )
    on_cpu = kernels.Index(*(i.cpu() for i in index))
    expected = kernels.dispatch_combine.row_gates_backward(d_gate, gate.unrouted_T.cpu(), on_cpu, True, False)
    assert relative_rms(found[1], expected) < 1e-6
    for one, other in zip(found, whole, strict=True):
        assert relative_rms(one, other) < 1e-6
