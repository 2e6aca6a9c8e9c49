"""Triton's dispatch, combine and row gates against the torch operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import relative_rms
from torch import Tensor

from dynmoe_tutel.kernels import Index, dispatch_combine, pack_bits, ragged_index
from dynmoe_tutel.kernels.gpu import dispatch_combine as gpu

SHAPES = [  # T, E, D, density
    (7, 5, 16, 0.4),
    (65, 3, 97, 0.7),
    (20, 66, 33, 0.1),
    (5, 4, 2500, 0.6),
    (40, 6, 1, 0.5),
    (9, 4, 16, 0.0),
    (0, 4, 16, 0.5),
]
HALF = [torch.bfloat16, torch.float16]


class Batch:
    """An assignment, its index on the device and on the CPU, and random values."""

    def __init__(self, T: int, E: int, D: int, density: float, device: str, spare: int | None = None) -> None:
        self.generator = torch.Generator().manual_seed(T + E + D)
        assigned = torch.rand(T, E, generator=self.generator) < density
        self.A = int(assigned.sum())
        self.index = Index(*ragged_index(pack_bits(assigned), E, -1 if spare is None else self.A + spare))
        self.R, self.device = self.index.rows, device
        self.unrouted_T = torch.rand(T, generator=self.generator) < 0.3

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def on(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.to(self.device) for t in tensors)

    @property
    def index_on_device(self) -> Index:
        return Index(*self.on(*self.index))


@pytest.mark.parametrize("spare", [None, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_to_rows(shape: tuple, spare: int | None, device: str, poisoned: None) -> None:
    T, _, D, _ = shape
    batch = Batch(*shape, device, spare)
    x = batch.draw(T, D)
    _, *index = batch.index
    found = gpu.dispatch(*batch.on(x, *index))
    assert found.shape == (batch.R, D)
    assert torch.equal(found[: batch.A].cpu(), dispatch_combine.dispatch(x, *index)[: batch.A])
    assert found[batch.A :].isnan().all()  # not written: there is no token to read
    for mean in (False, True):
        found = gpu.combine_backward(*batch.on(x, *index[:2]), mean)
        expected = dispatch_combine.combine_backward(x, *index[:2], mean)
        assert relative_rms(found[: batch.A], expected[: batch.A]) < 1e-7


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("spare", [None, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_to_tokens(
    shape: tuple, spare: int | None, dtype: torch.dtype, mean: bool, device: str, poisoned: None
) -> None:
    batch = Batch(*shape, device, spare)
    values = batch.draw(batch.R, shape[2]).to(dtype)
    _, *index = batch.index
    expected = dispatch_combine.combine(values.double(), *index, mean)
    values[batch.A :] = float("nan")  # not read
    found = gpu.combine(*batch.on(values, *index), mean)
    assert found.dtype == dtype
    assert relative_rms(found, expected) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert torch.equal(found, gpu.combine(*batch.on(values, *index), mean))
    total = gpu.segment_sum(*batch.on(values, index[0], index[2]))
    assert total.dtype == torch.float32
    if not mean:
        assert relative_rms(total, expected) < 1e-6


def wide(t: Tensor) -> Tensor:
    """The same values as columns of a wider matrix of NaN."""
    around = t.new_full((t.shape[0], t.shape[1] + 3), float("nan"))
    around[:, 2:-1] = t
    return around[:, 2:-1]


@pytest.mark.parametrize("strided", [wide, lambda t: t.t().contiguous().t()], ids=["some columns", "transposed"])
def test_strides(strided: Callable[[Tensor], Tensor], device: str) -> None:
    batch = Batch(20, 4, 24, 0.5, device)
    (x, values, gates), index = batch.on(batch.draw(20, 24), batch.draw(batch.R, 24), batch.draw(20, 4)), batch.index
    _, *index = batch.on(*index)
    assert not strided(x).is_contiguous()
    assert torch.equal(gpu.dispatch(strided(x), *index), gpu.dispatch(x, *index))
    assert torch.equal(gpu.combine(strided(values), *index, True), gpu.combine(values, *index, True))
    assert torch.equal(gpu.combine_backward(strided(x), *index[:2], True), gpu.combine_backward(x, *index[:2], True))
    d_gate, unrouted = values[:, 0].contiguous(), batch.on(batch.unrouted_T)[0]
    thin = unrouted.repeat_interleave(2)[::2]
    index = batch.index_on_device
    assert torch.equal(
        gpu.row_gates(strided(gates), None, unrouted, index, False),
        gpu.row_gates(gates, None, unrouted, index, False),
    )
    assert torch.equal(
        gpu.row_gates_backward(values[:, 0], thin, index, True, True),
        gpu.row_gates_backward(d_gate, unrouted, index, True, True),
    )


@pytest.mark.parametrize("spare", [None, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_values(shape: tuple, spare: int | None, device: str, poisoned: None) -> None:
    T, E, _, _ = shape
    batch = Batch(*shape, device, spare)
    value, unrouted = batch.draw(T, E), batch.unrouted_T
    thresholds = torch.zeros(E)
    for threshold in (None, thresholds):
        expected = dispatch_combine.row_gates(value, threshold, unrouted, batch.index, False)
        on_device = None if threshold is None else threshold.to(device)
        found = gpu.row_gates(value.to(device), on_device, *batch.on(unrouted), batch.index_on_device, False)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(("straight_through", "centred"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("spare", [None, 5])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 40, 3, 0.9)], ids=str)  # the last: a token has more rows than a tile
def test_gate_gradients(
    shape: tuple, spare: int | None, straight_through: bool, centred: bool, device: str, poisoned: None
) -> None:
    batch = Batch(*shape, device, spare)
    d_gate = batch.draw(batch.R)
    expected = dispatch_combine.row_gates_backward(
        d_gate.double(), batch.unrouted_T, batch.index, straight_through, centred
    )
    d_gate[batch.A :] = float("nan")  # not read
    found = gpu.row_gates_backward(
        *batch.on(d_gate, batch.unrouted_T), batch.index_on_device, straight_through, centred
    )
    assert found.shape == (shape[0], shape[1])
    assert relative_rms(found, expected) < 1e-6


def test_few_programs_walk_all_rows(device: str, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with many rows: there are more blocks than programs."""
    batch = Batch(20, 4, 2500, 0.6, device, 9)
    x, value = batch.draw(20, 2500), batch.draw(20, 4)
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    monkeypatch.setattr(gpu, "GATE_ROWS", 4)
    monkeypatch.setattr(gpu.tiles, "processors", lambda device: 2)
    _, *index = batch.index
    assert torch.equal(
        gpu.dispatch(*batch.on(x, *index))[: batch.A].cpu(), dispatch_combine.dispatch(x, *index)[: batch.A]
    )
    found = gpu.row_gates(value.to(device), None, *batch.on(batch.unrouted_T), batch.index_on_device, False)
    assert torch.equal(found.cpu(), dispatch_combine.row_gates(value, None, batch.unrouted_T, batch.index, False))
