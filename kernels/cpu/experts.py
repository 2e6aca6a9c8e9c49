"""The expert networks on a CPU: torch's products, and one compiled pass before or after each, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..grouped_ffn import Segment, add_product, block_rows, blocks, gemm_dtype, linear, unbind, zeroed_where_silent
from ..operands import ExpertWeights, Index
from ..operation import OPERATIONS
from . import loops
from .threads import array, parts, run


class Block(NamedTuple):
    """Rows of whole experts, as a slice of all rows, with each expert's part of them."""

    rows: slice
    segments: list[Segment]
    table: np.ndarray  # [S, 3]: expert, first row, last row + 1, within the block
    tokens: np.ndarray  # of the rows


def blocks_of(index: Index, width: int) -> Iterator[Block]:
    tokens = array(index.token_of_row)
    for rows, segments in blocks(index.expert_offsets, width):
        table = np.array([(e, part.start, part.stop) for e, _, part in segments])
        yield Block(rows, segments, table, tokens[rows])


def takes(x_TD: Tensor, weights: ExpertWeights, dtype: torch.dtype) -> bool:
    """Whether all is fp32 or bf16, and there is something to do."""
    tensors = [x_TD, *(w for w in weights if w is not None)]
    known = (torch.float32, torch.bfloat16)
    return dtype in known and all(t.dtype in known and t.numel() > 0 for t in tensors)


def with_torch(name: str, *args: Any) -> Any:
    """The operation by the engine "torch"."""
    return OPERATIONS[name].engines["torch"](*args, "torch")


class Rows:
    """Memory for the rows of one block at a time."""

    def __init__(self, index: Index, width: int, dtype: torch.dtype) -> None:
        self.most = max((rows.stop - rows.start for rows, _ in blocks(index.expert_offsets, width)), default=0)
        self.like, self.dtype = index.token_of_row, dtype

    def __call__(self, columns: int) -> Tensor:
        return self.like.new_empty((self.most, columns), dtype=self.dtype)


def inverse_k(index: Index) -> np.ndarray:
    """1 / max(k_t, 1), [T]."""
    return array(index.token_offsets.diff().clamp_(min=1).to(torch.float32).reciprocal_())


def bias(b: Tensor | None) -> np.ndarray:
    return array(None if b is None else b.to(torch.float32).contiguous(), 2)


def gather(x_TD: Tensor, tokens: Tensor, out: Tensor) -> None:
    if x_TD.dtype == out.dtype:
        torch.index_select(x_TD, 0, tokens, out=out)
    else:
        out.copy_(x_TD.index_select(0, tokens))


def products(x: Tensor, w: Sequence[Tensor], block: Block, out: Tensor, b: Tensor | None = None) -> None:
    """out = x @ w + b of each row's expert."""
    for e, _, part in block.segments:
        linear(x[part], w[e], None if b is None else b[e], out[part])


def add_rows(block: Block, rows: Tensor, scale: np.ndarray, b: np.ndarray, sums_TD: Tensor) -> None:
    """Add (row + b of its expert) * scale of the token to the row's token."""
    columns = sums_TD.shape[1]
    number = parts(columns, len(block.tokens))
    run(loops.add_rows, columns, number, block.tokens, array(rows), scale, block.table, b, array(sums_TD))


class Experts:
    """The hidden rows of a block, in the forward and again in the backward."""

    def __init__(self, x_TD: Tensor, index: Index, weights: ExpertWeights, activation: str) -> None:
        self.x_TD, self.index, self.weights = x_TD, index, weights
        self.E, self.D, self.H = weights.w1_EDH.shape
        self.dtype = gemm_dtype(x_TD.dtype, "cpu")
        self.code = loops.ACTIVATIONS.index(activation)
        self.w1, _, self.w3, _, self.w2, _ = (unbind(w, self.E) for w in weights)
        # In fp32 a bias is added in the pass of the activation. In bf16 that would round twice: the product adds it.
        self.later = x_TD.dtype == torch.float32
        self.b1, self.b3 = (bias(b if self.later else None) for b in (weights.b1_EH, weights.b3_EH))
        self.room = Rows(index, self.H, self.dtype)

    def hidden(self, block: Block, x: Tensor, h: Tensor, u: Tensor | None, a: Tensor) -> None:
        """h, u and a of the block from its tokens' rows x."""
        b1, b3 = self.weights.b1_EH, self.weights.b3_EH
        products(x, self.w1, block, h, None if self.later else b1)
        if u is not None:
            products(x, self.w3, block, u, None if self.later else b3)
        n = len(block.tokens)
        rows = (array(h), self.b1, array(u if u is not None else h[:0], 2), self.b3, array(a))
        run(loops.hidden_rows, n, parts(n, self.H), self.code, block.table, *rows)

    def pre_activations(self, block: Block, h_AH: Tensor, u_AH: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block's rows of h and u, to write or as they were saved."""
        h = block_rows(h_AH, block.rows, self.x_TD, self.H)
        return h, block_rows(u_AH, block.rows, self.x_TD, self.H) if self.weights.w3_EDH is not None else None


class _Sums:
    """Sums of a bias's gradient over the rows of each expert in a block, in parts; nothing without a bias.

    In fp64: a loop adds row by row, and in fp32 the error would grow with the square root of the rows.
    """

    def __init__(self, d_b: Tensor, biased: bool, block: Block, number: int) -> None:
        self.d_b = d_b
        shape = (number, len(block.segments), d_b.shape[-1]) if biased else (0, 0, 0)
        self.sums = d_b.new_zeros(shape, dtype=torch.float64)

    def store(self, block: Block) -> None:
        """Write the sums to the experts' gradients."""
        if self.sums.numel():
            for (e, _, _), total in zip(block.segments, self.sums.sum(dim=0), strict=True):
                self.d_b[e].copy_(total)


def backward(
    experts: Experts, h_AH: Tensor, u_AH: Tensor, index: Index, d_out: Tensor, source_of_row: np.ndarray,
    scale: np.ndarray, gate_A: Tensor | None, wanted: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of x [T, D] fp32 through the experts, of the gates [rows], and of the weights.

    A row, before its gate, has the gradient d_out * scale of its source: of its token, or of the row itself.
    """
    x_TD, weights, D, H, room = experts.x_TD, experts.weights, experts.D, experts.H, experts.room
    saved, gated = h_AH.shape[0] == index.rows, weights.w3_EDH is not None
    biased = [wanted and b is not None for b in (weights.b1_EH, weights.b3_EH, weights.b2_EO)]
    grads = [zeroed_where_silent(w if wanted else None, index.expert_offsets) for w in weights]
    d_w1, d_b1, d_w3, d_b3, d_w2, d_b2 = grads
    d_x_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
    d_gate_A = x_TD.new_empty((index.rows,), dtype=torch.float32)
    gates = array(None if gate_A is None else gate_A.to(torch.float32).contiguous())
    b2, d_gates, none = bias(weights.b2_EO), array(d_gate_A), array(None)
    xs, a_s, d_as, d_rows, d_us = room(D), room(H), room(H), room(d_out.shape[1]), room(H if gated else 0)
    for block in blocks_of(index, H):
        n, rows, table = len(block.tokens), block.rows, block.table
        x, a, d_a, d_row, d_u = xs[:n], a_s[:n], d_as[:n], d_rows[:n], d_us[:n]
        h, u = experts.pre_activations(block, h_AH, u_AH)
        if wanted or not saved:
            gather(x_TD, index.token_of_row[rows], x)
        if not saved:
            experts.hidden(block, x, h, u, a)
        number, gate, d_gate = parts(n, H), gates[rows], d_gates[rows]
        sources = source_of_row[rows]
        of_b1, of_b3, of_b2 = (
            _Sums(d_b, there, block, number) for d_b, there in zip((d_b1, d_b3, d_b2), biased, strict=True)
        )
        sums = array(of_b2.sums if gate_A is None else of_b2.sums[:0])
        run(loops.row_gradients, n, number, sources, array(d_out), scale, table, b2, array(d_row), d_gate, sums)
        products(d_row, [w.t() for w in experts.w2], block, d_a)
        run(
            loops.hidden_gradients, n, number, experts.code, table, array(h), array(u if u is not None else h[:0], 2),
            array(a), array(d_a), gate, d_gate, array(d_u), array(of_b1.sums), array(of_b3.sums),
        )  # fmt: skip
        if wanted:
            if gate_A is not None:
                run(loops.gated_rows, n, number, table, gate, array(d_row), array(of_b2.sums))
            for e, _, part in block.segments:
                linear(a[part].t(), d_row[part], None, d_w2[e])
                linear(x[part].t(), d_a[part], None, d_w1[e])
                if gated:
                    linear(x[part].t(), d_u[part], None, d_w3[e])
            for of_bias in (of_b1, of_b3, of_b2):
                of_bias.store(block)
        d_x = x
        products(d_a, [w.t() for w in experts.w1], block, d_x)
        if gated:
            for e, _, part in block.segments:
                add_product(d_u[part], experts.w3[e].t(), d_x[part])
        add_rows(block, d_x, none, array(None, 2), d_x_TD)
    return d_x_TD, d_gate_A, grads
