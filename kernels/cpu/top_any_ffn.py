"""`..top_any_ffn` on a CPU: torch's products, and one compiled pass before or after each.

Rows of a block are added to their tokens right after their product, so no array of all rows is made but h and u for the
backward. The router's gradient follows the assignments, where torch's operations go over all tokens and experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..grouped_ffn import Segment, block_rows, blocks, unbind, zeroed_where_silent
from ..norms import scaled, scaled_rows
from ..operands import ExpertWeights, Index, Router
from ..operation import OPERATIONS
from ..top_any_ffn import threshold_gradients
from . import loops
from .threads import array, parts, run


class Block(NamedTuple):
    """Rows of whole experts, as a slice of all rows, with each expert's part of them."""

    rows: slice
    segments: list[Segment]
    table: np.ndarray  # [S, 3]: expert, first row, last row + 1, within the block
    tokens: np.ndarray  # of the rows


def _blocks(index: Index, width: int) -> Iterator[Block]:
    tokens = array(index.token_of_row)
    for rows, segments in blocks(index.expert_offsets, width):
        table = np.array([(e, part.start, part.stop) for e, _, part in segments])
        yield Block(rows, segments, table, tokens[rows])


def _takes(x_TD: Tensor, weights: ExpertWeights, dtype: torch.dtype) -> bool:
    """Whether all is fp32, and there is something to do."""
    tensors = [x_TD, *(w for w in weights if w is not None)]
    return dtype == torch.float32 and all(t.dtype == dtype and t.numel() > 0 for t in tensors)


def _with_torch(name: str, *args: Any) -> Any:
    return OPERATIONS[name].engines["torch"](*args, "torch")


class _Rows:
    """Memory for the rows of one block at a time."""

    def __init__(self, index: Index, width: int, like: Tensor) -> None:
        self.most = max((rows.stop - rows.start for rows, _ in blocks(index.expert_offsets, width)), default=0)
        self.like = like

    def __call__(self, columns: int) -> Tensor:
        return self.like.new_empty((self.most, columns))


def _add_rows(block: Block, rows: Tensor, scale: np.ndarray, bias: np.ndarray, sums_TD: Tensor) -> None:
    """Add (row + bias of its expert) * scale of the token to the row's token."""
    columns = sums_TD.shape[1]
    number = parts(columns, len(block.tokens))
    run(loops.add_rows, columns, number, block.tokens, array(rows), scale, block.table, bias, array(sums_TD))


def _inverse_k(index: Index) -> np.ndarray:
    """1 / max(k_t, 1), [T]."""
    return array(index.token_offsets.diff().clamp_(min=1).to(torch.float32).reciprocal_())


def _bias(b: Tensor | None) -> np.ndarray:
    return array(None if b is None else b.contiguous(), 2)


def top_any_ffn(
    x_TD: Tensor, router: Router, index: Index, weights: ExpertWeights, activation: str, centred: bool,
    dtype: torch.dtype, save: bool, engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not _takes(x_TD, weights, dtype):
        return _with_torch("top_any_ffn", x_TD, router, index, weights, activation, centred, dtype, save)
    E, _, H = weights.w1_EDH.shape
    code, b1, b3, b2 = loops.ACTIVATIONS.index(activation), *map(_bias, (weights.b1_EH, weights.b3_EH, weights.b2_EO))
    w1, _, w3, _, w2, _ = (unbind(w, E) for w in weights)
    h_AH, u_AH = weights.pre_activations(x_TD, index.rows if save else 0)
    O = weights.w2_EHO.shape[2]
    y_TO = x_TD.new_zeros((x_TD.shape[0], O))
    scale, room = _inverse_k(index), _Rows(index, H, x_TD)
    xs, a_s, ys = room(x_TD.shape[1]), room(H), room(O)
    for block in _blocks(index, H):
        n, rows = len(block.tokens), block.rows
        x, a, y = xs[:n], a_s[:n], ys[:n]
        torch.index_select(x_TD, 0, index.token_of_row[rows], out=x)
        h, u = block_rows(h_AH, rows, x_TD, H), None
        _products(x, w1, block, h)
        if weights.w3_EDH is not None:
            u = block_rows(u_AH, rows, x_TD, H)
            _products(x, w3, block, u)
        run(loops.hidden_rows, n, parts(n, H), code, block.table, array(h), b1, array(u, 2), b3, array(a))
        _products(a, w2, block, y)
        _add_rows(block, y, scale, b2, y_TO)
    return y_TO, h_AH, u_AH


def _products(x: Tensor, w: tuple[Tensor, ...], block: Block, out: Tensor) -> None:
    """out = x @ w of each row's expert."""
    for e, _, part in block.segments:
        torch.mm(x[part], w[e], out=out[part])


class _Sums:
    """Sums of a bias's gradient over the rows of each expert in a block, in parts; nothing without a bias."""

    def __init__(self, d_b: Tensor, biased: bool, block: Block, number: int) -> None:
        self.d_b = d_b
        self.sums = torch.zeros((number, len(block.segments), d_b.shape[-1])) if biased else torch.zeros(0, 0, 0)

    def store(self, block: Block) -> None:
        """Write the sums to the experts' gradients."""
        if self.sums.numel():
            for (e, _, _), total in zip(block.segments, self.sums.sum(dim=0), strict=True):
                self.d_b[e].copy_(total)


def top_any_ffn_backward(
    d_y_TO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, router: Router, index: Index, weights: ExpertWeights,
    activation: str, centred: bool, dtype: torch.dtype, wanted: bool, engine: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    x, inverse_T, factor_T = scaled_rows(x_TD, router.inv_norm_T) if _takes(x_TD, weights, dtype) else (x_TD, None, 1)
    vectors = scaled(router.w_DE.to(torch.float32), 0)
    if inverse_T is None or factor_T is not None or not vectors.ordinary:
        options = (activation, centred, dtype, wanted)
        return _with_torch("top_any_ffn_backward", d_y_TO, h_AH, u_AH, x_TD, router, index, weights, *options)
    d_x_TD, d_gate_A, grads = _experts_backward(d_y_TO, h_AH, u_AH, x_TD, index, weights, activation, wanted)

    T, E = router.score_TE.shape
    inverse_E = vectors.inverse()
    unit_ED = (vectors.vectors * inverse_E).t().contiguous()
    number = parts(T, 4 * x.shape[1])
    d_unit, d_threshold = x.new_zeros((number, *unit_ED.shape)), x.new_zeros((number, E))
    expert_of_row = torch.arange(E, dtype=torch.int32).repeat_interleave(index.expert_offsets.diff())
    tau = router.scale.to(torch.float32)
    run(
        loops.token_gradients, T, number, *map(array, (index.token_offsets, index.row_of_assignment, expert_of_row)),
        array(d_gate_A), array(router.unrouted_T), centred, array(router.score_TE), array(x.contiguous()),
        array(unit_ED), array(inverse_T), np.float32(tau.item()), array(d_x_TD), array(d_unit), array(d_threshold),
    )  # fmt: skip
    d_unit_ED = d_unit.sum(dim=0)
    radial_E = torch.linalg.vecdot(unit_ED, d_unit_ED)
    d_w_ED = (d_unit_ED - unit_ED * radial_E.unsqueeze(1)) * inverse_E.unsqueeze(1)
    d_thresholds_E, d_scale = threshold_gradients(d_threshold.sum(dim=0), router)
    d_scale = (radial_E.sum() / tau).to(router.scale.dtype) + d_scale
    d_w_DE = d_w_ED.t().to(router.w_DE.dtype).contiguous()
    return d_x_TD, d_w_DE, d_thresholds_E, d_scale, *grads


def _experts_backward(
    d_y_TO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, index: Index, weights: ExpertWeights, activation: str,
    wanted: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of x [T, D] through the experts, of the gates [rows], and of the weights."""
    saved, code = h_AH.shape[0] == index.rows, loops.ACTIVATIONS.index(activation)
    E, D, H = weights.w1_EDH.shape
    gated = weights.w3_EDH is not None
    biased = [wanted and b is not None for b in (weights.b1_EH, weights.b3_EH, weights.b2_EO)]
    b1, b3, b2 = map(_bias, (weights.b1_EH, weights.b3_EH, weights.b2_EO))
    w1, _, w3, _, w2, _ = (unbind(w, E) for w in weights)
    grads = [zeroed_where_silent(w if wanted else None, index.expert_offsets) for w in weights]
    d_w1, d_b1, d_w3, d_b3, d_w2, d_b2 = grads
    d_x_TD, d_gate_A = x_TD.new_zeros(x_TD.shape), x_TD.new_empty((index.rows,))
    scale, d_gates, none = _inverse_k(index), array(d_gate_A), array(None)
    room = _Rows(index, H, x_TD)
    xs, a_s, d_as, d_rows = room(D), room(H), room(H), room(d_y_TO.shape[1])
    d_us = room(H) if gated else None
    for block in _blocks(index, H):
        n, rows, table = len(block.tokens), block.rows, block.table
        x, a, d_a, d_row = xs[:n], a_s[:n], d_as[:n], d_rows[:n]
        h, u, d_u = block_rows(h_AH, rows, x_TD, H), None, None
        if gated:
            u, d_u = block_rows(u_AH, rows, x_TD, H), d_us[:n]  # type: ignore[index]
        if wanted or not saved:
            torch.index_select(x_TD, 0, index.token_of_row[rows], out=x)
        if not saved:
            _products(x, w1, block, h)
            if u is not None:
                _products(x, w3, block, u)
            run(loops.hidden_rows, n, parts(n, H), code, table, array(h), b1, array(u, 2), b3, array(a))
        number = parts(n, H)
        of_b1, of_b3, of_b2 = (
            _Sums(d_b, there, block, number) for d_b, there in zip((d_b1, d_b3, d_b2), biased, strict=True)
        )
        run(
            loops.row_gradients, n, number, block.tokens, array(d_y_TO), scale, table, b2, array(d_row), d_gates[rows],
            array(of_b2.sums),
        )  # fmt: skip
        _products(d_row, tuple(w.t() for w in w2), block, d_a)
        run(
            loops.hidden_gradients, n, number, code, table, array(h), array(u, 2), array(a), array(d_a), none,
            d_gates[rows], array(d_u, 2), array(of_b1.sums), array(of_b3.sums),
        )  # fmt: skip
        if wanted:
            for e, _, part in block.segments:
                torch.mm(a[part].t(), d_row[part], out=d_w2[e])
                torch.mm(x[part].t(), d_a[part], out=d_w1[e])
                if d_u is not None:
                    torch.mm(x[part].t(), d_u[part], out=d_w3[e])
            for sums in (of_b1, of_b3, of_b2):
                sums.store(block)
        d_x = x
        _products(d_a, tuple(w.t() for w in w1), block, d_x)
        if d_u is not None:
            for e, _, part in block.segments:
                d_x[part].addmm_(d_u[part], w3[e].t())
        _add_rows(block, d_x, none, array(None, 2), d_x_TD)
    return d_x_TD, d_gate_A, grads
