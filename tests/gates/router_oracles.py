"""The gates that weight experts by their scores as code: float64 loops over tokens and experts, gradients written out.

It imports torch, `oracle` for the experts, and nothing of the package. T tokens, E experts, M candidates (experts, then
null ones), S the experts of a token. A router is a function from logits [T, M] to a `Choice`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import oracle
import torch
from torch import Tensor


@dataclass
class Choice:
    a_TE: Tensor  # bool
    w_TE: Tensor  # combine weights, 0 outside the assignments
    through: Callable[[Tensor], Tensor]  # dL/dw [T, E] to dL/dlogits [T, M]
    terms: dict[str, tuple[float, Tensor]] = field(default_factory=dict)  # auxiliary loss, its dL/dlogits [T, M]
    doubt: float = math.inf  # the least distance of a decision from flipping


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def softmax(z_M: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in z_M)
    return [math.exp(z) / total for z in z_M]


def best_first(values: list[float]) -> list[int]:
    """Of equal ones the first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def gap(values: list[float], k: int) -> float:
    """Between the k-th best and the next."""
    ordered = sorted(values, reverse=True)
    return ordered[k - 1] - ordered[k] if k < len(ordered) else math.inf


def through_softmax(p_M: list[float], dp_M: list[float]) -> list[float]:
    mean = sum(p * dp for p, dp in zip(p_M, dp_M, strict=True))
    return [p * (dp - mean) for p, dp in zip(p_M, dp_M, strict=True)]


def _empty(z_TM: Tensor, E: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(z_TM), E, dtype=torch.bool), torch.zeros(len(z_TM), E, dtype=torch.float64)


def _each(dw_TE: Tensor, of_token: Callable[[int, list[float]], list[float]]) -> Tensor:
    rows = [of_token(t, dw) for t, dw in enumerate(dw_TE.tolist())]
    return torch.tensor(rows, dtype=torch.float64)


def relu(z_TE: Tensor, coefficient: float, target_k: float, max_k: int | None = None) -> Choice:
    """S: positive logits, of these the `max_k` largest; the weight is the logit."""
    T, E = z_TE.shape
    a_TE, w_TE = _empty(z_TE, E)
    doubt = float(z_TE.abs().min()) if T else math.inf
    positive = [[z > 0 for z in row] for row in z_TE.tolist()]
    for t, row in enumerate(z_TE.tolist()):
        chosen = [e for e in best_first(row) if row[e] > 0]
        if max_k is not None and len(chosen) > max_k:
            doubt = min(doubt, gap(row, max_k))
        for e in chosen[:max_k]:
            a_TE[t, e], w_TE[t, e] = True, row[e]
    load_E = [sum(positive[t][e] for t in range(T)) / max(T, 1) for e in range(E)]
    weight_E = [sum(max(z_TE[t, e].item(), 0) for t in range(T)) / max(T, 1) for e in range(E)]
    balanced, balanced_TE = 0.0, torch.zeros_like(z_TE)
    plain, plain_TE = 0.0, torch.zeros_like(z_TE)
    for e in range(E):
        balanced += coefficient * E / target_k * load_E[e] * weight_E[e]
        plain += coefficient * weight_E[e]
        for t in range(T):
            if positive[t][e]:
                balanced_TE[t, e] = coefficient * E / target_k * load_E[e] / T
                plain_TE[t, e] = coefficient / T
    terms = {"balanced_l1": (balanced, balanced_TE), "l1": (plain, plain_TE)}
    return Choice(a_TE, w_TE, lambda dw_TE: dw_TE * a_TE, terms, doubt)


def top_p(z_TE: Tensor, p: float, max_k: int | None = None) -> Choice:
    """S: the best experts until their probabilities sum to p; the weight is the probability."""
    T, E = z_TE.shape
    a_TE, w_TE = _empty(z_TE, E)
    p_TE, doubt = [softmax(row) for row in z_TE.tolist()], math.inf
    for t, row in enumerate(p_TE):
        total = 0.0
        for number, e in enumerate(best_first(row)):
            if number:
                doubt = min(doubt, abs(total - p))
                if total >= p or number == max_k:
                    break
            a_TE[t, e], w_TE[t, e] = True, row[e]
            total += row[e]
        doubt = min(doubt, min((a - b for a, b in zip(sorted(row)[1:], sorted(row), strict=False)), default=doubt))
    load_E = (a_TE.double().sum(dim=0) / max(T, 1)).tolist()
    balance = sum(E * load_E[e] * sum(row[e] for row in p_TE) / max(T, 1) for e in range(E))
    entropy_T = [-sum(q * math.log(q) for q in row) for row in p_TE]
    d_balance = [through_softmax(row, [E * load / T for load in load_E]) for row in p_TE]
    d_entropy = [[-q * (math.log(q) + h) / T for q in row] for row, h in zip(p_TE, entropy_T, strict=True)]
    terms = {
        "load_balance": (balance, torch.tensor(d_balance, dtype=torch.float64).view(T, E)),
        "entropy": (sum(entropy_T) / max(T, 1), torch.tensor(d_entropy, dtype=torch.float64).view(T, E)),
    }

    def through(t: int, dw_E: list[float]) -> list[float]:
        return through_softmax(p_TE[t], dw_E)

    return Choice(a_TE, w_TE, lambda dw_TE: _each(dw_TE * a_TE, through), terms, doubt)


def expert_threshold(z_TE: Tensor, threshold_E: list[float], training: bool, max_k: int | None = None) -> Choice:
    """S: scores above their expert's threshold; in eval the best one where there is none; the weight is the score."""
    a_TE, w_TE = _empty(z_TE, z_TE.shape[1])
    s_TE, doubt = [[sigmoid(z) for z in row] for row in z_TE.tolist()], math.inf
    for t, row in enumerate(s_TE):
        doubt = min([doubt, *(abs(s - c) for s, c in zip(row, threshold_E, strict=True))])
        chosen = [e for e in best_first(row) if row[e] > threshold_E[e]][:max_k]
        for e in chosen or ([] if training else best_first(row)[:1]):
            a_TE[t, e], w_TE[t, e] = True, row[e]
    return Choice(
        a_TE,
        w_TE,
        lambda dw_TE: _each(dw_TE * a_TE, lambda t, dw: [d * s * (1 - s) for d, s in zip(dw, s_TE[t], strict=True)]),
        {},
        doubt,
    )


def null_experts(z_TM: Tensor, E: int, k: int, bias: float, normalized: bool = True) -> Choice:
    """S: the experts among the k best of all, null ones raised by the bias; softmax over all, as shares of S."""
    T, M = z_TM.shape
    a_TE, w_TE = _empty(z_TM, E)
    load_M, p_TM, doubt = [0.0] * M, [softmax(row) for row in z_TM.tolist()], math.inf
    for t, row in enumerate(z_TM.tolist()):
        raised = [z + (bias if m >= E else 0.0) for m, z in enumerate(row)]
        best, doubt = best_first(raised)[:k], min(doubt, gap(raised, k))
        chosen = [m for m in best if m < E]
        total = sum(p_TM[t][e] for e in chosen) if normalized and k > 1 else 1.0
        for e in chosen:
            a_TE[t, e], w_TE[t, e] = True, p_TM[t][e] / total
        for m in best:
            load_M[m] += 1 / T
    for m in range(E, M):
        load_M[m] = sum(load_M[E:]) / (M - E) if m == E else load_M[E]
    value = sum(M * load_M[m] * sum(p[m] for p in p_TM) / max(T, 1) for m in range(M))
    d_balance = [through_softmax(p, [M * load / T for load in load_M]) for p in p_TM]

    def through(t: int, dw_E: list[float]) -> list[float]:
        null = [0.0] * (M - E)
        if normalized and k > 1:
            return through_softmax(w_TE[t].tolist(), dw_E) + null
        return through_softmax(p_TM[t], dw_E + null)

    terms = {"load_balance": (value, torch.tensor(d_balance, dtype=torch.float64).view(T, M))}
    return Choice(a_TE, w_TE, lambda dw_TE: _each(dw_TE * a_TE, through), terms, doubt)


def quantile_top_k(z_TE: Tensor, k: int, bias_E: list[float], normalized: bool = True) -> Choice:
    """S: the k largest of sigmoid + bias; the weights are the sigmoids as shares of their sum over S."""
    a_TE, w_TE = _empty(z_TE, z_TE.shape[1])
    s_TE, doubt = [[sigmoid(z) for z in row] for row in z_TE.tolist()], math.inf
    total_T = []
    for t, row in enumerate(s_TE):
        biased = [s + b for s, b in zip(row, bias_E, strict=True)]
        best, doubt = best_first(biased)[:k], min(doubt, gap(biased, k))
        total_T.append(sum(row[e] for e in best) if normalized and k > 1 else 1.0)
        for e in best:
            a_TE[t, e], w_TE[t, e] = True, row[e] / total_T[t]

    def through(t: int, dw_E: list[float]) -> list[float]:
        w_E = w_TE[t].tolist()
        mean = sum(w * dw for w, dw in zip(w_E, dw_E, strict=True)) if normalized and k > 1 else 0.0
        return [(dw_E[e] - mean) / total_T[t] * s * (1 - s) if a_TE[t, e] else 0.0 for e, s in enumerate(s_TE[t])]

    return Choice(a_TE, w_TE, lambda dw_TE: _each(dw_TE * a_TE, through), {}, doubt)


def standardised(z_TE: Tensor, scale: float) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, float]]]:
    """scale (z - mean) / sqrt(var + 1e-5) over a token's experts; from its gradient those of z and of the scale."""
    unit_TE, width_T = torch.zeros_like(z_TE), []
    E = z_TE.shape[1]
    for t, row in enumerate(z_TE.tolist()):
        mean = sum(row) / E
        width_T.append(math.sqrt(sum((z - mean) ** 2 for z in row) / E + 1e-5))
        unit_TE[t] = torch.tensor([(z - mean) / width_T[t] for z in row], dtype=torch.float64)

    def backward(d_TE: Tensor) -> tuple[Tensor, float]:
        dz_TE = torch.zeros_like(z_TE)
        for t, (d, u) in enumerate(zip(d_TE.tolist(), unit_TE.tolist(), strict=True)):
            mean = sum(d) / E
            along = sum(a * b for a, b in zip(d, u, strict=True)) / E
            dz = [scale * (a - mean - b * along) / width_T[t] for a, b in zip(d, u, strict=True)]
            dz_TE[t] = torch.tensor(dz, dtype=torch.float64)
        return dz_TE, float((d_TE * unit_TE).sum())

    return scale * unit_TE, backward


def layer(
    x_TD: Tensor, choice: Choice, experts: oracle.Experts, dy_TO: Tensor, aux: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor, list[list[Tensor]]]:
    """y, the experts' part of dL/dx, dL/dlogits [T, M] and dL/dparameters by slot; L = <dy, y> + sum of aux * term."""
    y_TO, dx_TD, dw_TE = torch.zeros_like(dy_TO), torch.zeros_like(x_TD), torch.zeros_like(choice.w_TE)
    dparameters = [[torch.zeros_like(parameter) for parameter in slot] for slot in experts.parameters]
    for t, e in choice.a_TE.nonzero().tolist():
        w, own_O = float(choice.w_TE[t, e]), experts(e, x_TD[t])
        y_TO[t] += w * own_O
        dw_TE[t, e] = dy_TO[t] @ own_O
        dx_D, *dslot = experts.vjp(e, x_TD[t], w * dy_TO[t])
        dx_TD[t] += dx_D
        dparameters[e] = [total + part for total, part in zip(dparameters[e], dslot, strict=True)]
    dz_TM = choice.through(dw_TE)
    for name, weight in aux.items():
        dz_TM = dz_TM + weight * choice.terms[name][1]
    return y_TO, dx_TD, dz_TM, dparameters
