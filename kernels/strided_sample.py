"""A sample of rows at an even stride, kept in a buffer of fixed size: for clustering the unrouted tokens of a window.

Every s-th row of all that were seen is kept; when they become too many, every other one goes and s doubles. No random
number is drawn, and the result does not depend on how the rows came in batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZE, STRIDE, SEEN = range(3)  # entries of `state`


@torch.library.custom_op("dynmoe_tutel::keep_strided", mutates_args=("sample_ND", "state"))
def keep_strided(sample_ND: Tensor, state: Tensor, x_TD: Tensor, chosen_T: Tensor) -> None:
    """Add the rows of x_TD where chosen_T to sample_ND [N, D]; `state` [3] int64 is (size, stride, seen)."""
    size, stride, seen = state.tolist()
    rows = x_TD[chosen_T].to(sample_ND.dtype)
    place = torch.arange(seen, seen + rows.shape[0], device=rows.device)
    kept, stride = thinned(torch.cat([sample_ND[:size], rows[place % stride == 0]]), stride, sample_ND.shape[0])
    sample_ND[: kept.shape[0]] = kept
    state.copy_(torch.tensor([kept.shape[0], stride, seen + rows.shape[0]]))


@keep_strided.register_fake
def _(sample_ND: Tensor, state: Tensor, x_TD: Tensor, chosen_T: Tensor) -> None:
    return None


def thinned(rows_ND: Tensor, stride: int, most: int) -> tuple[Tensor, int]:
    """Every other row dropped and the stride doubled, until at most `most` are left."""
    if most < 1:
        return rows_ND[:0], stride
    while rows_ND.shape[0] > most:
        rows_ND, stride = rows_ND[::2], stride * 2
    return rows_ND, stride
