"""The matrix products of `grouped_ffn` and its backward; each launches a kernel of `gemm_kernels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operands import ExpertWeights, Index
from . import gemm_kernels, tiles
from .gemm_kernels import launch_options, pointer, precision
from .row_sums import bias_gradient
from .sizes import block_experts, cdiv
from .weight_gradient import weight_gradient


@dataclass(frozen=True)
class Tiles:
    """How a product over rows is cut: its configuration, its column tiles, and its largest number of row tiles."""

    config: tiles.GemmConfig
    n: int
    most_m: int

    def meta(self, E: int, K: int, N: int, x: Tensor) -> dict[str, Any]:
        """The compile-time arguments that all row kernels on `x` share."""
        c = self.config
        return {
            "BLOCK_M": c.block_m,
            "BLOCK_N": c.block_n,
            "BLOCK_K": c.block_k,
            "BLOCK_E": block_experts(E),
            "GROUP_M": c.group_m,
            "EVEN_K": K % c.block_k == 0,
            "EVEN_N": N % c.block_n == 0,
            "PRECISION": precision(x.dtype, tiles.architecture(x.device)),
            **launch_options(c, tiles.architecture(x.device)),
        }

    def grid(self, device: torch.device) -> tuple[int]:
        """The grid of a persistent kernel: at most one program per tile."""
        return (max(1, min(self.most_m * self.n, tiles.processors(device) * self.config.programs)),)


def cut_of(kind: str, x: Tensor, rows: int, E: int, K: int, N: int) -> Tiles:
    """The cut of a product of `rows` rows over E experts, [rows, K] by [K, N]."""
    config = tiles.gemm(kind, x.device, x.dtype, -(-rows // E), K, N)
    return Tiles(config, cdiv(N, config.block_n), cdiv(rows, config.block_m) + E)


def up(
    x_TD: Tensor, index: Index, weights: ExpertWeights, activation: str, save: bool, activate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h, u (both empty unless `save`) and a (empty unless `activate`), rows [R, H]; see `gemm_kernels.up_kernel`."""
    w1, b1, w3, b3, _, _ = weights
    R, (E, D, H), gated = index.rows, w1.shape, w3 is not None
    h_AH, u_AH = weights.pre_activations(x_TD, R if save else 0)
    a_AH = x_TD.new_empty((R if activate else 0, H))
    if R == 0 or H == 0:
        return h_AH, u_AH, a_AH
    cut = cut_of("up_gated" if gated else "up", x_TD, R, E, D, H)
    w3 = pointer(w3, w1)
    gemm_kernels.up_kernel[cut.grid(x_TD.device)](
        x_TD, index.token_of_row, index.expert_offsets, w1, pointer(b1, w1), w3, pointer(b3, w1), h_AH, u_AH, a_AH,
        E, D, H, x_TD.stride(0), *w1.stride(), *w3.stride(),
        GATED=gated,
        BIAS=b1 is not None,
        BIAS3=b3 is not None,
        SAVE=save,
        ACTIVATE=activate,
        ACTIVATION=activation,
        PIECES=cut.config.pieces,
        **cut.meta(E, D, H, x_TD),
    )  # fmt: skip
    return h_AH, u_AH, a_AH


def linear(
    a_AK: Tensor,
    w_EKN: Tensor,
    expert_offsets: Tensor,
    *,
    bias_EN: Tensor | None = None,
    gate_A: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None,
    zero_tail: bool = False,
) -> Tensor:
    """(a w[e] + bias[e]) * gate, rows [R, N]; `second` is another pair (a2, w2) whose product is added."""
    (R, K), (E, _, N) = a_AK.shape, w_EKN.shape
    out_AN = a_AK.new_empty((R, N))
    if R == 0 or N == 0:
        return out_AN
    a2, w2 = second or (a_AK, w_EKN)
    cut = cut_of("linear" if second is None and not zero_tail else "linear_pair", a_AK, R, E, K, N)
    gemm_kernels.linear_kernel[cut.grid(a_AK.device)](
        a_AK, a2, expert_offsets, w_EKN, w2, pointer(bias_EN, w_EKN), pointer(gate_A, a_AK), out_AN,
        E, R, K, N, *w_EKN.stride(), *w2.stride(),
        PAIR=second is not None,
        BIAS=bias_EN is not None,
        GATE=gate_A is not None,
        ZERO_TAIL=zero_tail,
        **cut.meta(E, K, N, a_AK),
    )  # fmt: skip
    return out_AN


@dataclass(frozen=True)
class ActivationGradient:
    """Results of `activation_gradient`: rows d_h, d_u, a [R, H], and fp32 partial sums for the gate."""

    d_h_AH: Tensor
    d_u_AH: Tensor
    a_AH: Tensor
    d_gate_parts_AN: Tensor


def activation_gradient(
    d_rows: Tensor, index: Index, weights: ExpertWeights, h_AH: Tensor, u_AH: Tensor, gate_A: Tensor | None,
    activation: str, *, from_tokens: bool, wanted: bool,
) -> ActivationGradient:  # fmt: skip
    """Gradients of h and u from the gradient of the rows [R, O], or of the tokens' means [T, O] (`from_tokens`).

    `wanted`: also compute a, for the weight gradients.
    """
    w3, w2_EHO = weights.w3_EDH, weights.w2_EHO
    R, (E, H, O), gated = index.rows, w2_EHO.shape, w3 is not None
    cut = cut_of("activation_gradient_gated" if gated else "activation_gradient", d_rows, R, E, O, H)
    result = ActivationGradient(
        torch.empty_like(h_AH),
        torch.empty_like(u_AH),
        h_AH.new_empty((R if wanted else 0, H)),
        h_AH.new_empty((R, cut.n), dtype=torch.float32),
    )
    if R == 0 or H == 0:
        return result
    w2_EOH = w2_EHO.transpose(1, 2)
    gemm_kernels.activation_gradient_kernel[cut.grid(d_rows.device)](
        d_rows, index.token_of_row, index.token_offsets, pointer(gate_A, d_rows), index.expert_offsets, w2_EOH,
        h_AH, u_AH if gated else h_AH, result.d_h_AH, result.d_u_AH, result.a_AH,
        result.d_gate_parts_AN,
        E, O, H, d_rows.stride(0), *w2_EOH.stride(),
        FROM_TOKENS=from_tokens,
        GATE=gate_A is not None,
        GATED=gated,
        ACTIVATED=wanted,
        ACTIVATION=activation,
        PIECES=cut.config.pieces,
        **cut.meta(E, O, H, d_rows),
    )  # fmt: skip
    return result


def token_rows(through: ActivationGradient, w1_EDH: Tensor, w3_EDH: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """Each row's gradient of its token, [R, D]."""
    second = None if w3_EDH is None else (through.d_u_AH, w3_EDH.transpose(1, 2))
    return linear(through.d_h_AH, w1_EDH.transpose(1, 2), expert_offsets, second=second)


def weight_gradients(
    through: ActivationGradient, x_TD: Tensor, d_rows: Tensor, index: Index, weights: ExpertWeights, wanted: bool,
    gate_A: Tensor | None = None, *, from_tokens: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of w1, b1, w3, b3, w2, b2; empty if the weight is None or gradients are not `wanted`."""
    grads = weights.gradients(False)
    if not wanted:
        return grads
    w1, b1, w3, b3, w2, b2 = weights
    grads[0], d_b1 = weight_gradient(x_TD, through.d_h_AH, index, w1, b1, a_from_tokens=True)
    grads[4], _ = weight_gradient(through.a_AH, d_rows, index, w2, b_from_tokens=from_tokens)
    if b1 is not None:
        grads[1] = d_b1
    if w3 is not None:
        grads[2], d_b3 = weight_gradient(x_TD, through.d_u_AH, index, w3, b3, a_from_tokens=True)
        if b3 is not None:
            grads[3] = d_b3
    if b2 is not None:
        grads[5] = bias_gradient(d_rows, gate_A, index, b2, from_tokens=from_tokens)
    return grads


def in_dtype(dtype: torch.dtype, weights: ExpertWeights) -> ExpertWeights:
    """The matrices cast to `dtype`; the biases contiguous in their own dtype, since the kernels read any."""
    w1, b1, w3, b3, w2, b2 = weights
    b1, b3, b2 = (None if b is None else b.contiguous() for b in (b1, b3, b2))
    return ExpertWeights(w1.to(dtype), b1, None if w3 is None else w3.to(dtype), b3, w2.to(dtype), b2)
