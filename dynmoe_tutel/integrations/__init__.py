"""Callbacks that train a model's MoE layers inside another library's training loop.

`dynmoe_tutel.integrations.transformers` and `dynmoe_tutel.integrations.lightning` each have a `DynMoECallback`.
Importing one imports its library; importing this package imports neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import `module`; if it is not installed, ImportError that names the extra with it."""
    try:
        return import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        raise ImportError(
            f"this callback needs {library}, which cannot be imported ({error}): pip install 'dynmoe_tutel[{extra}]'"
        ) from error
