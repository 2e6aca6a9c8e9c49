"""Callbacks that train a model's MoE layers inside another library's training loop.

`dynmoe_tutel.integrations.transformers` and `dynmoe_tutel.integrations.lightning` each have a `DynMoECallback`;
importing one imports its library, importing this package none.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, extra: str) -> Any:
    """The module of that name; ImportError that names the extra which brings it, where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        raise ImportError(
            f"this callback needs {library}, which cannot be imported ({error}): pip install 'dynmoe_tutel[{extra}]'"
        ) from error
