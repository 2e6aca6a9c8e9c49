"""Triton's index and its choice of dropped assignments against the torch operations: equal, not close."""

from __future__ import annotations

import pytest
import torch
from helpers import HAS_GPU
from torch import Tensor

from dynmoe_tutel.kernels import bound_assignments, pack_bits, ragged_index
from dynmoe_tutel.kernels.gpu import ragged_index as gpu
from dynmoe_tutel.kernels.ragged_index import count_blocks

SHAPES = [  # T, E, density
    (1, 1, 1.0),
    (7, 5, 0.4),
    (65, 63, 0.1),
    (130, 64, 0.05),
    (33, 65, 1.0),
    (300, 8, 0.3),
    (20, 200, 0.02),
    (17, 512, 0.01),
    (40, 6, 0.0),
    (0, 6, 0.5),
]
NAMES = ("expert_offsets", "token_offsets", "token_of_row", "row_of_assignment")


def assignment(T: int, E: int, density: float) -> Tensor:
    return torch.rand(T, E, generator=torch.Generator().manual_seed(T + E)) < density


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("spare", [None, 0, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_torch_operation(
    shape: tuple[int, int, float], spare: int | None, counted: bool, device: str, poisoned: None
) -> None:
    _T, E, _ = shape
    assigned = assignment(*shape)
    capacity = -1 if spare is None else int(assigned.sum()) + spare
    bits, counts = pack_bits(assigned).to(device), count_blocks(assigned).to(device) if counted else None
    found = gpu.ragged_index(bits, E, capacity, counts)
    for name, f, e in zip(NAMES, found, ragged_index(pack_bits(assigned), E, capacity), strict=True):
        assert f.dtype == torch.int32
        assert torch.equal(f.cpu(), e), name


def test_full_capacity_is_filled_behind_the_last_row(device: str, poisoned: None) -> None:
    assigned = assignment(70, 5, 0.3)
    _, _, token_of_row, row_of_assignment = gpu.ragged_index(pack_bits(assigned).to(device), 5, 350)
    A = int(assigned.sum())
    assert A < 350
    for array in (token_of_row, row_of_assignment):
        assert array.shape == (350,)
        assert (array[A:] == -1).all()
        assert (array[:A] >= 0).all()


def test_a_capacity_that_is_too_small_writes_nothing_beyond_it(device: str) -> None:
    assigned = assignment(70, 5, 0.6)
    _, _, token_of_row, _ = gpu.ragged_index(pack_bits(assigned).to(device), 5, 20)
    exact = ragged_index(pack_bits(assigned), 5)
    assert torch.equal(token_of_row.cpu(), exact[2][:20])


def drop(assigned: Tensor, margin: Tensor, capacity: int, device: str) -> None:
    """The kept bits and the number dropped equal the torch operation's."""
    bits = pack_bits(assigned)
    kept, dropped = gpu.bound_assignments(bits.to(device), margin.to(device), capacity)
    expected, number = bound_assignments(bits, margin, capacity)
    assert torch.equal(kept.cpu(), expected)
    assert int(dropped) == int(number)
    assert dropped.dtype == torch.int64
    assert dropped.shape == ()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_smallest_margins_go(shape: tuple[int, int, float], share: float, device: str, poisoned: None) -> None:
    T, E, _ = shape
    assigned = assignment(*shape)
    margin = torch.randn(T, E, generator=torch.Generator().manual_seed(1))
    drop(assigned, margin, int(share * int(assigned.sum())), device)


@pytest.mark.parametrize("capacity", [0, 1, 50, 77])
def test_of_equal_margins_the_later_go(capacity: int, device: str) -> None:
    assigned = assignment(90, 5, 0.4)
    margin = torch.randint(-2, 3, (90, 5), generator=torch.Generator().manual_seed(2)).float() / 4
    margin[::3] = -0.0
    drop(assigned, margin, capacity, device)
    drop(assigned, torch.zeros(90, 5), capacity, device)


def test_infinite_margins_go_last(device: str) -> None:
    assigned = assignment(90, 5, 0.4)
    margin = torch.randn(90, 5, generator=torch.Generator().manual_seed(3))
    margin[::2] = torch.inf
    drop(assigned, margin, 60, device)


def test_strided_margins(device: str) -> None:
    assigned = assignment(65, 9, 0.4)
    margin = torch.randn(9, 65, generator=torch.Generator().manual_seed(4)).t()
    drop(assigned, margin, 100, device)


@pytest.mark.parametrize("capacity", [0, 1, 20, 60])
def test_a_capacity_that_is_too_small_leads_nowhere_behind_it(capacity: int, device: str, poisoned: None) -> None:
    """Refusing would mean waiting, so it cuts off. Regression: it stored and followed offsets and rows beyond it."""
    assigned = assignment(70, 5, 0.6)
    index = gpu.ragged_index(pack_bits(assigned).to(device), 5, capacity)
    assert int(assigned.sum()) > 60
    for offsets in index[:2]:
        assert int(offsets[-1]) == capacity
        assert int(offsets.max()) <= capacity
        assert (offsets.diff() >= 0).all()
    assert index[3].shape == (capacity,)
    assert ((index[3] >= 0) & (index[3] < capacity)).all()


@pytest.mark.parametrize("E", [513, 2049])
def test_more_experts_than_a_tile_holds(E: int, device: str, poisoned: None) -> None:
    """Regression: the gate's tile had too few tokens to compile, the selection's tile had none."""
    assigned = assignment(9, E, 0.1)
    A = int(assigned.sum())
    for capacity in (-1, A + 3):
        found = gpu.ragged_index(pack_bits(assigned).to(device), E, capacity)
        for f, e in zip(found, ragged_index(pack_bits(assigned), E, capacity), strict=True):
            assert torch.equal(f.cpu(), e)
    drop(assigned, torch.randn(9, E, generator=torch.Generator().manual_seed(0)), A // 2, device)


@pytest.mark.parametrize("capacity", [0, 3, 40, 80])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_nan_is_the_largest_margin(share: float, capacity: int, device: str) -> None:
    """NaN equals every other NaN and is above +inf. Regression: with a NaN limit the CPU dropped nothing."""
    assigned = assignment(90, 5, 0.4)
    generator = torch.Generator().manual_seed(5)
    margin = torch.randn(90, 5, generator=generator)
    margin[::7] = torch.inf
    margin[torch.rand(90, 5, generator=generator) < share] = torch.nan
    margin[::2] = -margin[::2]  # 0 * inf is a negative NaN on a CPU
    drop(assigned, margin, capacity, device)


@pytest.mark.skipif(HAS_GPU, reason="a GPU takes many tokens, in tests/gpu")
@pytest.mark.parametrize("chunks", [2, 8])
def test_many_blocks(chunks: int, device: str, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with 8,192 tokens or more: several runs of blocks, several steps per run, a tail for several programs."""
    monkeypatch.setattr(gpu, "FEW_COUNTS", 0)
    monkeypatch.setattr(gpu, "SCAN_BLOCKS", 2)
    monkeypatch.setattr(gpu, "MOST_CHUNKS", chunks)
    monkeypatch.setattr(gpu, "TAIL", 4)
    assigned = assignment(64 * 6 + 1, 5, 0.3)
    bits, A = pack_bits(assigned), int(assigned.sum())
    for capacity in (-1, A + 100):
        found = gpu.ragged_index(bits.to(device), 5, capacity)
        for name, f, e in zip(NAMES, found, ragged_index(bits, 5, capacity), strict=True):
            assert torch.equal(f.cpu(), e), name


@pytest.mark.skipif(HAS_GPU, reason="a GPU takes many tokens, in tests/gpu")
def test_few_blocks_are_added_up_without_a_scan(device: str, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several steps, as with more than 2,048 blocks times experts."""
    monkeypatch.setattr(gpu, "MOST_CHUNKS", 2)
    monkeypatch.setattr(gpu, "FILL_COUNTS", 16)
    assigned = assignment(64 * 6 + 1, 5, 0.3)
    bits, A = pack_bits(assigned), int(assigned.sum())
    for capacity in (-1, A + 100):
        found = gpu.ragged_index(bits.to(device), 5, capacity)
        for name, f, e in zip(NAMES, found, ragged_index(bits, 5, capacity), strict=True):
            assert torch.equal(f.cpu(), e), name


@pytest.mark.skipif(HAS_GPU, reason="a GPU takes many tokens, in tests/gpu")
@pytest.mark.parametrize(("programs", "elements"), [(2, 2048), (128, 64)], ids=["several tiles each", "many programs"])
@pytest.mark.parametrize("equal", [False, True])
def test_the_choice_among_many_tokens(
    equal: bool, programs: int, elements: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4,096 tokens or more a program has several tiles; summing over 16 programs takes several steps."""
    monkeypatch.setattr(gpu, "SELECT_PROGRAMS", programs)
    monkeypatch.setattr(gpu, "SELECT_ELEMENTS", elements)
    T = 20 if elements == 64 else 150
    assigned, generator = assignment(T, 5, 0.4), torch.Generator().manual_seed(6)
    margin = torch.randn(T, 5, generator=generator)
    if equal:
        margin = margin.round()
    drop(assigned, margin, int(0.4 * int(assigned.sum())), device)


def test_bits_behind_the_last_expert_are_not_read(device: str) -> None:
    assigned = assignment(70, 5, 0.4)
    bits, margin = pack_bits(assigned), torch.randn(70, 5, generator=torch.Generator().manual_seed(7))
    more = bits | (-1 << 5)
    for operation, *given in ((gpu.ragged_index, 5), (gpu.bound_assignments, margin.to(device), 40)):
        for one, other in zip(operation(bits.to(device), *given), operation(more.to(device), *given), strict=True):
            assert torch.equal(one, other)


def test_strided_bits(device: str) -> None:
    bits, margin = pack_bits(assignment(20, 70, 0.1)).to(device), torch.rand(20, 70, device=device)
    strided = bits.t().contiguous().t()
    assert not strided.is_contiguous()
    for operation, *given in ((gpu.ragged_index, 70), (gpu.bound_assignments, margin, 40)):
        for one, other in zip(operation(bits, *given), operation(strided, *given), strict=True):
            assert torch.equal(one, other)
