"""Tutel's tools for checkpoints, `tutel.checkpoint.gather` and `.scatter`, on layers with inactive slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import tutel.checkpoint.gather
import tutel.checkpoint.scatter

from ..routing import is_active

_MAIN = {"gather": tutel.checkpoint.gather.main, "scatter": tutel.checkpoint.scatter.main}  # Tutel's own


def checkpoint_tool(name: str) -> None:
    """Run `tutel.checkpoint.gather` or `.scatter` (by sys.argv) on checkpoints whose layers have inactive slots.

    Tutel's tools take the expert count for the size of tensors. While they run, files that they read show the slot
    count instead; files that they write have the active count again.
    """
    load, save = torch.load, torch.save

    def load_slots(*arguments: Any, **options: Any) -> Any:
        state = load(*arguments, **options)
        _each_layer(state, lambda d, p: d.update({f"{p}_num_global_experts": d[f"{p}_max_num_global_experts"].clone()}))
        return state

    def save_active(state: Any, *arguments: Any, **options: Any) -> None:
        _each_layer(state, _count_active)
        save(state, *arguments, **options)

    torch.load, torch.save = load_slots, save_active  # type: ignore[assignment]
    try:
        _MAIN[name]()
    finally:
        torch.load, torch.save = load, save


def _each_layer(state: Any, change: Callable[[dict[str, Any], str], Any]) -> None:
    """Call `change` with every state dict in nested `state`, and the prefix of each adaptive layer in it."""
    if not isinstance(state, dict):
        return
    name = "_max_num_global_experts"
    for key in [key for key in state if isinstance(key, str) and key.endswith(name)]:
        change(state, key.removesuffix(name))
    for value in state.values():
        _each_layer(value, change)


def _count_active(state: dict[str, Any], prefix: str) -> None:
    masks = [state[key] for key in state if key.startswith(f"{prefix}gates.") and key.endswith(".experts_mask")]
    if masks:
        active_E = torch.stack([is_active(mask.reshape(-1)) for mask in masks]).any(dim=0)
        state[f"{prefix}_num_global_experts"] = active_E.sum()
