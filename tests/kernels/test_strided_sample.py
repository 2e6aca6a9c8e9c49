"""The sample at an even stride: the kept rows do not depend on the batches; the operation that keeps them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmoe_tutel.kernels import keep_strided, thinned


def empty(most: int, D: int = 3) -> tuple[Tensor, Tensor]:
    """A buffer for `most` rows and its state (size, stride, seen)."""
    return torch.zeros(most + 1, D), torch.tensor([0, 1, 0])


def naive_sample(rows_ND: Tensor, most: int) -> tuple[Tensor, int]:
    """Every s-th row, with the smallest power of two s that leaves at most `most`."""
    stride = 1
    while -(-len(rows_ND) // stride) > most:
        stride *= 2
    return rows_ND[::stride], stride


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 16), st.floats(0, 1), st.integers(0, 10**6))
def test_every_s_th_chosen_row(sizes: list[int], most: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(sum(sizes), 3, generator=generator)
    chosen_T = torch.rand(len(x_TD), generator=generator) < density
    sample_ND, state = empty(most)
    for x, chosen in zip(x_TD.split(sizes), chosen_T.split(sizes), strict=True) if sizes else ():
        keep_strided(sample_ND, state, x, chosen)
    expected_ND, stride = naive_sample(x_TD[chosen_T], most)
    size = len(expected_ND)
    assert state.tolist() == [size, stride, int(chosen_T.sum())]
    assert torch.equal(sample_ND[:size], expected_ND)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tokens_of_any_dtype_and_strides(dtype: torch.dtype) -> None:
    sample_ND, state = empty(5)
    x_TD = torch.randn(6, 8).to(dtype).t()[:, ::2]
    keep_strided(sample_ND, state, x_TD, torch.ones(8, dtype=torch.bool))
    assert torch.equal(sample_ND[:4], x_TD[::2].float())


@pytest.mark.parametrize("T", [0, 7])
def test_opcheck(T: int) -> None:
    torch.library.opcheck(keep_strided, (*empty(4), torch.randn(T, 3), torch.arange(T) % 2 == 0))


@pytest.mark.parametrize(("rows", "most", "kept"), [(0, 3, []), (3, 3, [0, 1, 2]), (4, 3, [0, 2]), (9, 2, [0, 8])])
def test_thinned(rows: int, most: int, kept: list[int]) -> None:
    rows_ND, stride = thinned(torch.arange(rows).unsqueeze(1), 1, most)
    assert rows_ND.squeeze(1).tolist() == kept
    assert [r * stride for r in range(len(kept))] == kept
