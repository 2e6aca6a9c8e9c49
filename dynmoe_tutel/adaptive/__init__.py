"""The adaptive process: what is recorded, what a window decides, and how slots grow and are pruned.

One straight chain: records, policy, schedule, optimizer_state, slots, gate_history, rebalance, controller.
"""

from .slots import INITS, AdaptiveExperts

__all__ = [
    "INITS",
    "AdaptiveExperts",
]
