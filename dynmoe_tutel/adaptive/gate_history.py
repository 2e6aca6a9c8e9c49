"""The adaptive gates of a model, each with the history of its record windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .records import RoutingRecord
from .slots import AdaptiveExperts


class GateHistory:
    """One adaptive gate of one layer, with the history of its record windows.

    `silent_windows` [E]: the number of latest windows in a row in which an active slot had no assignment. `load` [E]:
    the assignments of all ranks in the last window that had tokens.
    """

    def __init__(self, name: str, layer: AdaptiveExperts, gate: int) -> None:
        self.name = name
        self.layer = layer
        self.gate = gate
        self.silent_windows = [0] * layer.slots
        self.load = [0] * layer.slots

    @property
    def key(self) -> str:
        """The name of this gate in messages and in the state."""
        return f"{self.name}.gates.{self.gate}".lstrip(".")

    @property
    def record(self) -> RoutingRecord:
        return self.layer.records[self.gate]

    @property
    def active(self) -> Tensor:
        """bool [E]"""
        return self.layer.held_gates[self.gate].active()

    @property
    def used_elsewhere(self) -> Tensor:
        """bool [E] on the CPU: the slots that other gates of the layer use; all gates share the expert networks."""
        used = torch.zeros(len(self.silent_windows), dtype=torch.bool)
        for index, gate in enumerate(self.layer.held_gates):
            if index != self.gate:
                used |= gate.active().cpu()
        return used

    def check_whole(self, init: str = "nearest") -> None:
        """Raise ValueError if a write to a slot would be lost: a tool shards, parametrises or wraps what holds it."""
        for name, parameter in self.layer.named_parameters():
            if hasattr(parameter, "device_mesh"):
                raise ValueError(
                    f"model: {self.name}.{name} is sharded (a DTensor), and experts of sharded layers cannot grow or "
                    "be pruned: give fully_shard the parameters of the layer, of its gates too, as ignored_params, and "
                    "average the gradients of the gates"
                )
        try:
            self.layer.check_written(self.gate, init)
        except ValueError as error:
            raise ValueError(f"model: {self.name or 'the layer'}: {error}") from None

    def reset_parameters(self, slot: int) -> list[tuple[nn.Parameter, tuple[Any, ...]]]:
        """The parameters to reset when the slot changes, each with the slot's index; not a network in use elsewhere."""
        entries = self.layer.slot_parameters(slot, self.gate)
        if not self.used_elsewhere[slot]:
            return entries
        own = {id(parameter) for parameter in self.layer.held_gates[self.gate].parameters()}
        return [(parameter, index) for parameter, index in entries if id(parameter) in own]

    def permute_slots(self, order: list[int]) -> None:
        """Slot i takes the history of slot order[i]."""
        self.silent_windows = [self.silent_windows[slot] for slot in order]
        self.load = [self.load[slot] for slot in order]
        self.record.permute_slots(order)

    def state_values(self) -> dict[str, Any]:
        """This gate's part of a state, without its record."""
        return {"silent_windows": list(self.silent_windows), "load": list(self.load)}

    def checked_state(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The record's state from `saved` and `tensors` ("<key>:<name>"); ValueError if it does not fit."""
        if not isinstance(saved, Mapping) or not {"silent_windows", "record"} <= set(saved):
            raise ValueError(f"state of {self.key} lacks silent_windows or record")
        slots = len(self.silent_windows)
        for name in ("silent_windows", "load"):
            counts = saved.get(name, self.load)
            if len(counts) != slots:
                raise ValueError(f"state of {self.key} has {len(counts)} slots in {name}, the layer has {slots}")
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError(f"state of {self.key} has {name} {counts}, must be integers of at least 0")
        record = dict(saved["record"])
        for name, own in self.record.state_dict().items():
            value = tensors.get(f"{self.key}:{name}") if isinstance(own, Tensor) else None
            if value is not None:
                record[name] = value
            if name not in record:
                raise ValueError(f"state of {self.key} lacks {name} of its record")
        try:
            self.record.check_state(record)
        except ValueError as error:
            raise ValueError(f"state of {self.key}: {error}") from error
        return record

    def load_state_values(self, saved: Mapping[str, Any]) -> None:
        """Load `state_values`; states of older versions have no loads."""
        self.silent_windows = [int(n) for n in saved["silent_windows"]]
        self.load = [int(n) for n in saved.get("load", [0] * len(self.load))]


def gate_histories(model: nn.Module) -> list[GateHistory]:
    """Every adaptive gate of every MoE layer of the model; ValueError if there is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {model!r}")
    histories = [
        GateHistory(unwrapped_name(name), layer, index)
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptiveExperts)
        for index, gate in enumerate(layer.held_gates)
        if gate.adaptive
    ]
    if not histories:
        raise ValueError(
            "model must have a MoELayer with an adaptive gate (such as top_any), got a "
            f"{type(model).__name__} without one. Under gates of fixed k and routers with a target no expert grows or "
            "is pruned: call step() of a dynmoe_tutel.adaptive.Budgets(model), which moves what routers hold"
        )
    return histories


def unwrapped_name(name: str) -> str:
    """`name` without the prefixes of DistributedDataParallel ("module.") and torch.compile ("_orig_mod.")."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)
