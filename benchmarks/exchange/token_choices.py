"""The law by which a token chooses its experts: closed-form expectations, samples, and tokens that a gate routes so.

A token chooses the set S with probability P(k = |S|) times prod_{e in S} o_e / e_k(o), e_k the elementary symmetric
polynomial of the odds o: given k, it chooses experts independently. If k is the number of successes of independent
trials, experts are fully independent; a top-any gate does this to tokens of random direction. The same law takes any
other distribution of k; a fixed k is top-k. The fit and the sampling follow Chen, Dempster and Liu, Biometrika 81
(1994), "Weighted finite population sampling".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TAIL = 1e-15  # the probability to leave out of P(k): nothing in double precision


def skewed_loads(num_experts: int, mean_k: float, skew: float) -> Tensor:
    """P(token activates e), [E] float64: sum `mean_k`, largest over mean `skew`, falling geometrically with the expert.

    Experts get their slots with a stride, so that no block of slots holds only popular ones: ranks are about equally
    busy, and a token's experts spread over as many ranks as these loads allow.
    """
    mean = mean_k / num_experts
    if not 0 < mean * skew <= 1 or not 1 <= skew <= num_experts:
        raise ValueError(
            f"skew = {skew} with mean k {mean_k} of {num_experts} experts: mean load times skew must be at "
            f"most 1, and skew from 1 to {num_experts}"
        )
    place_E = torch.arange(num_experts, dtype=torch.float64)
    low, high = 0.0, 50.0 * num_experts
    for _ in range(200):  # bisect the rate at which the largest is `skew` times the mean
        rate = (low + high) / 2
        falling_E = torch.exp(-rate * place_E / num_experts)
        low, high = (rate, high) if falling_E[0] / falling_E.mean() < skew else (low, rate)
    load_E = mean_k * falling_E / falling_E.sum()
    stride = max(1, math.isqrt(num_experts))
    return load_E[torch.cat([torch.arange(i, num_experts, stride) for i in range(stride)])]


def successes(p_E: Tensor) -> Tensor:
    """P(k) of independent trials, [K+1] float64, without the negligible tail."""
    pmf = torch.zeros(len(p_E) + 1, dtype=torch.float64)
    pmf[0] = 1
    for p in p_E.tolist():
        pmf[1:] = pmf[1:] * (1 - p) + pmf[:-1] * p
        pmf[0] *= 1 - p
    last = int((pmf > TAIL).nonzero()[-1])
    return pmf[: last + 1] / pmf[: last + 1].sum()


def fixed(k: int) -> Tensor:
    """P(k) of a token that always takes k experts."""
    pmf = torch.zeros(k + 1, dtype=torch.float64)
    pmf[k] = 1
    return pmf


def _polynomials(odds_E: Tensor, member_BE: Tensor, degree: int) -> Tensor:
    """e_0 ... e_degree of the odds of each row's members, [B, degree + 1]."""
    e_BK = torch.zeros(len(member_BE), degree + 1, dtype=torch.float64)
    e_BK[:, 0] = 1
    for odds, member_B in zip(odds_E, member_BE.t(), strict=True):
        e_BK[:, 1:] += (odds * member_B).unsqueeze(1) * e_BK[:, :-1]
    return e_BK


@dataclass(frozen=True)
class Choice:
    """The law of a token's set of experts: odds [E] and P(k) [K+1], both float64."""

    odds: Tensor
    k_pmf: Tensor

    @classmethod
    def of_loads(cls, load_E: Tensor, k_pmf: Tensor | None = None) -> Choice:
        """The law under which expert e has probability load_E[e]; without `k_pmf`, experts are independent."""
        odds_E = load_E / (1 - load_E).clamp(min=1e-9)
        if k_pmf is None:
            return cls(odds_E, successes(load_E))
        mean_k = float(k_pmf @ torch.arange(len(k_pmf), dtype=torch.float64))
        if abs(mean_k - float(load_E.sum())) > 1e-9 * mean_k or len(k_pmf) > len(load_E) + 1:
            raise ValueError(f"k_pmf has the mean {mean_k:g}, load_E the sum {float(load_E.sum()):g}: give equal ones")
        for _ in range(500):
            choice = cls(odds_E, k_pmf)
            load = choice.loads()
            if (load / load_E - 1).abs().max() < 1e-12:
                break
            odds_E = odds_E * load_E / load
        return choice

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.odds)

    def _given_k(self) -> Tensor:
        """P(k) / e_k, [K+1]."""
        everyone = torch.ones(1, self.num_experts, dtype=torch.float64)
        return self.k_pmf / _polynomials(self.odds, everyone, len(self.k_pmf) - 1)[0]

    def loads(self) -> Tensor:
        """P(token activates e), [E]."""
        odds_U, which_E = self.odds.unique(return_inverse=True)  # experts of equal odds have equal loads
        first_U = (which_E == torch.arange(len(odds_U)).unsqueeze(1)).int().argmax(dim=1)
        others_UE = torch.ones(len(odds_U), self.num_experts, dtype=torch.float64).scatter_(1, first_U[:, None], 0)
        e_UK = _polynomials(self.odds, others_UE, len(self.k_pmf) - 1)
        return (odds_U * (e_UK[:, :-1] @ self._given_k()[1:]))[which_E]

    def touched(self, ranks: int) -> Tensor:
        """P(token activates an expert on rank r), [R]; a rank holds a block of E / R slots."""
        outside = 1 - torch.block_diag(*[torch.ones(1, self.num_experts // ranks)] * ranks).double()
        return 1 - _polynomials(self.odds, outside, len(self.k_pmf) - 1) @ self._given_k()

    def sample(self, tokens: int, generator: torch.Generator) -> Tensor:
        """The sets of `tokens` tokens, [T, E] bool."""
        left_T = torch.multinomial(self.k_pmf, tokens, replacement=True, generator=generator) if tokens else None
        assigned_TE = torch.zeros(tokens, self.num_experts, dtype=torch.bool)
        if left_T is None:
            return assigned_TE
        prefix = torch.tril(torch.ones(self.num_experts + 1, self.num_experts, dtype=torch.float64), -1)
        e_EK = _polynomials(self.odds, prefix, len(self.k_pmf) - 1)  # over the experts before e
        for e in reversed(range(self.num_experts)):
            taken = self.odds[e] * e_EK[e, (left_T - 1).clamp(min=0)] / e_EK[e + 1, left_T]
            drawn_T = torch.rand(tokens, dtype=torch.float64, generator=generator)
            assigned_TE[:, e] = (left_T > 0) & (drawn_T < taken)
            left_T = left_T - assigned_TE[:, e].long()
        return assigned_TE


def tokens_of(assigned_TE: Tensor, w_DE: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens [T, D] that a top-any gate with the orthonormal vectors `w_DE` and thresholds 0 routes as `assigned_TE`.

    All cosines with experts have one size, positive if assigned; the rest of a token is noise.
    """
    (T, E), D = assigned_TE.shape, w_DE.shape[0]
    if E > D:
        raise ValueError(f"{E} experts and D = {D}: vectors can be orthonormal up to D of them")
    x_TD = torch.randn(T, D, generator=generator)
    return x_TD - (x_TD @ w_DE) @ w_DE.t() + (2.0 * assigned_TE - 1) @ w_DE.t()
