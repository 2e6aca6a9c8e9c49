"""Drop-in for `tutel.moe`: `from dynmoe_tutel import moe as tutel_moe`.

`moe_layer` builds a layer; `top_any_routing`, `fast_encode` and `fast_decode` are its parts for layers of one's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .layer import MoELayer
from .options import number
from .routing import Capacity, Routing, check_capacity, describe

__all__ = ["MOELayer", "fast_decode", "fast_encode", "moe_layer", "top_any_routing"]

moe_layer = MoELayer
MOELayer = MoELayer  # Tutel's spelling


def top_any_routing(
    x: Tensor,
    sim_matrix: Tensor,
    gates: Tensor,
    experts_mask: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    fallback: bool = False,
    capacity: Capacity = "exact",
) -> Routing:
    """Route tokens x [T, D] by routing vectors sim_matrix [D, E] and thresholds gates [E] (before the sigmoid).

    `experts_mask` [E] is > 0 for active slots (default: all); `scale` is tau; `fallback` gives an unrouted token its
    best expert, as eval does. Differentiable in x, sim_matrix, gates and scale through the combine.
    """
    for name, tensor in (("x", x), ("sim_matrix", sim_matrix)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point matrix, got {describe(tensor)}")
    D, E = sim_matrix.shape
    if x.shape[1] != D:
        raise ValueError(f"x must be [T, D] and sim_matrix [D, E], got {list(x.shape)} and {list(sim_matrix.shape)}")
    mask = torch.ones(E, device=x.device) if experts_mask is None else experts_mask
    for name, tensor in (("gates", gates), ("experts_mask", mask)):
        if tensor.shape != (E,):
            raise ValueError(f"{name} must have shape [{E}], one entry an expert, got {list(tensor.shape)}")
    for name, tensor in (("sim_matrix", sim_matrix), ("gates", gates), ("experts_mask", mask)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move one with .to()")
    if fallback and not torch.compiler.is_compiling() and not (mask > 0).any():
        raise ValueError("experts_mask has no active expert to fall back to")
    check_capacity(capacity)
    dtype = kernels.gate_dtype(x)
    tau = _scale(scale).to(x.device, dtype)
    score_TE, bits_TW, unrouted_T, *_ = kernels.threshold_gate(x, sim_matrix, gates.detach(), mask > 0, tau, fallback)
    thresholds = torch.sigmoid(tau * gates.to(dtype))
    return Routing.from_bits(bits_TW, score_TE, unrouted=unrouted_T, thresholds=thresholds, capacity=capacity)


def _scale(scale: object) -> Tensor:
    """tau as a 0-dim tensor; ValueError unless it is one number above 0."""
    if not isinstance(scale, Tensor):
        return torch.tensor(number("scale", scale, 0, open_low=True), dtype=torch.float64)
    if scale.numel() != 1:
        raise ValueError(f"scale must be one number, got {list(scale.shape)}")
    return scale.reshape(())


def fast_encode(data: Tensor, routing: Routing) -> Tensor:
    """Token rows [T, D] to expert rows [A, D], expert-major: the rows of expert e are
    routing.expert_offsets[e]:routing.expert_offsets[e + 1]."""
    if data.dim() != 2 or data.shape[0] != routing.num_tokens:
        raise ValueError(f"data must be [T, D] with T = {routing.num_tokens} routed tokens, got {list(data.shape)}")
    return routing.dispatch(data)


def fast_decode(rows: Tensor, routing: Routing, combine_gradient: str = "mean") -> Tensor:
    """Expert rows [A, D] back to tokens [T, D], their mean (top-any) or weighted sum (fixed k), with gate gradient."""
    gate_A = routing.row_gates(combine_gradient)
    if rows.dim() != 2 or rows.shape[0] != gate_A.shape[0]:
        raise ValueError(f"rows must be [{gate_A.shape[0]}, D], a row an assignment, got {list(rows.shape)}")
    return routing.combine(rows * gate_A.unsqueeze(1).to(rows.dtype))
