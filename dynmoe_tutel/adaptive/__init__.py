"""The adaptive process: it records routing, decides after each window, and grows and prunes slots.

Each module uses only earlier ones: events, records, policy, schedule, optimizer_state, slots, budget, calibration,
gate_history, rebalance, controller.
"""

from .slots import INITS, AdaptiveExperts  # isort: skip
from .budget import Budgets
from .calibration import calibrate

__all__ = [
    "INITS",
    "AdaptiveExperts",
    "Budgets",
    "calibrate",
]
