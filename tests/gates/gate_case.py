"""A layer with any gate, its tokens, and the comparison of output, loss and every gradient with plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe_tutel import moe

D, H = 12, 10
FFN = ("batched_fc1_w", "batched_fc1_bias", "batched_fc2_w", "batched_fc2_bias")


def layer_with(gate_type: Any, num_experts: int = 4, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A layer of gelu experts with weights from private generators."""
    options = {"seeds": (1, 2), **options}
    experts = {"num_experts_per_device": num_experts, "hidden_size_per_expert": H, "activation_fn": F.gelu}
    return moe.moe_layer(gate_type, D, experts, **options).to(dtype)


def tokens(T: int = 9, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_experts(x_TD: Tensor, params: list[Tensor]) -> Tensor:
    """All experts on all tokens, [T, E, D]."""
    w1, b1, w2, b2 = params
    h = F.gelu(torch.einsum("td,ehd->teh", x_TD, w1) + b1)
    return torch.einsum("teh,eho->teo", h, w2) + b2


def leaves(layer: Any, x_TD: Tensor) -> dict[str, Tensor]:
    """Copies of x and of every parameter, as leaves of a new graph."""
    named = {"x": x_TD, **dict(layer.named_parameters())}
    return {name: t.detach().clone().requires_grad_() for name, t in named.items()}


def check_against(layer: Any, x_TD: Tensor, naive: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]) -> None:
    """Output, loss and all gradients of the layer equal those of `naive`, which returns (weights [T, E], l_aux)."""
    x_TD = x_TD.clone().requires_grad_()
    mine, d_y = leaves(layer, x_TD), tokens(len(x_TD), seed=7)
    weights_TE, l_aux = naive(mine)
    expected = torch.einsum("te,teo->to", weights_TE, naive_experts(mine["x"], [mine[f"experts.{n}"] for n in FFN]))
    ((expected * d_y).sum() + 0.3 * l_aux).backward()
    y = layer(x_TD)
    assert torch.allclose(y, expected, rtol=1e-9, atol=1e-12)
    assert float(y.l_aux) == pytest.approx(float(l_aux), rel=1e-5)
    ((y * d_y).sum() + 0.3 * y.l_aux).backward()
    for name, t in {"x": x_TD, **dict(layer.named_parameters())}.items():
        if t.requires_grad:
            reference = mine[name].grad if mine[name].grad is not None else torch.zeros_like(mine[name])
            assert t.grad is not None, f"{name} got no gradient"
            # l_aux is fp32, so its share of a gradient is
            assert torch.allclose(t.grad, reference, rtol=1e-5, atol=1e-7), name
