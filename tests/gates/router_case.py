"""A layer with a gate of `router_oracles`, its tokens, and the comparison of output and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import router_oracles
import torch
import torch.nn.functional as F
from helpers import FFN, FP64, MARGIN, gradients, oracle_experts, relative_rms
from router_oracles import Choice
from torch import Tensor

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive import Budgets

D, H, T = 12, 10, 24
LOSS = 0.3  # weight of l_aux
KINDS: dict[str, dict[str, Any]] = {  # one configuration of each gate, for what all have in common
    "relu": {"target_k": 2.0, "coefficient": 0.1},
    "top_p": {"p": 0.9},
    "expert_threshold": {"target_k": 2.0},
    "null_experts": {"k": 3, "target_k": 1.5},
    "quantile_top_k": {"k": 2},
    "top_p with a target": {"type": "top_p", "target_k": 2.0, "p": 0.9},
}


def gate_type(kind: str, **more: Any) -> dict[str, Any]:
    """The configuration `kind` of KINDS, with more keys."""
    return {"type": kind, **KINDS[kind], **more}


def make_layer(gate: dict[str, Any], E: int = 5, seeds: Any = (1, 2), scale: float = 3.0, **options: Any) -> MoELayer:
    """A layer of gelu experts; `scale` multiplies the router's initial weights, so that scores differ."""
    experts = {"num_experts_per_device": E, "hidden_size_per_expert": H, "activation_fn": F.gelu}
    layer = MoELayer(gate, D, experts, seeds=seeds, **options)
    with torch.no_grad():
        for name, parameter in layer.gates.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(scale)
    return layer


def tokens(count: int = T, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def train(layer: MoELayer, steps: int, lr: float = 1e-3, aux: float = 1.0, count: int = 256) -> list[float]:
    """Mean k in each step of a training on tokens around a few centres, which have a direction in common."""
    generator = torch.Generator().manual_seed(0)
    centres, map_DD = torch.randn(4, D, generator=generator), torch.randn(D, D, generator=generator) / D**0.5
    optimizer, budgets, means = torch.optim.AdamW(layer.parameters(), lr=lr), Budgets(layer), []
    for _ in range(steps):
        x = 1 + centres[torch.randint(4, (count,), generator=generator)] + torch.randn(count, D, generator=generator)
        means.append(float(layer.route(x).k_per_token.float().mean()))
        y = layer(x)
        optimizer.zero_grad()
        ((y - x @ map_DD).square().mean() + aux * y.l_aux).backward()
        optimizer.step()
        budgets.step()
    return means


def worst_window(means: list[float], target: float, size: int = 50, after: int = 100) -> float:
    """The largest relative error of the mean over `size` steps, of all such windows after the first steps."""
    windows = torch.tensor(means[after:]).unfold(0, size, 1).mean(dim=1)
    return float((windows / target - 1).abs().max())


@dataclass
class Against:
    """The comparison of a layer with an oracle: `choose(logits [T, M])`, `through` for what lies before the logits."""

    choose: Callable[[Tensor], Choice]
    scale: float | None = None  # of standardised logits


def check(layer: MoELayer, x_TD: Tensor, against: Against, mask_T: Tensor | None = None) -> None:
    """Output, auxiliary terms and all gradients of a float64 layer equal the oracle's; padding gives 0."""
    gate, real_T = layer.gates[0], torch.ones(len(x_TD), dtype=torch.bool) if mask_T is None else mask_T
    x_TD, dy_TD = x_TD.clone().requires_grad_(), tokens(len(x_TD), seed=7)
    maps = [getattr(gate, name).weight.detach().clone() for name in gate.maps]
    w_MD, x_ND = torch.cat(maps), x_TD.detach()[real_T]
    z_NM, back = x_ND @ w_MD.T, None
    if against.scale is not None:
        z_NM, back = router_oracles.standardised(z_NM, against.scale)
    choice = against.choose(z_NM)
    assert choice.doubt > MARGIN, "a decision is too near to its threshold: take another seed"
    weights = {name: LOSS * weight for name, weight in layer._aux_weights[0].items()}
    y_ND, dx_ND, dz_NM, dparameters = router_oracles.layer(
        x_ND, choice, oracle_experts(layer.experts, "ffn", F.gelu), dy_TD[real_T], weights
    )
    expected: dict[str, Tensor] = {}
    if back is not None:
        dz_NM, d_scale = back(dz_NM)
        expected["gates.0.logit_scale"] = torch.tensor([d_scale], dtype=torch.float64)
    for name, part in zip(gate.maps, (dz_NM.T @ x_ND).split([len(m) for m in maps]), strict=True):
        expected[f"gates.0.{name}.weight"] = part
    for i, name in enumerate(FFN):
        expected[f"experts.{name}"] = torch.stack([slot[i] for slot in dparameters])
    expected["x"] = torch.zeros_like(x_TD).masked_scatter(real_T.unsqueeze(1), dx_ND + dz_NM @ w_MD)
    layer.zero_grad()
    y = layer(x_TD, token_mask=mask_T)
    assert relative_rms(y, torch.zeros_like(x_TD).masked_scatter(real_T.unsqueeze(1), y_ND)) < FP64
    assert layer.aux_terms.keys() == weights.keys()
    for name, value in layer.aux_terms.items():
        assert relative_rms(value, torch.tensor(choice.terms[name][0], dtype=torch.float64)) < 1e-12, name
    # the weighted loss is fp32: the terms are compared as they are
    ((y * dy_TD).sum() + sum(w * layer.aux_terms[n] for n, w in weights.items())).backward()
    found = gradients(layer, x_TD)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert relative_rms(value, expected[name]) < 1e-12, name
    routing = layer.route(x_TD.detach(), token_mask=mask_T)
    assert torch.equal(routing.assigned[real_T], choice.a_TE)
    assert not routing.assigned[~real_T].any()
    assert not routing.unrouted[~real_T].any()
