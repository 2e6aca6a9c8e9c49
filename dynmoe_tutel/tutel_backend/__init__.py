"""Top-any gates inside stock Tutel: after `register()`, `tutel.moe.moe_layer(gate_type={"type": "top_any"})` works.

Only this package imports `tutel`. `layer`, `exchange` and `experts` make a Tutel layer, `dispatch` runs Tutel's
functions on a ragged routing, `checkpoint_tools` its command-line tools; `registration` puts all of it into Tutel.
"""

from __future__ import annotations

try:
    import tutel.impls.moe_layer  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"dynmoe_tutel.tutel_backend needs Tutel, which cannot be imported ({error}). Tutel's README says how to "
        "install it: https://github.com/microsoft/Tutel. Without it, use `from dynmoe_tutel import moe as tutel_moe`"
    ) from error

from .checkpoint_tools import checkpoint_tool
from .dispatch import FastDispatcher
from .exchange import LAYOUTS
from .layer import TOP_ANY, MOELayer, TopAnyMOELayer
from .registration import register, registered, unregister

__all__ = [
    "LAYOUTS",
    "TOP_ANY",
    "FastDispatcher",
    "MOELayer",
    "TopAnyMOELayer",
    "checkpoint_tool",
    "register",
    "registered",
    "unregister",
]
