"""The averages that a user names: which of their layers and tensors belong to which layer of the trained model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .gate_history import unwrapped_name
from .lineage import alike
from .slots import AdaptiveExperts

Average = nn.Module | Mapping[str, Tensor]


def averaged_layers(layers: Mapping[str, AdaptiveExperts], averages: Iterable[Average]) -> dict[str, list[Any]]:
    """For each of `layers`, by name, the layers of `averages` that average it.

    An average is a module with layers of the same names (wrappers' prefixes aside), or a mapping from the names of
    the model's state dict to tensors, which may hold the parameters alone. A mapping gets layers on its tensors.
    Raises ValueError for anything else, for an average that lacks one of the layers, and for other slots or shapes.
    """
    if isinstance(averages, nn.Module | Mapping):
        raise ValueError(f"averages must be a list of averages, got {type(averages).__name__}: give [average]")
    found: dict[str, list[Any]] = {name: [] for name in layers}
    for number, average in enumerate(averages):
        if isinstance(average, nn.Module):
            own: Any = {unwrapped_name(n): m for n, m in average.named_modules() if isinstance(m, AdaptiveExperts)}
        elif isinstance(average, Mapping):
            named = {unwrapped_name(name): tensor for name, tensor in average.items()}
            own = {name: _sharing(layer, f"{name}." if name else "", named) for name, layer in layers.items()}
        else:
            raise ValueError(f"averages[{number}] must be a module or a dict of tensors, got {type(average).__name__}")
        for name, layer in layers.items():
            averaged = own.get(name)
            if averaged is layer:
                raise ValueError(f"averages[{number}] is the trained model itself: give a copy of it")
            if averaged is None or not alike(layer, averaged):
                what = "no layer" if averaged is None else "other slots or shapes at"
                raise ValueError(f"averages[{number}] has {what} {name or 'the top level'!r}: give an average of model")
            found[name].append(averaged)
    return found


def _sharing(layer: AdaptiveExperts, prefix: str, named: Mapping[str, Tensor]) -> AdaptiveExperts | None:
    """A layer like `layer` on the tensors in `named` that start with `prefix`; None if a parameter is missing."""
    given = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    own = dict(layer.named_parameters())
    if any(name not in given or given[name].shape != tensor.shape for name, tensor in own.items()):
        return None
    sharing = copy.deepcopy(layer)
    with torch.no_grad():
        sharing.load_state_dict({**sharing.state_dict(), **given}, assign=True)
    return sharing
