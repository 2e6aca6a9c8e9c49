"""The executable specification of the DynMoE layer: the design, section 3 in float64, loops over tokens and experts.

It imports torch and nothing of the package; tests compare every path of the package with it.
Suffixes: T tokens, D model dim, O output dim, E slots. Gradients are written out; autograd has one expert at one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    w_DE: Tensor
    G_E: Tensor
    active: Sequence[int]  # the slots with experts_mask 1, ascending
    temperature: float | None = None  # None: tau is 1
    shift: float = 0.0  # of a budget, added to every threshold
    max_k: int | None = None  # of a budget

    @property
    def tau(self) -> float:
        return 1.0 if self.temperature is None else math.exp(min(self.temperature, math.log(100.0)))


@dataclass(frozen=True)
class Experts:
    function: Callable[..., Tensor]  # function(x_D, *parameters of one slot) -> y_O
    parameters: Sequence[Sequence[Tensor]]  # of every slot

    def __call__(self, e: int, x_D: Tensor) -> Tensor:
        return self.function(x_D, *self.parameters[e])

    def vjp(self, e: int, x_D: Tensor, dy_O: Tensor) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (x_D, *self.parameters[e])]
        return torch.autograd.grad(self.function(*inputs), inputs, dy_O)


def ffn(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x_D, w1_HD, b1_H, w2_HO, b2_O: activation(x_D @ w1_HD.T + b1_H) @ w2_HO + b2_O


def llama_ffn(x_D: Tensor, w1_DH: Tensor, w2_DH: Tensor, w3_HO: Tensor) -> Tensor:
    return (torch.nn.functional.silu(x_D @ w1_DH) * (x_D @ w2_DH)) @ w3_HO


def unit(v: Tensor) -> Tensor:
    """Rows scaled to length 1; a zero row stays zero."""
    norm = v.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, v / norm)


def cosine_gradient(v_D: Tensor, other_D: Tensor) -> Tensor:
    """Gradient of cos(v, other) in v, zero for a zero vector."""
    across_D = unit(other_D) - (unit(v_D) @ unit(other_D)) * unit(v_D)
    return across_D / v_D.norm() if v_D.any() else 0 * v_D


def cosines(x_TD: Tensor, gate: Gate) -> Tensor:
    return unit(x_TD) @ unit(gate.w_DE.T).T


def scores(x_TD: Tensor, gate: Gate) -> Tensor:
    return torch.sigmoid(gate.tau * cosines(x_TD, gate))


def thresholds(gate: Gate) -> Tensor:
    return torch.sigmoid(gate.tau * (gate.G_E + gate.shift))


def passes(x_TD: Tensor, gate: Gate) -> Tensor:
    """p[t, e]: the slot is active, and the score exceeds its threshold (tau > 0: cosine - G > shift) or its w or G is
    NaN. Who exceeds a threshold without its shift keeps the best by cosine - G; of more than `max_k` the best stay."""
    margin_TE = (cosines(x_TD, gate) - gate.G_E)[:, list(gate.active)]
    broken_E = (unit(gate.w_DE.T).sum(dim=1) + gate.G_E).isnan()[list(gate.active)]
    p_TE = torch.zeros(len(x_TD), len(gate.G_E), dtype=torch.bool)
    for t, margin in enumerate(margin_TE.masked_fill(broken_E, math.inf).tolist()):
        best = sorted(zip(margin, gate.active, strict=True), key=lambda pair: -pair[0])
        kept = [e for m, e in best if m > gate.shift] or [e for m, e in best[:1] if m > 0]
        p_TE[t, kept[: gate.max_k]] = True
    return p_TE


def assignments(x_TD: Tensor, gate: Gate, training: bool = True) -> Tensor:
    """A token that passes none, in training only if it is not finite, goes to its best active expert, or the first."""
    a_TE, cos_TE = passes(x_TD, gate), cosines(x_TD, gate)
    for t in range(len(x_TD)):
        if not a_TE[t].any() and not (training and x_TD[t].isfinite().all()):
            a_TE[t, max(gate.active, key=cos_TE[t].tolist().__getitem__)] = True
    return a_TE


def forward(x_TD: Tensor, gate: Gate, experts: Experts, training: bool) -> Tensor:
    """y_t, the mean of the token's experts, 0 for a token without experts."""
    a_TE = assignments(x_TD, gate, training)
    y_TO = x_TD.new_zeros(len(x_TD), len(experts(0, x_TD.new_zeros(x_TD.shape[1]))))
    for t, e in a_TE.nonzero().tolist():
        y_TO[t] += experts(e, x_TD[t]) / int(a_TE[t].sum())
    return y_TO


def gate_backward(x_TD: Tensor, gate: Gate, ds_TE: Tensor) -> dict[str, Any]:
    """Gradients of x, w, G, temperature from dL/ds, with dL/dtheta[e] = -sum_t dL/ds[t, e]."""
    cos_TE, score_TE, theta_E, tau, dtau = cosines(x_TD, gate), scores(x_TD, gate), thresholds(gate), gate.tau, 0.0
    dx_TD, dw_DE, dG_E = (torch.zeros_like(tensor) for tensor in (x_TD, gate.w_DE, gate.G_E))
    for t, e in ds_TE.nonzero().tolist():
        via_score = float(ds_TE[t, e] * score_TE[t, e] * (1 - score_TE[t, e]))
        via_theta = float(-ds_TE[t, e] * theta_E[e] * (1 - theta_E[e]))
        dx_TD[t] += via_score * tau * cosine_gradient(x_TD[t], gate.w_DE[:, e])
        dw_DE[:, e] += via_score * tau * cosine_gradient(gate.w_DE[:, e], x_TD[t])
        dG_E[e] += via_theta * tau
        dtau += via_score * float(cos_TE[t, e]) + via_theta * float(gate.G_E[e] + gate.shift)
    free = gate.temperature is not None and gate.temperature < math.log(100.0)
    return {"x": dx_TD, "w": dw_DE, "G": dG_E, "temperature": dtau * tau if free else 0.0}


def backward(
    x_TD: Tensor, gate: Gate, experts: Experts, dy_TO: Tensor, training: bool, combine_gradient: str
) -> dict[str, Any]:
    """Gradients of `gate_backward`, and of the experts' parameters by slot."""
    passed_TE, chosen_TE = passes(x_TD, gate), assignments(x_TD, gate, training)
    y_TO, ds_TE, dx_TD = forward(x_TD, gate, experts, training), 0 * cosines(x_TD, gate), 0 * x_TD
    dparameters = [[torch.zeros_like(parameter) for parameter in slot] for slot in experts.parameters]
    for t, e in chosen_TE.nonzero().tolist():
        k = int(chosen_TE[t].sum())
        dx_D, *dslot = experts.vjp(e, x_TD[t], dy_TO[t] / k)
        dx_TD[t] += dx_D
        dparameters[e] = [total + part for total, part in zip(dparameters[e], dslot, strict=True)]
        if passed_TE[t, e]:  # a fallback passed no threshold: its score and threshold learn nothing
            centre_O = y_TO[t] if combine_gradient == "normalized" else torch.zeros_like(y_TO[t])
            ds_TE[t, e] = dy_TO[t] @ (experts(e, x_TD[t]) - centre_O) / k
    through_gate = gate_backward(x_TD, gate, ds_TE)
    return {**through_gate, "x": through_gate["x"] + dx_TD, "parameters": dparameters}


def losses(x_TD: Tensor, gate: Gate) -> dict[str, tuple[float, Tensor, Tensor]]:
    """Name -> (value, its direct gradient in w [D, E], its gradient in the assignments [T, E], 0 outside these).

    The last goes straight through: `gate_backward(x, gate, da)`. No loss counts an unrouted token.
    """
    a_TE, score_TE, active, w_ED = passes(x_TD, gate), scores(x_TD, gate), gate.active, gate.w_DE.T
    T, E = a_TE.shape
    first = {t: max(range(E), key=(score_TE[t] * a_TE[t]).tolist().__getitem__) for t in range(T) if a_TE[t].any()}
    names = ("diversity", "simplicity", "load_balance", "efficiency", "gshard")
    value, dw = dict.fromkeys(names, 0.0), {name: torch.zeros_like(gate.w_DE) for name in names}
    da = {name: torch.zeros_like(score_TE) for name in names}
    cos_EE, pairs = unit(w_ED) @ unit(w_ED).T, [(i, j) for i in active for j in active if i != j]
    value["diversity"] = math.sqrt(sum(float(cos_EE[i, j]) ** 2 for i, j in pairs))  # W'W - I has no diagonal
    for i, j in pairs:
        slope = 2 * float(cos_EE[i, j]) / max(value["diversity"], 1e-300)
        dw["diversity"][:, i] += slope * cosine_gradient(w_ED[i], w_ED[j])
    for e in active:
        value["simplicity"] += float(w_ED[e].norm()) / len(active)
        dw["simplicity"][:, e] = unit(w_ED[e]) / len(active)
        load = sum(float(a_TE[t, e]) for t in first) / max(len(first), 1)
        share = sum(float(a_TE[t, e]) / int(a_TE[t].sum()) for t in first) / max(len(first), 1)
        firsts = list(first.values()).count(e) * len(active) / max(T, 1) ** 2
        value["load_balance"] += E * share * load
        for t in a_TE[:, e].nonzero().flatten().tolist():
            value["efficiency"] += 1 / (T * E)
            value["gshard"] += firsts
            k = int(a_TE[t].sum())
            for i in a_TE[t].nonzero().flatten().tolist():  # of share alone: the load is a constant here
                da["load_balance"][t, i] += E * load * ((i == e) / k - 1 / k**2) / len(first)
            da["efficiency"][t, e] = 1 / (T * E)
            da["gshard"][t, e] = firsts
    return {name: (value[name], dw[name], da[name]) for name in names}


def index(a_TE: Tensor) -> dict[str, list[int]]:
    """Both CSR directions of the assignments: rows are expert-major, in token order inside an expert."""
    rows = a_TE.T.nonzero().tolist()  # (expert, token), ascending
    return {
        "token_of_row": [t for _, t in rows],
        "row_of_assignment": [rows.index([e, t]) for t, e in a_TE.nonzero().tolist()],
        "expert_offsets": [sum(e < bound for e, _ in rows) for bound in range(a_TE.shape[1] + 1)],
        "token_offsets": [sum(t < bound for _, t in rows) for bound in range(a_TE.shape[0] + 1)],
    }


def adapt(batches: Sequence[Tensor], gate: Gate) -> tuple[Gate, list[int], int | None, int | None]:
    """Policy "dynmoe" over training batches: the gate after it, pruned slots, the grown slot, its nearest parent."""
    x_TD = torch.cat([gate.w_DE.T[:0], *batches])
    a_TE = assignments(x_TD, gate)
    unrouted_ND = x_TD[~a_TE.any(dim=1)]
    sum_D = unrouted_ND.sum(dim=0)
    kept = [e for e in gate.active if a_TE[:, e].any() or not len(x_TD)] or [gate.active[0]]
    pruned = [e for e in gate.active if e not in kept]
    free = [e for e in range(len(gate.G_E)) if e not in kept]
    if not free or sum_D.norm() <= 1e-6 * unrouted_ND.norm(dim=1).sum():  # none unrouted, or they cancel
        return replace(gate, active=kept), pruned, None, None
    slot, parent = free[0], max(kept, key=(unit(gate.w_DE.T) @ sum_D).tolist().__getitem__)
    w_DE, G_E = gate.w_DE.clone(), gate.G_E.clone()
    w_DE[:, slot], G_E[slot] = unit(sum_D), 0.0
    return replace(gate, w_DE=w_DE, G_E=G_E, active=sorted([*kept, slot])), pruned, slot, parent
