"""Triton's threshold gate and its score gradient against the torch operations in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import HAS_GPU, relative_rms
from torch import Tensor

from dynmoe_tutel.kernels import threshold_gate, unpack_bits
from dynmoe_tutel.kernels.gpu import score_gradient
from dynmoe_tutel.kernels.gpu import threshold_gate as gpu
from dynmoe_tutel.kernels.threshold_gate import threshold_gate_backward

SHAPES = [  # T, D, E
    (7, 97, 5),
    (65, 47, 16),
    (130, 16, 3),
    (33, 64, 65),
    (20, 40, 200),
    (17, 33, 512),
    (5, 24, 513),  # more experts than a tile holds
    (3, 16, 2049),
    (1, 1, 1),
    (0, 16, 4),
    (7, 1, 63),
    (130, 16, 64),  # three blocks of the index, two tiles
]
HALF = [torch.bfloat16, torch.float16]
MARGIN = 1e-5


class Batch:
    """Tokens, routing vectors, and thresholds far from every cosine."""

    def __init__(
        self, T: int, D: int, E: int, dtype: torch.dtype = torch.float32, w_dtype: torch.dtype | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(T + D + E)
        self.x = torch.randn(T, D, generator=generator).to(dtype)
        self.w = torch.randn(D, E, generator=generator).to(w_dtype or dtype)
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


def compare(
    batch: Batch,
    device: str,
    fallback: bool,
    mask: Tensor | None = None,
    limit: float = 1e-6,
    shift: float | None = None,
    max_k: int = 0,
) -> Tensor:
    """Returns the unrouted flags."""
    by = None if shift is None else torch.tensor([shift])
    wanted = threshold_gate(*batch.in_fp64(), fallback, mask, by, max_k)
    on_device = [None if t is None else t.to(device) for t in (mask, by)]
    found = gpu.threshold_gate(*batch.arguments(device), fallback, *on_device, max_k)
    for i, name in ((1, "bits"), (2, "unrouted"), (4, "block_counts")):
        assert found[i].dtype == wanted[i].dtype, name
        assert torch.equal(found[i].cpu(), wanted[i]), name
    for i, name in ((0, "score"), (3, "inv_norm")):
        assert found[i].dtype == torch.float32, name
        assert relative_rms(found[i], wanted[i]) < limit, name
    return wanted[2]


def gradient_errors(batch: Batch, d_score: Tensor, device: str) -> dict[str, float]:
    """Errors relative to the terms whose differences the gradients are, in units of their dtype's precision."""
    x, w, *_, scale = batch.arguments(device)
    score, _, _, inv_norm, _ = gpu.threshold_gate(*batch.arguments(device), False)
    found = score_gradient.threshold_gate_backward(d_score.to(device), score, x, w, inv_norm, scale)
    exact = threshold_gate(*batch.in_fp64(), False)
    xd, wd, *_, tau = batch.in_fp64()
    wanted = threshold_gate_backward(d_score.double(), exact[0], xd, wd, exact[3], tau)
    terms = float((d_score.double() * exact[0] * (1 - exact[0])).norm())
    errors = {}
    for name, given, f, e in zip(("x", "w", "scale"), (x, w, scale), found, wanted, strict=True):
        assert (f.shape, f.dtype) == (given.shape, given.dtype), name
        assert f.isfinite().all(), name
        rounding = 1e-6 if f.dtype == torch.float32 else torch.finfo(f.dtype).eps / 3
        allowed = rounding * max(float(e.norm()), terms)
        errors[name] = float((f.double().cpu() - e).norm()) / allowed if allowed else 0.0
    return errors


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_torch_operation(shape: tuple, fallback: bool, device: str, poisoned: None) -> None:
    compare(Batch(*shape), device, fallback)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_padding_gets_no_expert(shape: tuple, fallback: bool, device: str, poisoned: None) -> None:
    mask = torch.rand(shape[0], generator=torch.Generator().manual_seed(0)) < 0.6
    compare(Batch(*shape), device, fallback, mask)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize(("shift", "max_k"), [(0.1, 0), (None, 2), (0.05, 1), (-0.3, 3), (1.5, 600)])
@pytest.mark.parametrize("shape", [(7, 97, 5), (33, 64, 65), (5, 24, 513)], ids=str)
def test_a_budget(shape: tuple, shift: float | None, max_k: int, fallback: bool, device: str, poisoned: None) -> None:
    masked = max_k > 0
    batch, generator = Batch(*shape), torch.Generator().manual_seed(0)
    mask = torch.rand(shape[0], generator=generator) < 0.8 if masked else None
    # Margins are far from the shift as they are from 0, and no two of a token are alike: no decision is in doubt.
    cos_TE = torch.nn.functional.normalize(batch.x.double(), dim=1) @ torch.nn.functional.normalize(
        batch.w.double(), dim=0
    )
    margin_TE = (cos_TE - batch.G.double())[:, batch.active]
    near = (margin_TE - (shift or 0)).abs().amin(dim=1) < MARGIN
    if margin_TE.shape[1] > 1:
        near |= margin_TE.sort(dim=1).values.diff(dim=1).amin(dim=1) < 1e-6
    batch.x = batch.x[~near]
    assert len(batch.x) > 0.6 * shape[0]
    mask = None if mask is None else mask[~near]
    compare(batch, device, fallback, mask, shift=shift, max_k=max_k)


def test_equal_margins_stay_by_slot(device: str) -> None:
    ones = torch.ones(4, dtype=torch.bool, device=device)
    arguments = (torch.ones(3, 4), torch.ones(4, 4), torch.zeros(4))
    given = (*(t.to(device) for t in arguments), ones, torch.ones((), device=device))
    bits = gpu.threshold_gate(*given, False, None, torch.tensor([0.0], device=device), 2)[1]
    assert bits.flatten().tolist() == [0b11] * 3
    bits = gpu.threshold_gate(*given, False, None, torch.tensor([1.5], device=device), 0)[1]
    assert bits.flatten().tolist() == [0b1] * 3


@pytest.mark.parametrize("fallback", [False, True])
def test_what_padding_holds_is_not_read(fallback: bool, device: str, poisoned: None) -> None:
    batch, mask = Batch(70, 24, 5), torch.arange(70) % 3 > 0
    clean = gpu.threshold_gate(*batch.arguments(device), fallback, mask.to(device))
    batch.x[~mask] = float("nan")
    strided = mask.repeat_interleave(2).to(device)[::2]
    assert not strided.is_contiguous()
    for one, other in zip(clean, gpu.threshold_gate(*batch.arguments(device), fallback, strided), strict=True):
        assert torch.equal(one, other)
    assert int(clean[1][~mask.to(device)].abs().sum()) == 0
    assert int(clean[2].sum()) > 0


def test_padding_alone(device: str, poisoned: None) -> None:
    batch = Batch(65, 16, 5)
    _, bits, unrouted, _, block_counts = gpu.threshold_gate(
        *batch.arguments(device), True, torch.zeros(65, dtype=torch.bool, device=device)
    )
    assert not bits.any()
    assert not unrouted.any()
    assert block_counts.tolist() == [0] * 10


def test_a_negative_threshold_admits_no_padding(device: str, poisoned: None) -> None:
    """Padding, and a tile's entries past the last token, have cosine 0, which is above it."""
    batch, mask = Batch(70, 24, 5), torch.arange(70) % 3 > 0
    batch.G -= 1
    for given in (mask, None):
        compare(batch, device, False, given)
    bits = gpu.threshold_gate(*batch.arguments(device), False, mask.to(device))[1].cpu()
    assert bits[mask].any()
    assert not bits[~mask].any()


def test_masked_tokens_leave_the_others_as_they_are(device: str) -> None:
    """A mask that masks nothing changes nothing."""
    batch, mask = Batch(65, 47, 16), torch.arange(65) % 2 > 0
    plain = gpu.threshold_gate(*batch.arguments(device), True)
    all_real = gpu.threshold_gate(*batch.arguments(device), True, torch.ones(65, dtype=torch.bool, device=device))
    some = gpu.threshold_gate(*batch.arguments(device), True, mask.to(device))
    for i, (one, two, three) in enumerate(zip(plain, all_real, some, strict=True)):
        assert torch.equal(one, two)
        assert i == 4 or torch.equal(one[mask.to(device)], three[mask.to(device)])


LARGE = [(300, 1030, 8), (257, 768, 64)] if HAS_GPU else []


@pytest.mark.parametrize("w_dtype", [None, torch.float32], ids=["same", "w fp32"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_half_precision_decides_as_fp32(
    shape: tuple, dtype: torch.dtype, w_dtype: torch.dtype | None, device: str
) -> None:
    compare(Batch(*shape, dtype, w_dtype), device, True)


@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [1e-11, 1.0, 3e4])
def test_routing_vectors_are_the_sum_of_their_parts(
    norm: float, dtype: torch.dtype, w_dtype: torch.dtype, device: str, poisoned: None
) -> None:
    """Without loss, except fp32 in fp16: two parts have 22 bits. D = 4100 exceeds one program's registers."""
    if w_dtype == torch.float16:
        norm = max(norm, 1e-4)
    for D, E in ((47, 5), (4100, 3)):
        w = (norm * D**-0.5 * torch.randn(D, E, generator=torch.Generator().manual_seed(D))).to(w_dtype)
        w[:, 1] = 0
        parts = gpu._number_of_parts(dtype, w_dtype)
        tile = gpu._tile(16, dtype, parts, "sm_90")
        parts_PED, inv_norm_E = (t.cpu().double() for t in gpu._routing_vectors(w.to(device), dtype, tile, parts))
        unit_DE = (parts_PED.sum(dim=0) * inv_norm_E[:, None]).t()
        norm_E = w.double().norm(dim=0).masked_fill(w.double().norm(dim=0) <= 1e-12, torch.inf)
        exact = dtype == torch.bfloat16 or w_dtype != torch.float32
        assert relative_rms(unit_DE[:D, :E], w.double() / norm_E) < (6e-8 if exact else 1.5e-7)  # relative to the norms
        assert not parts_PED[:, E:].any()
        assert not parts_PED[:, :, D:].any()
        assert not inv_norm_E[E:].any()
        top = float(parts_PED[0].norm(dim=1).max())
        assert (2.0**14 if dtype == torch.float16 else 1.0) * 0.99 < top < (2.0**15 if dtype == torch.float16 else 2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_tokens_and_parameters_in_half_precision(dtype: torch.dtype, device: str) -> None:
    batch = Batch(33, 47, 6, torch.float32, dtype)
    batch.G, batch.scale = batch.G.to(dtype), batch.scale.to(dtype)
    margin = threshold_gate(*batch.in_fp64(), False)[0].logit() / 2.5 - batch.G.double()
    assert margin.abs().min() > MARGIN
    compare(batch, device, True)


def in_other_strides(t: Tensor, how: str) -> Tensor:
    """The same values with other strides, and NaN in between."""
    rows, columns = t.shape
    if how == "transposed":
        return t.t().contiguous().t()
    wide = t.new_full((2 * rows, columns + 3), float("nan"))
    if how == "every other row":
        wide = wide[::2]
    at = slice(2, 2 + columns)
    wide[:rows, at] = t
    return wide[:rows, at]


@pytest.mark.parametrize("how_w", ["transposed", "some columns", "every other row"])
@pytest.mark.parametrize("how_x", ["transposed", "some columns", "every other row"])
def test_strides(how_x: str, how_w: str, device: str) -> None:
    batch, d_score = Batch(33, 40, 6), torch.randn(33, 6, generator=torch.Generator().manual_seed(1))
    x, w, G, active, scale = batch.arguments(device)
    expected = gpu.threshold_gate(x, w, G, active, scale, True)
    strided = (in_other_strides(x, how_x), in_other_strides(w, how_w))
    assert not strided[0].is_contiguous()
    assert not strided[1].is_contiguous()
    thin = (G.repeat_interleave(2)[::2], active.repeat_interleave(2)[::2])
    for one, other in zip(gpu.threshold_gate(*strided, *thin, scale, True), expected, strict=True):
        assert torch.equal(one, other)

    score, inv_norm, d_score = expected[0], expected[3], d_score.to(device)
    gradients = score_gradient.threshold_gate_backward(d_score, score, x, w, inv_norm, scale)
    for d in (in_other_strides(d_score, how_x), d_score):
        own = score_gradient.threshold_gate_backward(d, score, *strided, inv_norm, scale)
        assert all(torch.equal(one, other) for one, other in zip(own, gradients, strict=True))
    d_cos = in_other_strides(d_score, how_w)
    sums = (score_gradient.unit_gradient(*given, inv_norm)[0] for given in ((d_cos, strided[0]), (d_score, x)))
    assert torch.equal(*sums)


def test_an_expanded_gradient(device: str) -> None:
    """The gradient of a sum has strides of 0."""
    batch = Batch(33, 40, 6)
    assert max(gradient_errors(batch, torch.ones(()).expand(33, 6), device).values()) < 3


def test_unrouted_tokens_take_the_best_active_expert(device: str, poisoned: None) -> None:
    """Whatever inactive slots and padded columns hold; E = 5 is padded to 16, 65 to 128."""
    for E in (5, 65):
        batch = Batch(20, 24, E)
        batch.G += 2  # nobody passes
        batch.w[:, batch.active] = batch.w[:, :1] * -1 + 0.1 * batch.w[:, batch.active]  # all point away from most
        batch.w[:, 1] = batch.x.sum(dim=0)  # inactive, and close to all tokens
        assert compare(batch, device, True).all()
        bits = gpu.threshold_gate(*batch.arguments(device), True)[1].cpu()
        assigned = unpack_bits(bits, E)
        assert (assigned.sum(dim=1) == 1).all()
        assert not assigned[:, ~batch.active].any()


def test_among_equally_good_experts_the_lowest_slot_is_the_best(device: str) -> None:
    x, w = torch.eye(4)[:1], torch.eye(4)[:, [1, 0, 0, 0]]
    active = torch.tensor([True, False, True, True])
    given = (t.to(device) for t in (x, w, torch.full((4,), 2.0), active, torch.tensor(1.0)))
    assert gpu.threshold_gate(*given, True)[1].tolist() == [[0b0100]]


@pytest.mark.parametrize(("threshold", "passes"), [(0.0, 0), (1.0, 0), (-1e-6, 1)])
def test_equality_does_not_pass(threshold: float, passes: int, device: str) -> None:
    """cos = G = 0 for a token at right angles, cos = G = 1 for a parallel one."""
    x, w = torch.eye(4)[:1], torch.eye(4)[:, :1] if threshold == 1 else torch.eye(4)[:, 1:2]
    given = (t.to(device) for t in (x, w, torch.tensor([threshold]), torch.ones(1).bool(), torch.tensor(1.0)))
    _, bits, unrouted, *_ = gpu.threshold_gate(*given, False)
    assert bits.tolist() == [[passes]]
    assert unrouted.tolist() == [passes == 0]


def test_zero_and_non_finite_tokens_leave_the_others_alone(device: str) -> None:
    batch = Batch(20, 24, 5)
    clean = gpu.threshold_gate(*batch.arguments(device), False)
    batch.x[3], batch.x[5, 7], batch.x[9, 0] = 0, float("nan"), float("inf")
    dirty = gpu.threshold_gate(*batch.arguments(device), False)
    others = [t for t in range(20) if t not in (3, 5, 9)]
    for one, other in zip(clean[:4], dirty[:4], strict=True):
        assert torch.equal(one[others], other[others])
    assert dirty[2][[3, 5, 9]].all()  # a zero token has cosine 0, below every threshold here
    assert dirty[1][[3, 5, 9], 0].tolist() == [0, 1, 1]  # the others get the first active expert
    assert dirty[3][[5, 9]].isnan().all()
    assert float(dirty[3][3]) == 0
    assert torch.equal(dirty[0][3], torch.full((5,), 0.5, device=device))
    assigned = unpack_bits(dirty[1].cpu(), 5)
    assert torch.equal(dirty[4].cpu(), assigned.sum(dim=0, dtype=torch.int32))  # 20 tokens are one block


def test_the_fallback_of_zero_and_non_finite_tokens_is_that_of_torch(device: str) -> None:
    batch = Batch(20, 24, 5)
    batch.active[0] = False
    batch.x[3], batch.x[5, 7], batch.x[9, 0] = 0, float("nan"), float("inf")
    wanted = threshold_gate(batch.x, *batch.arguments("cpu")[1:], True)
    found = gpu.threshold_gate(*batch.arguments(device), True)
    for i in (1, 2, 4):
        assert torch.equal(found[i].cpu(), wanted[i])
    assert found[1][[3, 5, 9], 0].tolist() == [0b00100] * 3  # the first active one


def test_zero_vectors_get_zero_gradients(device: str, poisoned: None) -> None:
    batch = Batch(20, 24, 6)
    batch.x[3], batch.w[:, 2] = 0, 0
    x, w, _, _, scale = batch.arguments(device)
    score, bits, _, inv_norm, _ = gpu.threshold_gate(*batch.arguments(device), False)
    assert not (bits & 4).any()
    assert (score[:, 2] == 0.5).all()
    d_score = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)).to(device)
    d_x, d_w, d_scale = score_gradient.threshold_gate_backward(d_score, score, x, w, inv_norm, scale)
    assert (d_x[3] == 0).all()
    assert (d_w[:, 2] == 0).all()
    assert all(t.isfinite().all() and (t != 0).any() for t in (d_x, d_w, d_scale))


def test_a_token_does_not_depend_on_its_batch(device: str) -> None:
    batch = Batch(65, 47, 16)
    together = gpu.threshold_gate(*batch.arguments(device), True)
    batch.x = batch.x[40:41]
    alone = gpu.threshold_gate(*batch.arguments(device), True)
    for one, other in zip(alone[:4], together[:4], strict=True):
        assert torch.equal(one[0], other[40])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_the_scores(shape: tuple, device: str, poisoned: None) -> None:
    d_score = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(7))
    errors = gradient_errors(Batch(*shape), d_score, device)
    assert max(errors.values()) < 3, errors


@pytest.mark.parametrize("w_dtype", [None, torch.float32], ids=["same", "w fp32"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(7, 97, 5), (65, 47, 16), (33, 64, 65), *LARGE[:1]], ids=str)
def test_gradient_in_half_precision(shape: tuple, dtype: torch.dtype, w_dtype: torch.dtype | None, device: str) -> None:
    d_score = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(7))
    errors = gradient_errors(Batch(*shape, dtype, w_dtype), d_score, device)
    assert max(errors.values()) < 3, errors


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(7, 97, 5), (700, 33, 4), (65, 130, 200), (1, 1, 1), (0, 16, 4)], ids=str)
def test_sum_over_the_tokens(shape: tuple, dtype: torch.dtype, device: str, poisoned: None) -> None:
    T, D, E = shape
    generator = torch.Generator().manual_seed(T)
    d_cos, x = torch.randn(T, E, generator=generator), torch.randn(T, D, generator=generator).to(dtype)
    inverse = torch.ones(T, device=device)
    d_score = torch.randn(T, E, generator=generator)
    given = d_cos.to(device), x.to(device), inverse
    found = score_gradient.unit_gradient(*given, d_score.to(device))
    assert found[0].dtype == torch.float32
    assert relative_rms(found[0].sum(dim=0), d_cos.double().t() @ x.double()) < 1e-6
    assert relative_rms(found[1].sum(dim=0), d_score.double().sum(dim=0)) < 1e-6
    again = score_gradient.unit_gradient(*given, d_score.to(device))
    assert all(torch.equal(*two) for two in zip(found, again, strict=True))
    assert torch.equal(found[0], score_gradient.unit_gradient(*given)[0])


def test_an_inactive_slot_may_hold_anything(device: str, poisoned: None) -> None:
    """It is only storage: it affects neither the tokens' gradients nor the active vectors'."""
    batch = Batch(20, 24, 5)
    assert not batch.active[1]
    results = []
    for value in (batch.w[:, 1].clone(), torch.tensor(float("nan")), torch.tensor(float("inf"))):
        batch.w[:, 1] = value
        x, w, _, active, scale = batch.arguments(device)
        score, bits, unrouted, inv_norm, counts = gpu.threshold_gate(*batch.arguments(device), True)
        d_score = torch.randn(20, 5, generator=torch.Generator().manual_seed(1)).to(device) * active
        d_x, d_w, d_scale = score_gradient.threshold_gate_backward(d_score, score, x, w, inv_norm, scale)
        assert not d_w[:, 1].any()
        results.append((score[:, active], bits, unrouted, counts, d_x, d_w, d_scale))
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("chip", ["sm_86", "sm_89", "sm_120"])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("block_e", [16, 64, 128, 256, 512])
def test_the_tile_fits_where_shared_memory_is_small(block_e: int, parts: int, chip: str) -> None:
    """Regression: at 256 experts in three parts, three stages took 100 of 99 KB."""
    for dtype in (torch.bfloat16, torch.float32):
        tile = gpu._tile(block_e, dtype, parts if dtype == torch.bfloat16 else 1, chip)
        rows = tile["BLOCK_T"] + block_e * (parts if dtype == torch.bfloat16 else 1)
        assert (tile["num_stages"] - 1) * rows * tile["BLOCK_D"] * dtype.itemsize <= 96 * 1024


SIZES = [1e-40, 1e-30, 1e-15, 1e20, 1e37]


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_vectors_of_every_size(size: float, dtype: torch.dtype, fallback: bool, device: str) -> None:
    """Decisions, scores and gradients are those of float64. Regression: 1e-15 counted as zero, 1e20 overflowed."""
    size = min(max(size, 1e-6), 1e3) if dtype == torch.float16 else size
    for E in (6, 65)[: 1 if fallback else 2]:
        batch = Batch(33, 47, E, dtype, torch.float32)
        batch.x, batch.w = (batch.x.double() * size).to(dtype), batch.w * min(max(size, 1e-25), 1e25)
        if size < 1e-30:  # such tokens pass no gradient: 1 / ||x|| may overflow
            found, wanted = (
                gpu.threshold_gate(*batch.arguments(device), fallback),
                threshold_gate(*batch.in_fp64(), fallback),
            )
            assert torch.equal(found[1].cpu(), wanted[1])
            assert relative_rms(found[0], wanted[0]) < 1e-6
            assert not found[3].any()
            continue
        compare(batch, device, fallback)
        d_score = torch.randn(33, E, generator=torch.Generator().manual_seed(7)) * min(size, 1)
        x, w, *_, scale = batch.arguments(device)
        score, _, _, inv_norm, _ = gpu.threshold_gate(*batch.arguments(device), False)
        found = score_gradient.threshold_gate_backward(d_score.to(device), score, x, w, inv_norm, scale)
        exact = threshold_gate(*batch.in_fp64(), False)
        xd, wd, *_, tau = batch.in_fp64()
        wanted = threshold_gate_backward(d_score.double(), exact[0], xd, wd, exact[3], tau)
        if size < 1e37:
            assert relative_rms(found[1].double() * size, wanted[1] * size) < (1e-4 if dtype in HALF else 1e-5)
            rounding = 3e-6 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
            assert relative_rms(found[0].double() * size, wanted[0] * size) < rounding
        assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("exponent", [-100, -50, 66, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_power_of_two_changes_no_decision(dtype: torch.dtype, exponent: int, device: str) -> None:
    """Nor a score, of one token or of all."""
    batch = Batch(33, 47, 6, dtype)
    plain = gpu.threshold_gate(*batch.arguments(device), False)
    x = batch.x.clone()
    for rows in (slice(5, 6), slice(None)):
        batch.x = x.clone()
        batch.x[rows] *= 2.0**exponent
        found = gpu.threshold_gate(*batch.arguments(device), False)
        for i in (0, 1, 2, 4):
            assert torch.equal(found[i], plain[i])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_token_that_is_not_finite_gives_the_router_no_gradient(
    value: float, dtype: torch.dtype, device: str, poisoned: None
) -> None:
    batch = Batch(33, 47, 5, dtype)
    d_score = torch.randn(33, 5, generator=torch.Generator().manual_seed(1)).to(device)
    d_score[4] = 0
    results = []
    for _ in range(2):
        x, w, *_, scale = batch.arguments(device)
        score, bits, unrouted, inv_norm, counts = gpu.threshold_gate(*batch.arguments(device), False)
        assert int(counts.sum()) == int(unpack_bits(bits.cpu(), 5).sum())
        d_x, d_w, d_scale = score_gradient.threshold_gate_backward(d_score, score, x, w, inv_norm, scale)
        others = torch.arange(33, device=device) != 4
        results.append((d_x[others], d_w, d_scale, bits[others], unrouted[others]))
        batch.x[4, 2] = value
    assert bits[4].tolist() == [0b00001]
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("broken", ["vector nan", "vector inf", "threshold nan"])
def test_an_active_expert_that_is_not_finite_is_decided_as_by_torch(broken: str, fallback: bool, device: str) -> None:
    for E in (5, 16):
        batch = Batch(20, 24, E)
        batch.x[7] = float("nan")
        for e in (2, 4):  # 4 is inactive
            if broken == "threshold nan":
                batch.G[e] = float("nan")
            else:
                batch.w[1, e] = float(broken.split()[1])
        assert batch.active[2]
        assert not batch.active[4]
        wanted = threshold_gate(*batch.arguments("cpu"), fallback)
        found = gpu.threshold_gate(*batch.arguments(device), fallback)
        for i in (1, 2, 4):
            assert torch.equal(found[i].cpu(), wanted[i])
        assert unpack_bits(wanted[1], E)[:, 2].all()
