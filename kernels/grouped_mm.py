"""The engine "grouped_mm" of the expert networks: torch.nn.functional.grouped_mm, one product for all experts.

The functions have the names, arguments and results of the operations in `grouped_ffn`. They gather and multiply rows,
then apply bias, activation and gate as torch operations: the numbers of Triton's fused kernels, with more memory
traffic. Nothing here waits for the device. In bf16 on sm_90 and sm_100 torch does not either; elsewhere, and in fp16
and fp32, its grouped product is a loop over the experts that first copies their offsets to the host.

grouped_mm has these rules (see its documentation and aten/src/ATen/native/GroupedMMUtils.h):
* It takes int32 ends of the groups, from `expert_offsets`. It neither reads nor writes rows past the last end.
* One inner stride must be 1; the other strides and the address must be multiples of 16 bytes. Other operands, such as
  those of an odd D or H, are copied once and padded with zeros, which change no product.
* It takes no bias and returns the operands' type. In half precision the bias of a pre-activation is one more row of
  the weights in the product: rounding before and after the bias would give h near 0 the wrong sign, and relu the wrong
  gradient, in one of 500 elements. Elsewhere the bias is added to the result.
* The weight gradient of an empty group is undefined: zeroed here.

Bias gradients are products with a matrix of ones and token sums a `segment_reduce`: no atomics, a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS, hidden_gradients, hidden_rows
from .operands import ExpertWeights, Index

ALIGNMENT = 16  # bytes


def _aligned_size(size: int, dtype: torch.dtype) -> int:
    """The smallest number of elements, at least `size` and 1, that fills a multiple of ALIGNMENT bytes."""
    step = ALIGNMENT // dtype.itemsize
    return max(-(-size // step), 1) * step


def _operand(t: Tensor, dtype: torch.dtype, *, rows: bool = False) -> Tensor:
    """`t` [..., M, N] in `dtype` as grouped_mm takes it: itself, or a copy padded with zeros to aligned N and, unless
    `rows`, aligned M."""
    step = ALIGNMENT // dtype.itemsize
    *batch, M, N = t.shape
    shape = (*batch, M if rows else _aligned_size(M, dtype), _aligned_size(N, dtype))
    if tuple(t.shape) == shape:
        t = t.to(dtype)
        *outer, stride_m, stride_n = t.stride()
        row_major = stride_n == 1 and stride_m >= N and stride_m % step == 0
        column_major = stride_m == 1 and stride_n >= M and stride_n % step == 0 and not rows
        if (row_major or column_major) and not any(s % step for s in outer) and t.data_ptr() % ALIGNMENT == 0:
            return t
    padded = t.new_zeros(shape, dtype=dtype)
    padded[..., :M, :N] = t
    return padded


def _columns(t: Tensor, size: int) -> Tensor:
    """The first `size` columns, contiguous."""
    return t if t.shape[-1] == size else t[..., :size].contiguous()


@dataclass(frozen=True)
class _Groups:
    """The R rows, of which expert e has expert_offsets[e]:expert_offsets[e + 1]; rows past the last are unused."""

    expert_offsets: Tensor
    R: int

    @property
    def ends(self) -> Tensor:
        return self.expert_offsets[1:]

    @cached_property
    def _expert_of_row(self) -> Tensor:
        """[R]; an arbitrary expert for unused rows."""
        row_R = torch.arange(self.R, device=self.expert_offsets.device, dtype=torch.int32)
        return torch.searchsorted(self.ends, row_R, right=True).clamp_(max=self.ends.shape[0] - 1)

    @cached_property
    def _behind(self) -> Tensor:
        """[R, 1] bool: unused rows."""
        row_R = torch.arange(self.R, device=self.expert_offsets.device, dtype=torch.int32)
        return (row_R >= self.expert_offsets[-1]).unsqueeze(1)

    @cached_property
    def _silent(self) -> Tensor:
        """[E] bool: experts without rows."""
        return self.expert_offsets.diff() == 0

    def bias_rows(self, b_EN: Tensor, like_RN: Tensor) -> Tensor:
        """Each row's bias in the width and dtype of `like_RN`, padded with zeros."""
        b_EN = F.pad(b_EN.to(like_RN.dtype), (0, like_RN.shape[1] - b_EN.shape[1]))
        return b_EN.index_select(0, self._expert_of_row)

    def linear(self, x_RK: Tensor, w_EKN: Tensor, b_EN: Tensor | None = None) -> Tensor:
        """x w[e] + b[e], [R, N]; the operands must be aligned."""
        out_RN = F.grouped_mm(x_RK, w_EKN, offs=self.ends)
        return out_RN if b_EN is None else out_RN.add_(self.bias_rows(b_EN, out_RN))

    def zero_behind(self, rows_RN: Tensor) -> Tensor:
        """Zero the unused rows in place."""
        return rows_RN.masked_fill_(self._behind, 0)

    def weight_gradient(self, x_RM: Tensor, d_RN: Tensor, like_EMN: Tensor) -> Tensor:
        """Sum of x^T d over each expert's rows, with the shape, strides and dtype of `like_EMN`."""
        _, M, N = like_EMN.shape
        if like_EMN.stride(1) == 1:  # stored as [E, N, M]
            grad_EMN = F.grouped_mm(d_RN.t(), x_RM, offs=self.ends).transpose(1, 2)
        else:
            grad_EMN = F.grouped_mm(x_RM.t(), d_RN, offs=self.ends)
        grad_EMN = grad_EMN.masked_fill_(self._silent.view(-1, 1, 1), 0)[:, :M, :N]
        if grad_EMN.dtype == like_EMN.dtype and grad_EMN.stride() == like_EMN.stride():
            return grad_EMN
        return torch.empty_like(like_EMN).copy_(grad_EMN)

    def bias_gradient(self, d_RN: Tensor, like_EN: Tensor) -> Tensor:
        """Sum of each expert's rows, with the shape, strides and dtype of `like_EN`."""
        ones = d_RN.new_ones((self.R, ALIGNMENT // d_RN.dtype.itemsize))
        grad_EN = F.grouped_mm(ones.t(), d_RN, offs=self.ends)[:, 0].masked_fill(self._silent.unsqueeze(1), 0)
        return torch.empty_like(like_EN).copy_(grad_EN[:, : like_EN.shape[1]])


def _gather(x_TD: Tensor, token_of_row: Tensor, one: bool) -> Tensor:
    """x of each row's token, aligned, with a 1 appended if `one`; an unused row (-1) gets the first token."""
    x_TD = F.pad(x_TD, (0, 1), value=1.0) if one else x_TD
    return _operand(x_TD, x_TD.dtype, rows=True).index_select(0, token_of_row.clamp(min=0))


def _has_one(x_TD: Tensor, weights: ExpertWeights) -> bool:
    """Whether the biases go into the product as a row of the weights."""
    return x_TD.dtype != torch.float32 and not (weights.b1_EH is None and weights.b3_EH is None)


def _pre_activation(groups: _Groups, x: Tensor, w_EDH: Tensor, b_EH: Tensor | None, one: bool) -> Tensor:
    """x w[e] + b[e] of gathered rows, in the aligned width."""
    if not one:
        return groups.linear(x, _operand(w_EDH, x.dtype), b_EH)
    (E, D, H), dtype = w_EDH.shape, x.dtype
    w = w_EDH.new_zeros((E, x.shape[1], _aligned_size(H, dtype)), dtype=dtype)
    w[:, :D, :H] = w_EDH
    if b_EH is not None:
        w[:, D, :H] = b_EH
    return groups.linear(x, w)


def _token_sum(rows_RD: Tensor, index: Index) -> Tensor:
    """Each token's sum of rows, [T, D], in fp32."""
    in_order = rows_RD.to(torch.promote_types(rows_RD.dtype, torch.float32))
    in_order = in_order.index_select(0, index.row_of_assignment.clamp(min=0))
    return torch.segment_reduce(in_order, "sum", offsets=index.token_offsets, axis=0, unsafe=True)  # checks would wait


def _pre_activations(groups: _Groups, x: Tensor, weights: ExpertWeights, one: bool) -> tuple[Tensor, Tensor | None]:
    """h, and u of gated experts."""
    w1, b1, w3, b3, _, _ = weights
    return _pre_activation(groups, x, w1, b1, one), None if w3 is None else _pre_activation(groups, x, w3, b3, one)


def grouped_ffn(
    x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights, activation: str, apply_gate: bool, save: bool,
    engine: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    w2_EHO, b2_EO = weights[4:]
    R, T, (_, H, O) = index.rows, x_TD.shape[0], w2_EHO.shape
    none = x_TD.new_empty((0, H))
    if R == 0 or T == 0:
        h_AH, u_AH = weights.pre_activations(x_TD, R if save else 0)
        return x_TD.new_zeros((R, O)), h_AH.zero_(), u_AH.zero_()
    dtype, groups = x_TD.dtype, _Groups(index.expert_offsets, R)
    one = _has_one(x_TD, weights)
    h, u = _pre_activations(groups, _gather(x_TD, index.token_of_row, one), weights, one)
    _, a = hidden_rows(ACTIVATIONS[activation], h, u)
    rows = _columns(groups.linear(a, _operand(w2_EHO, dtype), b2_EO), O)
    if apply_gate:
        rows.mul_(gate_A.unsqueeze(1))
    return rows, _columns(h, H) if save else none, _columns(u, H) if save and u is not None else none.clone()


def grouped_ffn_backward(
    d_rows_AO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, gate_A: Tensor, index: Index, weights: ExpertWeights,
    activation: str, apply_gate: bool, wanted: bool, engine: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    R, (T, D), dtype = index.rows, x_TD.shape, x_TD.dtype
    if R == 0 or T == 0:
        return torch.zeros_like(x_TD), torch.zeros_like(gate_A), *(g.zero_() for g in weights.gradients(wanted))
    w1_EDH, _, w3_EDH, _, w2_EHO, b2_EO = weights
    act, groups = ACTIVATIONS[activation], _Groups(index.expert_offsets, R)
    saved, one = h_AH.shape[0] == R, _has_one(x_TD, weights)
    x = _gather(x_TD, index.token_of_row if wanted or not saved else index.token_of_row[:0], one and not saved)
    if saved:
        h = _operand(h_AH, dtype, rows=True)
        u = None if w3_EDH is None else _operand(u_AH, dtype, rows=True)
    else:
        h, u = _pre_activations(groups, x, weights, one)
    x = x[:, : _aligned_size(D, dtype)]
    act_h, a = hidden_rows(act, h, u)
    d_row = _operand(d_rows_AO, dtype, rows=True)
    d_a = groups.linear(d_row, _operand(w2_EHO, dtype).transpose(1, 2))
    wide = torch.promote_types(dtype, torch.float32)
    d_gate = (d_a * a).sum(dim=1, dtype=wide)
    if b2_EO is not None:
        d_gate += (d_row * groups.bias_rows(b2_EO, d_row)).sum(dim=1, dtype=wide)
    if apply_gate:
        gate = gate_A.to(dtype).unsqueeze(1)
        d_a, d_row = d_a * gate, d_row * gate
    d_h, d_u = hidden_gradients(act, d_a, h, u, act_h)
    d_xs = groups.linear(d_h, _operand(w1_EDH, dtype).transpose(1, 2))
    if d_u is not None and w3_EDH is not None:
        d_xs = d_xs.to(wide) + groups.linear(d_u, _operand(w3_EDH, dtype).transpose(1, 2))
    grads = weights.gradients(False)
    if wanted:
        d_rows: tuple[Tensor | None, ...] = (d_h, d_u, d_row)
        for i, (left, d) in enumerate(zip((x, x, a), d_rows, strict=True)):
            w, b = weights[2 * i], weights[2 * i + 1]
            if w is not None and d is not None:
                grads[2 * i] = groups.weight_gradient(left, d, w)
            if b is not None and d is not None:
                grads[2 * i + 1] = groups.bias_gradient(d, b)
    d_x_TD = _columns(_token_sum(d_xs, index).to(dtype), D)
    return d_x_TD, d_gate.to(gate_A.dtype), *grads


def grouped_linear(
    rows_AD: Tensor, expert_offsets: Tensor, w_EDO: Tensor, b_EO: Tensor | None, engine: str = "grouped_mm"
) -> Tensor:
    (R, _), O, dtype = rows_AD.shape, w_EDO.shape[2], rows_AD.dtype
    if R == 0:
        return rows_AD.new_zeros((0, O))
    groups = _Groups(expert_offsets, R)
    out = groups.linear(_operand(rows_AD, dtype, rows=True), _operand(w_EDO, dtype), b_EO)
    return _columns(groups.zero_behind(out), O)


def grouped_linear_backward(
    d_out_AO: Tensor,
    rows_AD: Tensor,
    expert_offsets: Tensor,
    w_EDO: Tensor,
    b_EO: Tensor | None,
    engine: str = "grouped_mm",
) -> tuple[Tensor, Tensor, Tensor]:
    (R, D), dtype = rows_AD.shape, rows_AD.dtype
    none = rows_AD.new_empty((0,), dtype=torch.float32)
    if R == 0:
        return torch.zeros_like(rows_AD), torch.zeros_like(w_EDO), none if b_EO is None else torch.zeros_like(b_EO)
    groups = _Groups(expert_offsets, R)
    d_out = _operand(d_out_AO, dtype, rows=True)
    d_rows = groups.zero_behind(groups.linear(d_out, _operand(w_EDO, dtype).transpose(1, 2)))
    d_w = groups.weight_gradient(_operand(rows_AD, dtype, rows=True), d_out, w_EDO)
    d_b = none if b_EO is None else groups.bias_gradient(d_out, b_EO)
    return torch.empty_like(rows_AD).copy_(d_rows[:, :D]), d_w, d_b
