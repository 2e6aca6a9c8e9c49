"""Experts divided over the ranks of a process group.

`exchange` and `rank_exchange` dispatch token rows to experts and combine the results, through `collectives`;
`placement` maps slots to ranks, `slots` reads and writes slots across ranks, `gradients` averages shared gradients,
`gradient_norm` clips by the norm of all.
"""

from .gradient_norm import clip_grad_norm_, grad_norm
from .gradients import average_gradients, expert_parameters, ignore_experts_in_ddp

__all__ = [
    "average_gradients",
    "clip_grad_norm_",
    "expert_parameters",
    "grad_norm",
    "ignore_experts_in_ddp",
]
