"""Drop-in for `tutel.moe`: `from dynmoe_tutel import moe as tutel_moe`.

`moe_layer` builds a layer; `top_any_routing`, `fast_encode` and `fast_decode` are its parts for layers of one's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .layer import MoELayer
from .routing import Capacity, Routing

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
    if x.dim() != 2 or sim_matrix.dim() != 2 or x.shape[1] != sim_matrix.shape[0]:
        raise ValueError(f"x must be [T, D] and sim_matrix [D, E], got {list(x.shape)} and {list(sim_matrix.shape)}")
    E = sim_matrix.shape[1]
    mask = torch.ones(E, device=x.device) if experts_mask is None else experts_mask
    for name, tensor in (("gates", gates), ("experts_mask", mask)):
        if tensor.shape != (E,):
            raise ValueError(f"{name} must have shape [{E}], one entry an expert, got {list(tensor.shape)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    tau = torch.as_tensor(scale, device=x.device).to(dtype)
    score_TE, bits_TW, unrouted_T, _ = kernels.threshold_gate(x, sim_matrix, gates.detach(), mask > 0, tau, fallback)
    thresholds = torch.sigmoid(tau * gates.to(dtype))
    return Routing.from_bits(bits_TW, score_TE, unrouted=unrouted_T, thresholds=thresholds, capacity=capacity)


def fast_encode(data: Tensor, routing: Routing) -> Tensor:
    """Token rows [T, D] to expert rows [A, D], expert-major: the rows of expert e are
    routing.expert_offsets[e]:routing.expert_offsets[e + 1]."""
    return routing.dispatch(data)


def fast_decode(rows: Tensor, routing: Routing, combine_gradient: str = "mean") -> Tensor:
    """Expert rows [A, D] back to tokens [T, D], their mean (top-any) or weighted sum (fixed k), with gate gradient."""
    gate_A = routing.row_gates(combine_gradient)
    return routing.combine(rows * gate_A.unsqueeze(1).to(rows.dtype))
