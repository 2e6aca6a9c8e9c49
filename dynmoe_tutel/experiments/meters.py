"""Counting what a model's MoE layers did: experts, mean k, load, and the parameters that a token activates.

Depends on the core alone, and works for every gate type, in training and in eval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynmoe_tutel.gates import Gate
from dynmoe_tutel.layer import MoELayer
from dynmoe_tutel.routing import Routing


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by qualified name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def active_slots(layer: MoELayer) -> list[int]:
    """The slots of gate 0 that hold an expert."""
    return cast(list[int], cast(Gate, layer.gates[0]).active().nonzero().flatten().tolist())


class RoutingMeter:
    """Sums over what gate 0 of every MoE layer routed since `reset`, gathered by forward hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = moe_layers(model)
        self._sums: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.layers.items():
            layer.gates[0].register_forward_hook(self._hook(name))
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        for name, layer in self.layers.items():
            slots = layer.max_num_global_experts
            self._sums[name] = {
                "counts": torch.zeros(slots, dtype=torch.int64),
                "k_histogram": torch.zeros(slots + 1, dtype=torch.int64),
                "unrouted": torch.zeros((), dtype=torch.int64),
            }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The sums, copied."""
        return {name: {key: value.clone() for key, value in sums.items()} for name, sums in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from sums saved before."""
        self._sums = {name: {key: value.clone() for key, value in sums.items()} for name, sums in state.items()}

    def read(self) -> dict[str, dict[str, Any]]:
        """By layer: `experts` active now, `active` slots, `k` (mean experts of a token), `k_histogram` (share of
        tokens by the number of experts that passed: at 0 those that none did), `unrouted` (that share), `load`
        (by slot, share of tokens that it got). Shares are None where no token came."""
        return {name: self._read(self.layers[name], sums) for name, sums in self._sums.items()}

    def _read(self, layer: MoELayer, sums: dict[str, Tensor]) -> dict[str, Any]:
        active = active_slots(layer)
        result: dict[str, Any] = {"experts": len(active), "active": active}
        tokens = int(sums["k_histogram"].sum())
        if tokens == 0:
            return {**result, "k": None, "k_histogram": None, "unrouted": None, "load": None}
        result["k"] = int(sums["counts"].sum()) / tokens
        result["k_histogram"] = [n / tokens for n in sums["k_histogram"].tolist()]
        result["unrouted"] = int(sums["unrouted"]) / tokens
        result["load"] = [n / tokens for n in sums["counts"].tolist()]
        return result

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        def add(_gate: nn.Module, _inputs: Any, routing: Routing) -> None:
            sums = self._sums[name]
            # In eval an unrouted token has its best expert; it still belongs at 0 of the histogram.
            passed_T = routing.k_per_token.masked_fill(routing.unrouted, 0)
            sums["counts"] += routing.counts.cpu()
            sums["k_histogram"] += torch.bincount(passed_T, minlength=len(sums["k_histogram"])).cpu()
            sums["unrouted"] += routing.unrouted.sum().cpu()

        return add


def total(states: Sequence[Mapping[str, Mapping[str, Tensor]]], scale: int = 1) -> dict[str, dict[str, Tensor]]:
    """The sum of `RoutingMeter.state_dict()`s of one model, times `scale`."""
    return {
        name: {key: scale * torch.stack([state[name][key] for state in states]).sum(0) for key in sums}
        for name, sums in states[0].items()
    }


def parameter_counts(model: nn.Module, mean_k: Mapping[str, float]) -> tuple[float, int]:
    """(parameters that a token activates on average, parameters of the model), from the mean k of every MoE layer.

    Both count experts that are active now and not the storage of free slots. A token activates everything
    outside the experts, the gate's entries of all active experts, and k experts.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    activated = float(total)
    for name, layer in moe_layers(model).items():
        slots = layer.max_num_global_experts
        active = active_slots(layer)
        expert = sum(parameter.numel() for parameter in layer.experts.parameters()) // slots
        free = sum(_slot_size(layer, slot) for slot in range(slots) if slot not in active)
        total -= free
        activated += (mean_k[name] - len(active)) * expert - free
    return activated, total


def _slot_size(layer: MoELayer, slot: int) -> int:
    return sum(parameter[index].numel() for parameter, index in layer.slot_parameters(slot))
