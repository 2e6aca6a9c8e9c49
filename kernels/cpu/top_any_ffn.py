"""`..top_any_ffn` on a CPU.

Rows of a block are added to their tokens right after their product, so no array of all rows is made but h and u for the
backward. The router's gradient follows the assignments, where torch's operations go over all tokens and experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..norms import scaled, scaled_rows
from ..operands import ExpertWeights, Index, Router
from ..top_any_ffn import threshold_gradients
from . import loops
from .experts import Experts, add_rows, backward, bias, blocks_of, gather, inverse_k, products, takes, with_torch
from .threads import array, parts, run


def top_any_ffn(
    x_TD: Tensor, router: Router, index: Index, weights: ExpertWeights, activation: str, centred: bool,
    dtype: torch.dtype, save: bool, engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not takes(x_TD, weights, dtype):
        return with_torch("top_any_ffn", x_TD, router, index, weights, activation, centred, dtype, save)
    x_TD = x_TD.to(dtype)
    experts = Experts(x_TD, index, weights, activation)
    O, room = weights.w2_EHO.shape[2], experts.room
    h_AH, u_AH = weights.pre_activations(x_TD, index.rows if save else 0)
    y_TO = x_TD.new_zeros((x_TD.shape[0], O), dtype=torch.float32)
    scale, b2 = inverse_k(index), bias(weights.b2_EO)
    xs, a_s, ys = room(experts.D), room(experts.H), room(O)
    for block in blocks_of(index, experts.H):
        n = len(block.tokens)
        x, a, y = xs[:n], a_s[:n], ys[:n]
        gather(x_TD, index.token_of_row[block.rows], x)
        experts.hidden(block, x, *experts.pre_activations(block, h_AH, u_AH), a)
        products(a, experts.w2, block, y)
        add_rows(block, y, scale, b2, y_TO)
    return y_TO.to(dtype), h_AH, u_AH


def top_any_ffn_backward(
    d_y_TO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, router: Router, index: Index, weights: ExpertWeights,
    activation: str, centred: bool, dtype: torch.dtype, wanted: bool, engine: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    _, _, factor_T = scaled_rows(router.inv_norm_T.unsqueeze(1), router.inv_norm_T)
    # with a factor, tokens must be scaled, or are not finite
    if not (factor_T is None and takes(x_TD, weights, dtype)):
        options = (activation, centred, dtype, wanted)
        return with_torch("top_any_ffn_backward", d_y_TO, h_AH, u_AH, x_TD, router, index, weights, *options)
    experts = Experts(x_TD.to(dtype), index, weights, activation)
    rows = (d_y_TO.to(dtype), array(index.token_of_row), inverse_k(index))
    d_x_TD, d_gate_A, grads = backward(experts, h_AH, u_AH, index, *rows, None, wanted)

    T, E = router.score_TE.shape
    unit_ED, inv_norm_E = _unit_vectors(router.w_DE)
    number = parts(T, 4 * x_TD.shape[1])
    d_unit = unit_ED.new_zeros((number, *unit_ED.shape))
    d_threshold = unit_ED.new_zeros((number, E), dtype=torch.float64)  # one by one, as the sums for biases
    expert_E = torch.arange(E, dtype=torch.int32, device=x_TD.device)
    expert_of_row = expert_E.repeat_interleave(index.expert_offsets.diff())
    tau = 1.0 if router.scale is None else router.scale.item()
    run(
        loops.token_gradients, T, number, *map(array, (index.token_offsets, index.row_of_assignment, expert_of_row)),
        array(d_gate_A), array(router.unrouted_T), centred, array(router.score_TE), array(x_TD.contiguous()),
        array(unit_ED), array(router.inv_norm_T), np.float32(tau), array(d_x_TD), array(d_unit),
        array(d_threshold),
    )  # fmt: skip
    d_unit_ED = d_unit.sum(dim=0)
    radial_E = torch.linalg.vecdot(unit_ED, d_unit_ED)
    d_w_ED = (d_unit_ED - unit_ED * radial_E.unsqueeze(1)) * inv_norm_E.unsqueeze(1)
    d_thresholds_E, d_scale = threshold_gradients(d_threshold.sum(dim=0), router)
    if router.scale is not None:
        d_scale = (radial_E.sum() / tau).to(router.scale.dtype) + d_scale
    d_w_DE = d_w_ED.t().to(router.w_DE.dtype).contiguous()
    return d_x_TD.to(x_TD.dtype), d_w_DE, d_thresholds_E, d_scale, *grads


def _unit_vectors(w_DE: Tensor) -> tuple[Tensor, Tensor]:
    """Unit routing vectors [E, D] and 1 / ||w||; both 0 if that is 0 or not finite, as in an inactive slot."""
    vectors = scaled(w_DE.to(torch.float32), 0)
    inverse_E = vectors.inverse()
    inv_norm_E = vectors.own(inverse_E)
    unit_DE = (vectors.vectors * inverse_E).masked_fill_(inv_norm_E.isnan(), 0)
    return unit_DE.t().contiguous(), inv_norm_E.nan_to_num(0)
