"""The Triton kernels on one layer's tensors: each one's call, its bytes and FLOPs, and its expected result.

Bytes count every input and output of a kernel once; FLOPs count its products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.shapes import Shape
from ..common.tensors import generator_on

TINY = Shape(40, 32, 48, 4, 1.5)
# the matrix products, whose time depends on how the rows are spread over the experts
PRODUCTS = (
    "up",
    "down",
    "activation gradient",
    "weight gradient, first",
    "weight gradient, second",
    "rows of the tokens' gradient",
)


@dataclass
class Kernel:
    """A kernel on one set of inputs: its call, its bytes and FLOPs, and its expected result."""

    name: str
    run: Callable[[], Any]
    bytes: int
    flops: int
    expected: Callable[[], Any] | None = None


class Inputs:
    """Tensors of one layer, routed with the shape's mean k; experts have equal loads, or the first one half of all."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, skewed: bool = False) -> None:
        from dynmoe_tutel import kernels

        generator = generator_on(device, seed)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

        T, D, H, E = shape.T, shape.D, shape.H, shape.E
        self.shape, self.dtype = shape, dtype
        self.x_TD, self.d_y_TD = draw(T, D), draw(T, D)
        self.w_DE = draw(D, E)
        self.scale = torch.ones((), device=device)
        self.active_E = torch.ones(E, dtype=torch.bool, device=device)
        unit_DE = torch.nn.functional.normalize(self.w_DE.float(), dim=0)
        cos_TE = torch.nn.functional.normalize(self.x_TD[:4096].float(), dim=1) @ unit_DE
        first = min(1.0, shape.k / 2) if skewed else shape.k / E  # the share of the tokens that the first expert takes
        self.thresholds_E = cos_TE.quantile(1 - (shape.k - first) / (E - 1), dim=0)
        self.thresholds_E[0] = cos_TE[:, 0].quantile(1 - first)
        self.score_TE, self.bits_TW, self.unrouted_T, self.inv_norm_T, self.counts = kernels.threshold_gate(
            self.x_TD, self.w_DE, self.thresholds_E, self.active_E, self.scale, False
        )
        self.index = kernels.Index(*kernels.ragged_index(self.bits_TW, E))
        self.A = self.index.rows
        gate = (self.score_TE, self.inv_norm_T, self.unrouted_T, self.bits_TW)
        self.router = kernels.Router(self.w_DE, self.thresholds_E, self.scale, *gate)
        self.w1 = draw(E, D, H, scale=D**-0.5) if shape.gated else draw(E, H, D, scale=D**-0.5).transpose(1, 2)
        self.w3 = draw(E, D, H, scale=D**-0.5) if shape.gated else None
        self.b1, self.b2 = (None, None) if shape.gated else (draw(E, H), draw(E, D))
        self.w2 = draw(E, H, D, scale=H**-0.5)
        self.weights = kernels.ExpertWeights(self.w1, self.b1, self.w3, None, self.w2, self.b2)
        self.activation = "silu" if shape.gated else "gelu"
        self.rows_AD, self.hidden_AH = draw(self.A, D), draw(self.A, H)

    def activation_gradient(self, h_AH: Tensor, u_AH: Tensor) -> Any:
        """The activation gradient as in the layer's backward, from the saved pre-activations."""
        from dynmoe_tutel.kernels.gpu import grouped_ffn

        kept = (self.index, self.weights, h_AH, u_AH, None, self.activation)
        return grouped_ffn.activation_gradient(self.d_y_TD, *kept, from_tokens=True, wanted=True)


def on_torch(name: str, *args: Any) -> Any:
    """The result of an operation's torch implementation, on any device."""
    from dynmoe_tutel.kernels.operation import OPERATIONS

    return OPERATIONS[name].run(*args)


class Loop:
    """The experts' products in torch, expert by expert, with sums in fp32."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    @cached_property
    def segments(self) -> list[tuple[int, slice]]:
        offsets = self.inputs.index[0].tolist()
        return list(enumerate(map(slice, offsets[:-1], offsets[1:])))

    @cached_property
    def token_A(self) -> Tensor:
        return self.inputs.index[2].long()

    def linear(self, rows_AK: Tensor, w_EKN: Tensor, bias_EN: Tensor | None = None) -> Tensor:
        """Rows [A, N] in fp32."""
        out = rows_AK.new_empty((rows_AK.shape[0], w_EKN.shape[2]), dtype=torch.float32)
        for e, rows in self.segments:
            out[rows] = rows_AK[rows].float() @ w_EKN[e].float()
            if bias_EN is not None:
                out[rows] += bias_EN[e].float()
        return out

    def up(self) -> tuple[Tensor, Tensor, Tensor]:
        """h, u and a; h and u are rounded to the tokens' dtype first."""
        from dynmoe_tutel.kernels import ACTIVATIONS

        i = self.inputs
        x = i.x_TD[self.token_A]
        h = self.linear(x, i.w1, i.b1).to(i.dtype)
        u = h[:0] if i.w3 is None else self.linear(x, i.w3).to(i.dtype)
        a = ACTIVATIONS[i.activation].value(h.float())
        return h, u, a if i.w3 is None else a * u.float()

    def activation_gradient(self, h: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of h and u, and a over k, as `activation_gradient` returns them."""
        from dynmoe_tutel.kernels import ACTIVATIONS

        i, act = self.inputs, ACTIVATIONS[self.inputs.activation]
        k_A1 = i.index[1].diff()[self.token_A].unsqueeze(1).float()
        d_a = self.linear(i.d_y_TD[self.token_A], i.w2.transpose(1, 2)) / k_A1
        act_h = act.value(h.float())
        if i.w3 is None:
            return act.gradient(d_a, h.float()), u, act_h / k_A1
        return act.gradient(d_a * u.float(), h.float()), d_a * act_h, act_h * u.float() / k_A1

    def token_gradient(self, d_rows_AD: Tensor, parts_AN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 gradients of x, the scores and the cosines over ||x||, as `token_gradient` returns them."""
        from dynmoe_tutel.kernels.dispatch_combine import segment_sum

        i = self.inputs
        d_gate_A = parts_AN.sum(dim=1)
        if i.b2 is not None:
            expert_A = torch.arange(i.shape.E, device=i.x_TD.device).repeat_interleave(i.index[0].diff())
            d_gate_A = d_gate_A + torch.linalg.vecdot(i.d_y_TD[self.token_A].float(), i.b2[expert_A].float())
        d_gate_A = d_gate_A / i.index[1].diff()[self.token_A]
        d_score_TE = on_torch("row_gates_backward", d_gate_A, i.unrouted_T, i.index, True, False)
        over_norm_T1 = (i.scale * i.inv_norm_T).unsqueeze(1)
        d_cos_TE = d_score_TE * i.score_TE * (1 - i.score_TE) * over_norm_T1
        gate = (i.score_TE, i.x_TD.float(), i.w_DE.float(), i.inv_norm_T, i.scale)
        through_TD, _, _ = on_torch("threshold_gate_backward", d_score_TE, *gate)
        return segment_sum(d_rows_AD, i.index[1], i.index[3]) + through_TD, d_score_TE, d_cos_TE

    def weight_gradient(self, a_AM: Tensor, b_AN: Tensor) -> Tensor:
        """[E, M, N] in fp32."""
        return torch.stack([a_AM[rows].t().float() @ b_AN[rows].float() for _, rows in self.segments])


def kernels_of(inputs: Inputs) -> Iterator[Kernel]:
    """The kernels in forward, then backward order."""
    from dynmoe_tutel.kernels.gpu import dispatch_combine as rows
    from dynmoe_tutel.kernels.gpu import grouped_ffn, ragged_index, router_gradient, score_gradient, threshold_gate

    i, s = inputs, inputs.shape
    T, D, H, E, A = s.T, s.D, s.H, s.E, inputs.A
    n, W, g = i.x_TD.element_size(), i.bits_TW.shape[1], 2 if s.gated else 1
    tokens, index_bytes, weight = n * T * D, 8 * A + 4 * (T + E), n * E * D * H
    gate = (i.x_TD, i.w_DE, i.thresholds_E, i.active_E, i.scale, False)
    yield Kernel(
        "gate",
        lambda: threshold_gate.threshold_gate(*gate)[:4],
        tokens + n * D * E + 4 * T * E + 8 * T * W + 5 * T,
        2 * T * D * E,
        lambda: on_torch("threshold_gate", *gate)[:4],
    )
    budget = (i.x_TD, i.w_DE, i.thresholds_E - 0.02, *gate[3:], None, i.scale.new_full((1,), 0.02), int(2 * s.k))
    yield Kernel(
        "gate with a budget",
        lambda: threshold_gate.threshold_gate(*budget)[:4],
        tokens + n * D * E + 4 * T * E + 8 * T * W + 5 * T,
        2 * T * D * E,
        lambda: on_torch("threshold_gate", *budget)[:4],
    )
    yield Kernel(
        "index (bounded)",
        lambda: ragged_index.ragged_index(i.bits_TW, E, A, i.counts),
        8 * T * W + index_bytes,
        0,
        lambda: on_torch("ragged_index", i.bits_TW, E, A),
    )
    yield Kernel(
        "bound (nothing to drop)",
        lambda: ragged_index.bound_assignments(i.bits_TW, i.score_TE, A),
        16 * T * W + 4 * A,
        0,
        lambda: on_torch("bound_assignments", i.bits_TW, i.score_TE, A),
    )
    fewer = A - A // 10
    yield Kernel(
        "bound (a tenth dropped)",
        lambda: ragged_index.bound_assignments(i.bits_TW, i.score_TE, fewer),
        16 * T * W + 4 * A,
        0,
        lambda: on_torch("bound_assignments", i.bits_TW, i.score_TE, fewer),
    )
    yield Kernel(
        "dispatch",
        lambda: rows.dispatch(i.x_TD, *i.index[1:]),
        tokens + n * A * D + 4 * A,
        0,
        lambda: on_torch("dispatch", i.x_TD, *i.index[1:]),
    )
    up = (i.x_TD, i.index, i.weights, i.activation, True, True)
    h, u, a = grouped_ffn.up(*up)
    loop = Loop(inputs)
    yield Kernel(
        "up",
        lambda: grouped_ffn.up(*up),
        tokens + g * weight + n * (g + 1) * A * H,
        2 * g * A * D * H,
        loop.up,
    )
    down = {"bias_EN": i.b2}
    yield Kernel(
        "down",
        lambda: grouped_ffn.linear(a, i.w2, i.index[0], **down),
        n * A * (H + D) + weight,
        2 * A * D * H,
        lambda: on_torch("grouped_linear", a, i.index[0], i.w2, i.b2, "torch"),
    )
    yield Kernel(
        "combine",
        lambda: rows.combine(i.rows_AD, *i.index[1:], True),
        n * A * D + tokens + 4 * A,
        0,
        lambda: on_torch("combine", i.rows_AD, *i.index[1:], True),
    )
    yield Kernel(
        "combine backward",
        lambda: rows.combine_backward(i.d_y_TD, *i.index[1:3], True),
        tokens + n * A * D + 4 * A,
        0,
        lambda: on_torch("combine_backward", i.d_y_TD, *i.index[1:3], True),
    )

    kept = i.activation_gradient(h, u)
    yield Kernel(
        "activation gradient",
        lambda: (lambda r: (r.d_h_AH, r.d_u_AH, r.a_AH))(i.activation_gradient(h, u)),
        tokens + weight + n * (2 * g + 1) * A * H,
        2 * A * D * H,
        lambda: loop.activation_gradient(h, u),
    )
    yield Kernel(
        "weight gradient, first",
        lambda: grouped_ffn.weight_gradient(i.x_TD, kept.d_h_AH, i.index, i.w1, i.b1, a_from_tokens=True)[0],
        tokens + n * A * H + weight,
        2 * A * D * H,
        lambda: loop.weight_gradient(i.x_TD[loop.token_A], kept.d_h_AH),
    )
    yield Kernel(
        "weight gradient, second",
        lambda: grouped_ffn.weight_gradient(kept.a_AH, i.d_y_TD, i.index, i.w2, b_from_tokens=True)[0],
        tokens + n * A * H + weight,
        2 * A * D * H,
        lambda: loop.weight_gradient(kept.a_AH, i.d_y_TD[loop.token_A]),
    )
    yield Kernel(
        "rows of the tokens' gradient",
        lambda: grouped_ffn.token_rows(kept, i.w1, i.w3, i.index[0]),
        g * (n * A * H + weight) + n * A * D,
        2 * g * A * D * H,
        lambda: (
            loop.linear(kept.d_h_AH, i.w1.transpose(1, 2))
            + (0 if i.w3 is None else loop.linear(kept.d_u_AH, i.w3.transpose(1, 2)))
        ),
    )
    d_rows = grouped_ffn.token_rows(kept, i.w1, i.w3, i.index[0])
    unit_ED, _ = router_gradient.unit_vectors(i.w_DE)
    parts = kept.d_gate_parts_AN
    yield Kernel(
        "token gradient",
        lambda: router_gradient.token_gradient(
            d_rows, i.x_TD, i.d_y_TD, i.b2, parts, i.router, i.index, unit_ED, False
        ),
        n * A * D + (2 + (i.b2 is not None)) * tokens + parts.numel() * 4 + 12 * T * E,
        0,
        lambda: loop.token_gradient(d_rows, parts),
    )
    d_cos = torch.randn_like(i.score_TE)
    yield Kernel(
        "routing vectors' gradient",
        lambda: score_gradient.unit_gradient(d_cos, i.x_TD, i.inv_norm_T)[0].sum(dim=0),  # over its chunks
        tokens + 4 * T * E + 4 * D * E,
        2 * T * D * E,
        lambda: d_cos.t() @ i.x_TD.float(),
    )


def grouped_mm_of(inputs: Inputs) -> Iterator[Kernel]:
    """The products by torch.nn.functional.grouped_mm, on contiguous rows and without what our kernels fuse with them:
    gathering, biases, activations."""
    i, s, loop = inputs, inputs.shape, Loop(inputs)
    D, H, A, n = s.D, s.H, inputs.A, inputs.x_TD.element_size()
    x, a, ends = i.rows_AD, i.hidden_AH, i.index[0][1:]
    ups = [w for w in (i.w1, i.w3) if w is not None]
    rows_D, rows_H, weight, g = n * A * D, n * A * H, n * s.E * D * H, len(ups)

    def linear(rows: Tensor, weights: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        return (
            lambda: [F.grouped_mm(rows, w, offs=ends) for w in weights],
            lambda: [loop.linear(rows, w) for w in weights],
        )

    def weight_gradient(left: Tensor, right: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
        return lambda: F.grouped_mm(left.t(), right, offs=ends), lambda: loop.weight_gradient(left, right)

    calls = {
        "up": (rows_D + g * (weight + rows_H), g, linear(x, ups)),
        "down": (rows_H + weight + rows_D, 1, linear(a, [i.w2])),
        "activation gradient": (rows_D + weight + rows_H, 1, linear(x, [i.w2.transpose(1, 2)])),
        "weight gradient, first": (rows_D + rows_H + weight, 1, weight_gradient(x, a)),
        "weight gradient, second": (rows_H + rows_D + weight, 1, weight_gradient(a, x)),
        "rows of the tokens' gradient": (
            rows_H + g * (weight + rows_D),
            g,
            linear(a, [w.transpose(1, 2) for w in ups]),
        ),
    }
    for name in PRODUCTS:
        size, products, (run, expected) = calls[name]
        yield Kernel(f"{name}: grouped_mm", run, size, 2 * products * A * D * H, expected)
