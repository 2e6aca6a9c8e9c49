"""Transformers, for the whole zoo; ImportError that names the extra where it is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def needed(module: str) -> Any:
    """Import `module`; ImportError that names the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"dynmoe_tutel.zoo needs {module.split('.')[0]}, which cannot be imported ({error}): "
            "pip install 'dynmoe_tutel[hf]'"
        ) from error


transformers: Any = needed("transformers")
