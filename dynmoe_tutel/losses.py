"""Auxiliary losses of gates: each is an unweighted 0-dim tensor in the dtype of its input.

Top-any terms: load balance and efficiency, from DynMoE's DeepSpeed implementation; diversity and simplicity need only
the routing vectors and are in `kernels.vector_losses`. Fixed-k terms, as in Tutel: GShard (arXiv 2006.16668), load and
importance (arXiv 1701.06538).
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance_loss(assigned_TE: Tensor) -> Tensor:
    """E * sum_e mean_t(a / k) * mean_t(a) over the tokens with k > 0; 0 if there is none.

    `assigned_TE` is 0/1 and carries the straight-through gradient into a / k, through a and through k; the load,
    mean_t(a), is a constant, as in DynMoE's DeepSpeed implementation.
    """
    k_T1 = assigned_TE.sum(dim=1, keepdim=True)
    num_routed = (k_T1.detach() > 0).sum().clamp(min=1)
    importance_E = (assigned_TE / k_T1.clamp(min=1)).sum(dim=0) / num_routed
    load_E = assigned_TE.detach().sum(dim=0) / num_routed
    return assigned_TE.shape[1] * (importance_E * load_E).sum()


def efficiency_loss(assigned_TE: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
    """Mean of the 0/1 assignment over T * E pairs: the share of the dense computation. `num_tokens` defaults to T."""
    T, E = assigned_TE.shape
    return assigned_TE.sum() / (_at_least_one(T if num_tokens is None else num_tokens) * max(E, 1))


def gshard_loss(
    scores_TE: Tensor,
    first_TE: Tensor,
    num_experts: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
) -> Tensor:
    """E / T^2 * sum_e (sum_t scores) * (tokens whose first pick is e).

    `first_TE` is the one-hot first pick (a row of zeros for a token without one, and for padding, whose scores must be
    zero too); `num_experts` and `num_tokens` default to E and T.
    """
    T, E = scores_TE.shape
    load_E = first_TE.to(scores_TE.dtype).sum(dim=0)
    tokens = _at_least_one(T if num_tokens is None else num_tokens)
    product = (scores_TE.sum(dim=0) * load_E).sum()
    return product * (E if num_experts is None else num_experts) / tokens**2  # order and dtype of Tutel, bitwise


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def load_importance_loss(
    scores_TE: Tensor, limit_T1: Tensor, noise_std: float, token_mask: Tensor | None = None
) -> Tensor:
    """Mean of the squared coefficients of variation of importance and of load.

    Importance is sum_t scores (softmax without noise), load is sum_t cdf((scores - limit) / noise_std); `limit_T1` is
    the k-th noisy logit of each token. Comparing scores with a logit is Tutel's formula, kept for parity.
    """

    def squared_variation(total_E: Tensor) -> Tensor:
        return total_E.var(correction=min(1, len(total_E) - 1)) / (total_E.mean() ** 2 + 1e-10)

    load_TE = torch.special.ndtr((scores_TE - limit_T1) / noise_std)
    if token_mask is not None:
        scores_TE, load_TE = scores_TE * token_mask.unsqueeze(1), load_TE * token_mask.unsqueeze(1)
    return (squared_variation(scores_TE.sum(dim=0)) + squared_variation(load_TE.sum(dim=0))) / 2
