"""Calls every Triton operation of the layer, to record the launches.

Row arrays have the bounded length k T. Index arrays hold no values, so the calls are for meta tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from math import ceil
from typing import Any

import torch
from torch import Tensor

from dynmoe_tutel.kernels import ExpertWeights, Index, Router
from dynmoe_tutel.kernels.ragged_index import block_tokens

from ..common.shapes import Shape


@dataclass(frozen=True)
class Variant:
    """The options that change a kernel's code, besides shape and dtype."""

    activation: str = "gelu"
    bias: bool = True
    apply_gate: bool = False  # fixed k: multiply rows by their weights
    save: bool = True  # False: recompute="up"
    fallback: bool = False  # eval
    centred: bool = False  # combine_gradient="normalized"
    padding: bool = False  # a token mask
    fp32_router: bool = False  # routing vectors in fp32, tokens in half precision
    temperature: bool = False  # scale the cosines
    max_k: int = 0  # a budget: a shift, and at most so many experts a token


VARIANTS = {
    "default": Variant(),
    "eval": Variant(fallback=True, save=False),
    "normalized": Variant(centred=True, padding=True, fp32_router=True, temperature=True),
    "fixed k, no bias": Variant(bias=False, apply_gate=True),
    "recompute": Variant(save=False),
    "budget": Variant(max_k=4),
    **{name: Variant(activation=name) for name in ("gelu_tanh", "relu", "silu", "squared_relu", "identity")},
}


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Operations:
    """The operations on meta tensors of one shape, dtype and variant; each method makes one operation's calls."""

    def __init__(self, shape: Shape, dtype: torch.dtype, variant: Variant) -> None:
        T, D, H, E, R = shape.T, shape.D, shape.H, shape.E, shape.rows
        self.shape, self.variant, self.dtype = shape, variant, dtype
        self.router = torch.float32 if variant.fp32_router else dtype
        self.x_TD = _meta(T, D, dtype=dtype)
        self.w_DE = _meta(D, E, dtype=self.router)
        self.number = _meta(dtype=torch.float32)
        self.scale = self.number if variant.temperature else None
        self.score_TE = _meta(T, E, dtype=torch.float32)
        self.bits_TW = _meta(T, ceil(E / 64), dtype=torch.int64)
        self.flag_T = _meta(T, dtype=torch.bool)
        self.inv_norm_T = _meta(T, dtype=torch.float32)
        self.threshold_E, self.theta_E = _meta(E, dtype=self.router), _meta(E, dtype=torch.float32)
        self.active_E = _meta(E, dtype=self.router)
        self.unit_ED, self.inv_norm_E = _meta(E, D, dtype=torch.float32), _meta(E, dtype=torch.float32)
        self.block_counts = _meta(ceil(T / block_tokens(E)) * E, dtype=torch.int32)
        int32 = {"dtype": torch.int32}
        self.index = Index(*(_meta(size, **int32) for size in (E + 1, T + 1, R, R)))
        self.gate_A = _meta(R, dtype=torch.float32)
        self.rows_AD = _meta(R, D, dtype=dtype)
        self.weights = self._weights(D, H, E)

    def _weights(self, D: int, H: int, E: int) -> ExpertWeights:
        """In the layouts of `ffn` and `llama_ffn` experts."""
        b1: Tensor | None = _meta(E, H, dtype=self.dtype)
        b2: Tensor | None = _meta(E, D, dtype=self.dtype)
        w2 = _meta(E, H, D, dtype=self.dtype)
        if self.shape.gated:
            w1, w3 = (_meta(E, D, H, dtype=self.dtype) for _ in range(2))
            return ExpertWeights(w1, None, w3, None, w2, None)
        w1 = _meta(E, H, D, dtype=self.dtype).transpose(1, 2)
        return (
            ExpertWeights(w1, b1, None, None, w2, b2)
            if self.variant.bias
            else ExpertWeights(w1, None, None, None, w2, None)
        )

    def threshold_gate(self, gpu: Any) -> None:
        mask_T = self.flag_T if self.variant.padding else None
        gate = (self.w_DE, self.threshold_E, self.active_E, self.scale, self.variant.fallback)
        shift = self.number if self.variant.max_k else None
        gpu.threshold_gate(self.x_TD, *gate, mask_T, shift, self.variant.max_k)

    def score_gradient(self, gpu: Any) -> None:
        backward = (self.score_TE, self.x_TD, self.w_DE, self.inv_norm_T, self.scale)
        gpu.threshold_gate_backward(self.score_TE, *backward)

    def ragged_index(self, gpu: Any) -> None:
        E, R = self.shape.E, self.shape.rows
        gpu.ragged_index(self.bits_TW, E, R, self.block_counts)
        gpu.ragged_index(self.bits_TW, E, -1, self.block_counts)
        gpu.ragged_index(self.bits_TW, E, R)
        gpu.bound_assignments(self.bits_TW, self.score_TE, R)

    def dispatch_combine(self, gpu: Any) -> None:
        v = self.variant
        threshold = None if v.apply_gate else self.theta_E
        gpu.dispatch(self.x_TD, *self.index[1:])
        gpu.combine(self.rows_AD, *self.index[1:], not v.apply_gate)
        gpu.combine_backward(self.x_TD, *self.index[1:3], not v.apply_gate)
        gpu.row_gates(self.score_TE, threshold, self.flag_T, self.index, v.centred)
        gpu.row_gates_backward(self.gate_A, self.flag_T, self.index, not v.apply_gate, v.centred)
        gpu.segment_sum(self.rows_AD, *self.index[1::2])

    def grouped_ffn(self, gpu: Any) -> None:
        v = self.variant
        inputs = (self.x_TD, self.gate_A, self.index, self.weights, v.activation, v.apply_gate)
        rows, h_AH, u_AH = gpu.grouped_ffn(*inputs, v.save)
        gpu.grouped_ffn_backward(rows, h_AH, u_AH, *inputs, True)
        linear = (self.rows_AD, self.index.expert_offsets, self.weights.w1_EDH, self.weights.b1_EH)
        gpu.grouped_linear_backward(gpu.grouped_linear(*linear), *linear)

    def top_any_ffn(self, gpu: Any) -> None:
        v = self.variant
        gate = (self.w_DE, self.threshold_E, self.scale, self.score_TE, self.inv_norm_T, self.flag_T, self.bits_TW)
        unit = (self.unit_ED, self.inv_norm_E)
        inputs = (self.x_TD, Router(*gate, *unit), self.index, self.weights, v.activation, v.centred, self.dtype)
        y_TD, h_AH, u_AH = gpu.top_any_ffn(*inputs, v.save)
        gpu.top_any_ffn_backward(y_TD, h_AH, u_AH, *inputs, True)

    def router_losses(self, gpu: Any) -> None:
        diversity, simplicity, *saved = gpu.vector_losses(self.w_DE, self.active_E)
        gpu.vector_losses_backward(diversity, diversity, simplicity, *saved, self.w_DE)


FILES = (
    "threshold_gate",
    "score_gradient",
    "ragged_index",
    "dispatch_combine",
    "grouped_ffn",
    "top_any_ffn",
    "router_losses",
)


def run_all(shape: Shape, dtype: torch.dtype, variant: Variant, only: tuple[str, ...] = FILES) -> None:
    """Call every operation of the files `only` of `dynmoe_tutel.kernels.gpu` once."""
    operations = Operations(shape, dtype, variant)
    for name in only:
        call: Callable[[Any], None] = getattr(operations, name)
        call(import_module(f"dynmoe_tutel.kernels.gpu.{name}"))
