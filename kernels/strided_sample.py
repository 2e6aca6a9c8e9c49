"""A sample of rows at an even stride in a buffer of fixed size; used to cluster a window's unrouted tokens.

It keeps every s-th row that it has seen. When the buffer is full, it drops every other row and doubles s. It draws no
random numbers, the result does not depend on the batches, and the host never waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .operation import expect, expect_matrix, operation

SIZE, STRIDE, SEEN = range(3)  # entries of `state`


def _check(sample_ND: Tensor, state: Tensor, x_TD: Tensor, chosen_T: Tensor) -> None:
    expect_matrix("sample_ND", sample_ND, "[N + 1, D]")
    if sample_ND.shape[0] < 2:
        raise ValueError(f"sample_ND must have room for a row and a scratch row, got shape {list(sample_ND.shape)}")
    expect("state", state, (3,), "(size, stride, seen)", torch.int64)
    expect_matrix("x_TD", x_TD, "[T, D]")
    T = x_TD.shape[0]
    expect("x_TD", x_TD, (T, sample_ND.shape[1]), "[T, D], with the D of sample_ND,")
    expect("chosen_T", chosen_T, (T,), "[T]", torch.bool)


def _nothing(*_: Any) -> None:
    return None


@operation(check=_check, fake=_nothing, mutates=("sample_ND", "state"))
def keep_strided(sample_ND: Tensor, state: Tensor, x_TD: Tensor, chosen_T: Tensor) -> None:
    """Add the rows of x_TD where chosen_T to sample_ND [N + 1, D], whose last row is scratch; at most N are kept.

    `state` [3] int64, on the device, is (size, stride, seen). The i-th row seen is at i / stride if that is whole.
    """
    most = sample_ND.shape[0] - 1
    _, old, seen = state.unbind()
    total = seen + chosen_T.sum()
    strides = old << torch.arange(32, device=state.device)
    fits = (total + strides - 1) // strides <= most
    stride = strides[fits.int().argmax().reshape(1)].squeeze(0)
    place_N = torch.arange(most, device=state.device)
    sample_ND[:most] = sample_ND.index_select(0, (place_N * (stride // old)).clamp(max=most))
    index_T = seen + chosen_T.cumsum(0) - 1
    kept_T = chosen_T & (index_T % stride == 0)
    sample_ND.index_copy_(0, torch.where(kept_T, index_T // stride, most), x_TD.to(sample_ND.dtype))
    state.copy_(torch.stack([(total + stride - 1) // stride, stride, total]))


def thinned(rows_ND: Tensor, stride: int, most: int) -> tuple[Tensor, int]:
    """Drop every other row and double the stride until at most `most` rows are left."""
    if most < 1:
        return rows_ND[:0], stride
    while rows_ND.shape[0] > most:
        rows_ND, stride = rows_ND[::2], stride * 2
    return rows_ND, stride
