"""Metrics of a model's MoE layers: experts, mean k, load, and the parameters that a token activates.

Works for every gate type, in training and in eval.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_tutel.forwards import in_backward, is_training
from dynmoe_tutel.layer import MoELayer
from dynmoe_tutel.parallel.collectives import sum_over_ranks
from dynmoe_tutel.routing import Routing
from dynmoe_tutel.temporary_hooks import HookOwner, TemporaryHook


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by qualified name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def active_slots(layer: MoELayer) -> list[int]:
    """The active slots of gate 0."""
    return cast(list[int], layer.held_gates[0].active().nonzero().flatten().tolist())


def _device(layer: MoELayer) -> torch.device:
    return layer._num_global_experts.device


class _Count(TemporaryHook):
    """Hook of a gate: adds a routing to the sums of one layer, `sums[name]`."""

    def __init__(self, sums: Mapping[str, Mapping[str, Tensor]], name: str, training_only: bool) -> None:
        self.sums, self.name, self.training_only = sums, name, training_only

    def __call__(self, gate: nn.Module, inputs: Any, routing: Routing) -> None:
        if in_backward() or (self.training_only and not is_training(gate)):
            return
        sums = self.sums[self.name]
        with torch.no_grad():
            sums["k_histogram"].add_(routing.k_histogram)
            sums["counts"].add_(routing.counts)
            sums["unrouted"].add_(routing.unrouted.sum())

    def counts(self) -> Iterable[Tensor]:
        return self.sums[self.name].values()


class RoutingMeter(HookOwner):
    """Sums the routing of gate 0 of every MoE layer since `reset`, by forward hooks.

    It counts until `close`, the end of a `with` block, or its own end; the sums can still be read. They stay on the
    layers' devices; only `read` waits for them. It counts neither copies of the model nor padding (`token_mask`) nor
    recomputes of gradient checkpointing nor, with `training_only`, forwards in eval or without grad mode.
    """

    def __init__(self, model: nn.Module, training_only: bool = False) -> None:
        self.layers = moe_layers(model)
        self.training_only = training_only
        self._sums: dict[str, dict[str, Tensor]] = {}
        self.reset()
        hooks = {name: _Count(self._sums, name, training_only) for name in self.layers}
        self._own(layer.gates[0].register_forward_hook(hooks[name]) for name, layer in self.layers.items())

    def reset(self) -> None:
        """Forget everything."""
        for name, layer in self.layers.items():
            slots, device = layer.max_num_global_experts, _device(layer)
            self._sums[name] = {
                "counts": torch.zeros(slots, dtype=torch.int64, device=device),
                "k_histogram": torch.zeros(slots + 1, dtype=torch.int64, device=device),
                "unrouted": torch.zeros((), dtype=torch.int64, device=device),
            }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The sums, copied."""
        return {name: {key: value.clone() for key, value in sums.items()} for name, sums in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from saved sums."""
        for name, sums in state.items():
            self._sums[name] = {key: value.to(_device(self.layers[name]), copy=True) for key, value in sums.items()}

    def all_reduce(self, group: Any = None) -> None:
        """Sum over the ranks of `group`, which must all call it; does nothing without torch.distributed."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return
        values = [value for sums in self._sums.values() for value in sums.values()]
        sum_over_ranks(values, group)

    def read(self) -> dict[str, dict[str, Any]]:
        """For each layer: `experts` active now, `active` slots, `k` (mean experts of a token), `k_histogram` (share of
        tokens by number of thresholds passed), `unrouted` (share of tokens that passed none), `load` (by slot, share
        of tokens that it got). Shares are None if there was no token. Also the target and the state of gate 0 as they
        are now, if it has any (`Gate.held_values`): `target_k`; a budget's `shift` (cosine units); what a router holds
        by its name, of an entry an expert `_min` and `_max`."""
        return {name: self._read(self.layers[name], sums) for name, sums in self._sums.items()}

    def _read(self, layer: MoELayer, sums: dict[str, Tensor]) -> dict[str, Any]:
        active = active_slots(layer)
        result: dict[str, Any] = {"experts": len(active), "active": active}
        result |= layer.held_gates[0].held_values()
        tokens = int(sums["k_histogram"].sum())
        if tokens == 0:
            return {**result, "k": None, "k_histogram": None, "unrouted": None, "load": None}
        result["k"] = int(sums["counts"].sum()) / tokens
        result["k_histogram"] = [n / tokens for n in sums["k_histogram"].tolist()]
        result["unrouted"] = int(sums["unrouted"]) / tokens
        result["load"] = [n / tokens for n in sums["counts"].tolist()]
        return result


def total(states: Sequence[Mapping[str, Mapping[str, Tensor]]], scale: int = 1) -> dict[str, dict[str, Tensor]]:
    """The sum of `RoutingMeter.state_dict()`s of one model, times `scale`."""
    return {
        name: {key: scale * torch.stack([state[name][key] for state in states]).sum(0) for key in sums}
        for name, sums in states[0].items()
    }


def layer_scalars(layers: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """(layer/name, value) for every number of `RoutingMeter.read`, and more that is worth a curve.

    `experts`, `k`, `unrouted`, `target_k`, and what gates hold, such as a budget's `shift`; `load_max_over_mean` over
    the active slots (1: equal load); and `k_histogram/n`, the share of tokens with n experts, for n up to the most that
    a token can have or had.
    """
    for name, layer in layers.items():
        yield from ((f"{name}/{key}", value) for key, value in layer.items() if isinstance(value, int | float))
        if layer["k_histogram"] is None:
            continue
        load = [layer["load"][slot] for slot in layer["active"]]
        if sum(load) > 0:
            yield f"{name}/load_max_over_mean", max(load) * len(load) / sum(load)
        most = max(layer["experts"], *(k for k, share in enumerate(layer["k_histogram"]) if share > 0))
        for k, share in enumerate(layer["k_histogram"][: most + 1]):
            yield f"{name}/k_histogram/{k}", share


def parameter_counts(model: nn.Module, mean_k: Mapping[str, float]) -> tuple[float, int]:
    """(parameters that a token activates on average, parameters of the model), from the mean k of every MoE layer.

    Both count active experts only, not free slots. A token activates everything outside the experts, the gate's
    entries of all active experts, and k experts.
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
