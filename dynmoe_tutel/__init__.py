"""Dynamic mixture of experts (DynMoE, arXiv 2405.14297) as a plug-in for Tutel and plain torch."""

from types import ModuleType

from . import moe, old_paths
from .adaptive.controller import ExpertController, ExpertEvent, Schedule
from .adaptive.policy import Decision, DynMoEPolicy, ExpertChange
from .adaptive.records import RoutingRecord
from .gates import TopAnyGate
from .layer import MoELayer
from .overflow import OverflowRepair
from .routing import Routing
from .version import __version__

__all__ = [
    "Decision",
    "DynMoEPolicy",
    "ExpertChange",
    "ExpertController",
    "ExpertEvent",
    "MoELayer",
    "OverflowRepair",
    "Routing",
    "RoutingRecord",
    "Schedule",
    "TopAnyGate",
    "__version__",
    "moe",
]


def __getattr__(name: str) -> ModuleType:
    """Resolve modules by their old paths."""
    return old_paths.moved(name)
