"""Quantiles from histograms: counts are integers, so sums over ranks are exact and nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 1000

Bound = float | Tensor  # [], on the device of the values


def histograms(values_TE: Tensor, low: Bound, high: Bound, token_mask: Tensor | None = None) -> Tensor:
    """Counts of each column in BINS equal bins from `low` to `high`, [E * BINS] int64; the ends take what is beyond.

    NaN is not counted, and rows where `token_mask` [T] is False are left out.
    """
    E = values_TE.shape[1]
    counted_TE = ~values_TE.isnan()
    if token_mask is not None:
        counted_TE &= token_mask.unsqueeze(1)
    place_TE = ((values_TE - low) / (high - low) * BINS).nan_to_num(0.0).clamp(0, BINS - 1).long()
    place_TE = place_TE + BINS * torch.arange(E, device=values_TE.device)
    return place_TE.new_zeros(E * BINS).index_add_(0, place_TE.flatten(), counted_TE.flatten().long())


def seen(counts: Tensor) -> Tensor:
    """Whether each column of `histograms` counted a value, [E] bool."""
    return counts.view(-1, BINS).any(dim=1)


def quantiles(counts: Tensor, share: float, low: Bound, high: Bound) -> Tensor:
    """For each column of `histograms`, the value with `share` of the counts below it, [E] fp64; linear in a bin."""
    counts_EB = counts.view(-1, BINS)
    upto_EB = counts_EB.cumsum(dim=1)
    wanted_E1 = upto_EB[:, -1:].double() * share
    bin_E1 = (upto_EB < wanted_E1).sum(dim=1, keepdim=True).clamp(max=BINS - 1)
    here_E1 = counts_EB.gather(1, bin_E1)
    before_E1 = upto_EB.gather(1, bin_E1) - here_E1
    part_E1 = ((wanted_E1 - before_E1) / here_E1.clamp(min=1)).clamp(0, 1)
    return low + ((bin_E1 + part_E1) / BINS).squeeze(1) * (high - low)
