"""Packages that do the same job, for `benchmarks.layer` on a GPU. An adapter a file; none is there yet.

A package is named with why it is not measured: it is not installed, or it is and has no adapter.
"""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = {
    "scattermoe": "scattermoe",
    "liger-kernel": "liger_kernel",
    "moe-ops": "moe_ops",
    "sonicmoe": "sonicmoe",
    "megablocks": "megablocks",
    "tutel": "tutel",
}


def reasons() -> dict[str, str]:
    """Why each package is not in the table."""
    return {
        name: "not installed" if find_spec(module) is None else "installed, but its adapter is not written yet"
        for name, module in PACKAGES.items()
    }
