"""Emulates the gate's arithmetic on matrix cores, which the interpreter lacks: decisions are right to the margin.

A matrix core adds 16 half-precision products and the running sum without rounding: it aligns them to the largest,
truncates them (here to fewer bits than any NVIDIA chip keeps), and truncates the sum to fp32.
"""

from __future__ import annotations

import pytest
import torch
from helpers import HAS_GPU, MARGIN
from torch import Tensor

from dynmoe_tutel.kernels.gpu import threshold_gate as gpu

GROUP, KEPT_BITS = 16, 23
T, E = 16, 8


def cut_off(value: Tensor, largest: Tensor) -> Tensor:
    """`value` truncated at the last bit of `largest`."""
    unit = torch.exp2(largest.abs().clamp(min=1e-300).log2().floor() - KEPT_BITS)
    return torch.trunc(value / unit) * unit


def cosines(x_TD: Tensor, w_DE: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """The cosines of `threshold_gate_kernel` on sm_90, from its own parts of the routing vectors."""
    tile = gpu._tile(16, dtype, parts, "sm_90")
    parts_PED, inv_norm_E = gpu._routing_vectors(w_DE, dtype, tile, parts)
    x_TD = torch.nn.functional.pad(x_TD.double(), (0, parts_PED.shape[2] - x_TD.shape[1]))
    sum_TE = torch.zeros(len(x_TD), w_DE.shape[1])
    for d0 in range(0, x_TD.shape[1], tile["BLOCK_D"]):
        step_TE = torch.zeros(sum_TE.shape, dtype=torch.float64)
        for part_ED in reversed(parts_PED[:, : w_DE.shape[1]].double().unbind()):
            for d in range(d0, d0 + tile["BLOCK_D"], GROUP):
                products = x_TD[:, None, d : d + GROUP] * part_ED[None, :, d : d + GROUP]
                terms = torch.cat([products, step_TE.unsqueeze(2)], dim=2)
                added = cut_off(terms, terms.abs().amax(dim=2, keepdim=True)).sum(dim=2)
                step_TE = cut_off(added, added)
        sum_TE += step_TE.float()
    inverse_T = (1 / x_TD.norm(dim=1)).float()
    return sum_TE * inverse_T[:, None] * inv_norm_E[: w_DE.shape[1]]


def hard_batches(D: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens [T, D] and routing vectors [D, E]: near 1, so that errors of one sign add up, or with few large terms."""
    generator = torch.Generator().manual_seed(D)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x_TD, w_DE = normal(T, D) / 100, normal(D, E) / 100
    x_TD[:, :2], w_DE[:2] = normal(T, 2), normal(2, E)
    direction_D = normal(D)
    return {
        "normal": (normal(T, D), normal(D, E)),
        "positive": (normal(T, D).abs() + 0.1, normal(D, E).abs() + 0.1),
        "two dimensions hold most": (x_TD, w_DE),
        "parallel": (direction_D * (1 + normal(T, D) / 1000), (direction_D[:, None] * (1 + normal(D, E) / 1000))),
        "constant": (1 + torch.arange(T)[:, None] / 64 * torch.ones(D), 1 + normal(E).abs() * torch.ones(D, 1)),
    }


@pytest.mark.skipif(HAS_GPU, reason="a GPU has matrix cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [97, 384, 2048])
def test_cosines_are_right_to_the_margin_of_a_decision(D: int, dtype: torch.dtype) -> None:
    """With the shipped number of parts; one less is wrong by 2e-5 in bf16 and by 4e-4 in fp16."""
    worst = [0.0, 0.0]
    for x_TD, w_DE in hard_batches(D).values():
        x_TD = x_TD.to(dtype)
        exact_TE = torch.nn.functional.cosine_similarity(x_TD.double()[:, None], w_DE.t().double()[None], dim=2)
        for i in range(2):
            found_TE = cosines(x_TD, w_DE, gpu._number_of_parts(dtype, w_DE.dtype) - i, dtype)
            worst[i] = max(worst[i], float((found_TE - exact_TE).abs().max()))
    assert worst[0] < MARGIN < worst[1], worst
