"""Experts divided over the ranks of a process group.

`exchange` and `rank_exchange` dispatch token rows to experts and combine the results, through `collectives`;
`placement` maps slots to ranks, `slots` reads and writes slots across ranks, `gradients` averages shared gradients.
"""

from .gradients import average_gradients, expert_parameters, ignore_experts_in_ddp

__all__ = [
    "average_gradients",
    "expert_parameters",
    "ignore_experts_in_ddp",
]
