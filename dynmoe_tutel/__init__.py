"""Dynamic mixture of experts (DynMoE, arXiv 2405.14297) as a plug-in for Tutel and plain torch."""

from . import moe
from .controller import ExpertController, ExpertEvent, Schedule
from .gates import TopAnyGate
from .layer import MoELayer
from .policy import Decision, DynMoEPolicy, ExpertChange
from .records import RoutingRecord
from .routing import Routing
from .version import __version__

__all__ = [
    "Decision",
    "DynMoEPolicy",
    "ExpertChange",
    "ExpertController",
    "ExpertEvent",
    "MoELayer",
    "Routing",
    "RoutingRecord",
    "Schedule",
    "TopAnyGate",
    "__version__",
    "moe",
]
