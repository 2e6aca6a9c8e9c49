"""The decisions of `..threshold_gate` on a CPU in one compiled pass, for fp32 tokens of ordinary length."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..ragged_index import block_tokens, words
from . import decisions, loops
from .threads import array, parts, run


def decide(
    cos_TE: Tensor, inverse_T: Tensor, own_E: Tensor, limit_E: Tensor, active_E: Tensor, token_mask_T: Tensor | None,
    max_k: int, keeps_best: bool, fallback: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Bitmask, unrouted flags and block counts; `cos_TE` is multiplied by 1 / ||x||, `inverse_T`, in place.

    The thresholds are `own_E`, inf for inactive
    slots, and with the budget's shift `limit_E`, never NaN. `keeps_best`: there is a shift.
    """
    T, E = cos_TE.shape
    size = block_tokens(E)
    blocks = -(-T // size)
    bits_TW = cos_TE.new_empty((T, words(E)), dtype=torch.int64)
    unrouted_T = cos_TE.new_empty((T,), dtype=torch.bool)
    counts = cos_TE.new_zeros((blocks, E), dtype=torch.int32)
    mask = np.empty(0, np.bool_) if token_mask_T is None else array(token_mask_T.contiguous())
    run(
        decisions.decide, blocks, parts(blocks, 8 * size * E), size, array(cos_TE), array(inverse_T), array(own_E),
        array(limit_E), array(active_E.contiguous()), mask, max_k if max_k < E else 0, keeps_best, fallback,
        array(bits_TW), array(unrouted_T), array(counts),
    )  # fmt: skip
    return bits_TW, unrouted_T, counts.view(-1)


def sigmoid_(cos_TE: Tensor, scale: Tensor | None) -> Tensor:
    """sigmoid(scale * cos) in place."""
    n, tau = cos_TE.numel(), 1.0 if scale is None else scale.item()
    run(loops.scores, n, parts(n, 8), np.float32(tau), array(cos_TE.view(-1)))
    return cos_TE
