"""Histograms and their quantiles against sorted values."""

from __future__ import annotations

import pytest
import torch

from dynmoe_tutel.gates.histograms import BINS, histograms, quantiles, seen


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.93, 1.0])
def test_quantiles_are_within_a_bin(share: float) -> None:
    values_TE = torch.rand(5000, 3, generator=torch.Generator().manual_seed(0)) ** torch.tensor([1.0, 2.0, 0.5])
    found_E = quantiles(histograms(values_TE, 0.0, 1.0), share, 0.0, 1.0)
    assert torch.allclose(found_E, values_TE.double().quantile(share, dim=0), atol=1.5 / BINS)


def test_the_ends_take_what_is_beyond_and_nan_is_not_counted() -> None:
    values = torch.tensor([[-torch.inf], [-5.0], [torch.inf], [torch.nan]])
    counts = histograms(values, -1.0, 1.0)
    assert counts[0] == 2
    assert counts[-1] == 1
    assert counts.sum() == 3
    assert seen(histograms(torch.tensor([[0.5, torch.nan]]), -1.0, 1.0)).tolist() == [True, False]


def test_padding_is_left_out_and_no_value_is_no_error() -> None:
    mask = torch.tensor([True, False, True])
    counts = histograms(torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), 0.0, 1.0, mask)
    assert torch.equal(counts, histograms(torch.tensor([[0.1, 0.2], [0.5, 0.6]]), 0.0, 1.0))
    assert quantiles(histograms(torch.zeros(0, 2), 0.0, 1.0), 0.5, 0.0, 1.0).isfinite().all()
