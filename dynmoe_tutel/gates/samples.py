"""Which rows are a sample of a batch: spread over it, and in step with no sequence length."""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 2654435769  # 2^32 / the golden ratio: places that differ the most from those before


def sampled_rows(rows: int, most: int, device: torch.device) -> Tensor:
    """At most `most` of `rows` row numbers, rising, one from each of as many equal stretches, [min(rows, most)] int64.

    The place in the stretch is another in each, by the golden ratio. Rows at an even stride would be the first tokens
    of their sequences alone, wherever a stride is a multiple of the sequences' length.
    """
    taken = min(rows, most)
    stretch = torch.arange(taken, device=device)
    place = (stretch * GOLDEN % 2**32 * rows) >> 32  # of 0 to rows - 1
    return (stretch * rows + place) // max(taken, 1)
