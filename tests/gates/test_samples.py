"""Rows that are a sample of a batch."""

from __future__ import annotations

import pytest
import torch

from dynmoe_tutel.gates.samples import sampled_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [0, 1, 5, 255, 256, 257, 1000, 32768, 10**8])
def test_one_row_of_each_stretch(rows: int) -> None:
    """By the definition: row i lies in [i rows / n, (i + 1) rows / n); all rows where there are few."""
    chosen = sampled_rows(rows, 256, CPU)
    n = min(rows, 256)
    assert chosen.shape == (n,)
    stretch = torch.arange(n)
    assert (chosen >= stretch * rows // max(n, 1)).all()
    assert (chosen * n < (stretch + 1) * rows).all()
    if rows <= 256:
        assert torch.equal(chosen, stretch)


@pytest.mark.parametrize(("sequences", "length"), [(256, 128), (128, 16), (80, 9), (512, 512), (1024, 4)])
def test_every_part_of_the_sequences(sequences: int, length: int) -> None:
    """At an even stride of 256 rows of 256 * 128, all would be first tokens."""
    parts = min(length, 4)
    place = sampled_rows(sequences * length, 256, CPU) % length * parts // length
    rows = torch.arange(sequences * length) % length * parts // length
    share, expected = (torch.bincount(p, minlength=parts) / len(p) for p in (place, rows))
    assert (share - expected).abs().max() < 0.05
