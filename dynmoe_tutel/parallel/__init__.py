"""Experts divided over the ranks of a process group.

`exchange` sends tokens to their experts and back, by `collectives`; `placement` says which rank holds which
slot, `slots` reads and writes them across ranks, `gradients` averages what ranks share.
"""

from .gradients import average_gradients, expert_parameters, ignore_experts_in_ddp

__all__ = [
    "average_gradients",
    "expert_parameters",
    "ignore_experts_in_ddp",
]
