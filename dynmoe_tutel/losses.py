"""Auxiliary losses of gates, each one unweighted 0-dim tensor in the dtype of its input.

Top-any terms: arXiv 2405.14297 section 3 (diversity, simplicity) and the DeepSpeed implementation of DynMoE
(load balance, efficiency). Fixed-k terms, as in Tutel: GShard (arXiv 2006.16668), load and importance (arXiv
1701.06538).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def diversity_loss(w_DE: Tensor, active_E: Tensor) -> Tensor:
    """||(W^T W - I) o m m^T||_F over unit columns of active slots; 0 when they are orthogonal.

    The diagonal of W^T W - I is zero by construction and is left out, so that rounding has no gradient.
    """
    unit_DE = F.normalize(w_DE, dim=0) * active_E
    gram_EE = unit_DE.t() @ unit_DE
    return torch.linalg.vector_norm(gram_EE - torch.diag(gram_EE.diagonal()))


def simplicity_loss(w_DE: Tensor, active_E: Tensor) -> Tensor:
    """Mean norm of the routing vectors of active slots."""
    return (torch.linalg.vector_norm(w_DE, dim=0) * active_E).sum() / active_E.sum()


def load_balance_loss(assigned_TE: Tensor) -> Tensor:
    """E * sum_e mean_t(a / k) * mean_t(a) over the tokens with k > 0; 0 if there is none.

    `assigned_TE` is 0/1 and carries the straight-through gradient; k passes none.
    """
    k_T1 = assigned_TE.detach().sum(dim=1, keepdim=True)
    num_routed = (k_T1 > 0).sum().clamp(min=1)
    importance_E = (assigned_TE / k_T1.clamp(min=1)).sum(dim=0) / num_routed
    load_E = assigned_TE.sum(dim=0) / num_routed
    return assigned_TE.shape[1] * (importance_E * load_E).sum()


def efficiency_loss(assigned_TE: Tensor) -> Tensor:
    """Mean of the 0/1 assignment over all T * E pairs: the share of the dense computation."""
    return assigned_TE.sum() / max(assigned_TE.numel(), 1)


def gshard_loss(scores_TE: Tensor, first_TE: Tensor, num_experts: int | Tensor | None = None) -> Tensor:
    """E / T^2 * sum_e (sum_t scores) * (tokens whose first pick is e).

    `first_TE` is the one-hot first pick (a row of zeros for a token without one); `num_experts` defaults to E.
    """
    T, E = scores_TE.shape
    load_E = first_TE.to(scores_TE.dtype).sum(dim=0)
    return (scores_TE.sum(dim=0) * load_E).sum() * ((E if num_experts is None else num_experts) / max(T, 1) ** 2)


def load_importance_loss(scores_TE: Tensor, limit_T1: Tensor, noise_std: float) -> Tensor:
    """Mean of the squared coefficients of variation of importance and of load.

    Importance is sum_t scores (softmax without noise), load is sum_t cdf((scores - limit) / noise_std); `limit_T1` is
    the k-th noisy logit of each token. That scores stand against a logit here is Tutel's formula, kept for parity.
    """

    def squared_variation(total_E: Tensor) -> Tensor:
        return total_E.var(correction=min(1, len(total_E) - 1)) / (total_E.mean() ** 2 + 1e-10)

    load_TE = torch.special.ndtr((scores_TE - limit_T1) / noise_std)
    return (squared_variation(scores_TE.sum(dim=0)) + squared_variation(load_TE.sum(dim=0))) / 2
