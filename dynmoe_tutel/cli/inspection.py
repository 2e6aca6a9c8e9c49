"""What `inspect` prints: slots, active experts, thresholds, load and k of every MoE layer in a file or run folder.

Layers are found in state dicts by the names of their gates' tensors, so no model is built and any state dict with such
layers will do. Load and k are not in weights; the job's own checkpoints hold those of their last evaluation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynmoe_tutel.checkpoint import is_checkpoint, read_checkpoint, read_state_dict
from dynmoe_tutel.experiments.run_folder import CONFIG, RUNS, STEP, checkpoints_of, runs_of
from dynmoe_tutel.gates.top_any import MAX_LOG_SCALE
from dynmoe_tutel.routing import is_active

LINEAR_GATE = re.compile(r"(^|\.)gates\.\d+\.wg\.weight$")
NUMBER = re.compile(r"(\d+)")
CELL = 7


@dataclass(frozen=True)
class LayerState:
    """One gate of one layer. `thresholds` [E] are those of scores, None for a gate without; `load` [E] is each slot's
    share of tokens; load and k are None where they are not known. `shift` is a budget's, in cosine units, None without
    one; `state` is what a router holds, by name. Weights do not tell the `target_k` of either, the job's checkpoints
    do."""

    name: str
    active: list[bool]
    thresholds: list[float] | None
    load: list[float] | None = None
    k: float | None = None
    shift: float | None = None
    state: Mapping[str, list[float]] = field(default_factory=dict)
    target_k: float | None = None


def inspect(path: Path, console: Console) -> None:
    """Print all MoE layers at `path`: the folder of a run or an experiment, a checkpoint, a folder of transformers, or
    a safetensors or torch state dict. ValueError where it is none of these, is damaged, or has no such layer."""
    found = False
    for title, layers in _states(path):
        if not layers:
            continue
        found = True
        console.print(f"[bold]{title}[/bold]", highlight=False)
        for layer in layers:
            console.print(_headline(layer), highlight=False)
            for table in _slot_tables(layer, console.width):
                console.print(table)
    if not found:
        raise ValueError(f"{path} has no MoE layer (no key that ends with 'sim_matrix' or 'gates.<n>.wg.weight')")


def layers_in(tensors: Mapping[str, Tensor]) -> list[LayerState]:
    """The MoE layers of a state dict, sorted by name. ValueError where the tensors of a gate do not fit together."""
    result = []
    for key, tensor in tensors.items():
        if key == "sim_matrix" or key.endswith(".sim_matrix"):
            result.append(_cosine_gate(tensors, key[: -len("sim_matrix")], tensor))
        elif LINEAR_GATE.search(key):
            result.append(_linear_gate(tensors, key[: -len("wg.weight")], len(tensor)))
    return sorted(
        result, key=lambda layer: [int(part) if part.isdigit() else part for part in NUMBER.split(layer.name)]
    )


def _linear_gate(tensors: Mapping[str, Tensor], prefix: str, slots: int) -> LayerState:
    """What a router holds beside its maps has one entry, or one an expert."""
    beside = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    state = {name: t.tolist() for name, t in beside.items() if "." not in name and tuple(t.shape) in ((1,), (slots,))}
    return LayerState(_layer_name(prefix), [True] * slots, state.pop("thresholds", None), state=state)


def _cosine_gate(tensors: Mapping[str, Tensor], prefix: str, sim_matrix: Tensor) -> LayerState:
    slots = sim_matrix.shape[-1]
    mask, gates = tensors.get(f"{prefix}experts_mask"), tensors.get(f"{prefix}gates")
    for name, tensor in (("experts_mask", mask), ("gates", gates)):
        if tensor is not None and tuple(tensor.shape) != (slots,):
            raise ValueError(f"{prefix}{name} has shape {list(tensor.shape)}, sim_matrix has {slots} slots")
    thresholds = None
    if gates is not None:
        temperature = tensors.get(f"{prefix}temperature")
        tau = 1.0 if temperature is None else math.exp(min(float(temperature), MAX_LOG_SCALE))
        thresholds = torch.sigmoid(tau * gates.double()).tolist()
    active = [True] * slots if mask is None else is_active(mask).tolist()
    shift = tensors.get(f"{prefix}budget_shift")
    return LayerState(_layer_name(prefix), active, thresholds, shift=None if shift is None else float(shift))


def _states(path: Path) -> list[tuple[str, list[LayerState]]]:
    if not path.is_dir():
        return [(path.name, layers_in(read_state_dict(path)))]
    if is_checkpoint(path):
        return [_checkpoint(path)]
    if weights := sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin")):  # in one file or more
        return [(path.name, layers_in({k: v for file in weights for k, v in read_state_dict(file).items()}))]
    if (path / CONFIG).is_file():
        folders = sorted((path / RUNS).glob("*")) or [path]
        found = [checkpoints_of(folder, run)[-1] for folder in folders for run in runs_of(folder)]
        if not found:
            raise ValueError(f"run folder {path} has no checkpoint yet")
        return [_checkpoint(checkpoint) for checkpoint in found]
    if inner := sorted(folder for folder in path.glob(f"{STEP}*") if is_checkpoint(folder)):
        return [_checkpoint(inner[-1])]
    if (path / ".metadata").is_file():
        raise ValueError(f"{path} is a distributed checkpoint: load it by dynmoe_tutel.checkpoint.distributed")
    raise ValueError(f"{path} is neither a run folder (with {CONFIG}) nor a checkpoint")


def _checkpoint(folder: Path) -> tuple[str, list[LayerState]]:
    state = read_checkpoint(folder)
    model = state.get("model")
    if not isinstance(model, Mapping):
        raise ValueError(f"checkpoint {folder} holds no model")
    title = f"{folder.parent.name}, step {state['step']}" if "step" in state else folder.name
    return title, [_with_statistics(layer, state.get("layers") or {}) for layer in layers_in(model)]


def _with_statistics(layer: LayerState, statistics: Mapping[str, Mapping[str, Any]]) -> LayerState:
    found = statistics.get(layer.name, {})
    return replace(layer, load=found.get("load"), k=found.get("k"), target_k=found.get("target_k"))


def _layer_name(prefix: str) -> str:
    """The layer's name: gate 0 is not mentioned."""
    return re.sub(r"\.?gates\.0\.$", "", prefix).rstrip(".") or "layer"


def _headline(layer: LayerState) -> str:
    k = "k not stored" if layer.k is None else f"mean k {layer.k:.2f}"
    load = "" if layer.load is not None else ", load not stored"
    held = "".join(f", {name} {values[0]:.4g}" for name, values in layer.state.items() if len(values) == 1)
    target = "" if layer.target_k is None else f" to hold k at {layer.target_k:g}"
    if layer.shift is not None:
        held += f", a budget shifts thresholds by {layer.shift:+.4f}"
    elif target:
        target = f",{target}"
    return f"  {layer.name}: {sum(layer.active)} of {len(layer.active)} slots active, {k}{load}{held}{target}"


def _slot_tables(layer: LayerState, width: int) -> list[Table]:
    """Slots as columns, as many a table as the terminal is wide."""
    per_table = max(1, (width - 16) // CELL)
    return [
        _slot_table(layer, range(first, min(first + per_table, len(layer.active))))
        for first in range(0, len(layer.active), per_table)
    ]


def _slot_table(layer: LayerState, slots: Sequence[int]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("    slot", min_width=14)
    for slot in slots:
        table.add_column(str(slot), justify="right", min_width=CELL - 1, style=None if layer.active[slot] else "dim")
    rows = [("active", ["yes" if layer.active[slot] else "no" for slot in slots])]
    if layer.thresholds is not None:
        rows.append(("threshold", [f"{layer.thresholds[slot]:.3f}" for slot in slots]))
    for name, values in layer.state.items():
        if len(values) > 1:
            rows.append((name, [f"{values[slot]:+.3f}" for slot in slots]))
    if layer.load is not None:
        rows.append(("load", [f"{layer.load[slot]:.1%}" for slot in slots]))
    for name, cells in rows:
        table.add_row(f"    {name}", *cells)
    return table
