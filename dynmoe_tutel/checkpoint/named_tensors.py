"""Tensors of a model and its optimizers under names and whole shapes without ranks, for `distributed`.

Expert tensors divided over ranks are DTensors over the layer's group, sharded by slots; all others are replicated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..adaptive.gate_history import unwrapped_name
from ..adaptive.slots import AdaptiveExperts
from ..experts import CustomExperts


class ShardedState:
    """The state of `model` and `optimizers`, to save or to load into.

    Raises ValueError if an optimizer holds parameters that are not the model's, if expert tensors cannot be divided by
    slots, or if a state dict holds anything but tensors.
    """

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers
        self._names = {id(p): unwrapped_name(name) for name, p in model.named_parameters()}
        self._mesh = _expert_meshes(model)

    def model_tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by `model.<name>`: the tensors themselves, detached."""
        found: dict[str, Tensor] = {}
        for name, value in self._model.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"model: the state dict has {type(value).__name__} at {name}, only tensors are stored")
            found[f"model.{unwrapped_name(name)}"] = self._whole(value.detach(), value)
        return found

    def optimizer_tensors(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """State tensors by `optimizer.<i>.<name>.<key>`, and the rest of each optimizer's state dict, by names."""
        found: dict[str, Tensor] = {}
        others: list[dict[str, Any]] = []
        for number, optimizer in enumerate(self._optimizers):
            state = optimizer.state_dict()
            groups: list[dict[str, Any]] = []
            entries: dict[str, dict[str, Any]] = {}
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                names = [self._name(p, number) for p in group["params"]]
                groups.append({**saved, "params": names})
                for parameter, name, index in zip(group["params"], names, saved["params"], strict=True):
                    entries[name] = entry = {}
                    for key, value in state["state"].get(index, {}).items():
                        entry[key] = None if isinstance(value, Tensor) else {"value": value}
                        if isinstance(value, Tensor):
                            found[f"optimizer.{number}.{name}.{key}"] = self._whole(value, parameter)
            others.append({"groups": groups, "state": entries})
        return found, others

    def optimizer_buffers(
        self, saved: list[dict[str, Any]], properties: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Empty tensors for the checkpoint's state, and the state dicts, for `load_state_dict`, that hold them.

        `saved` is the second part of `optimizer_tensors`, `properties` the whole shape and dtype of each saved tensor.
        Raises ValueError if the optimizers have other parameters, groups or shapes.
        """
        if len(saved) != len(self._optimizers):
            raise ValueError(
                f"optimizer: the checkpoint has {len(saved)} optimizers, given are {len(self._optimizers)}"
            )
        buffers: dict[str, Tensor] = {}
        states: list[dict[str, Any]] = []
        for number, (optimizer, other) in enumerate(zip(self._optimizers, saved, strict=True)):
            own = optimizer.state_dict()
            groups: list[dict[str, Any]] = []
            state: dict[int, dict[str, Any]] = {}
            if len(own["param_groups"]) != len(other["groups"]):
                raise ValueError(
                    f"optimizer {number}: the checkpoint has {len(other['groups'])} parameter groups, this optimizer "
                    f"{len(own['param_groups'])}"
                )
            for at, (group, had) in enumerate(zip(optimizer.param_groups, other["groups"], strict=True)):
                indices = own["param_groups"][at]["params"]
                by_name = {self._name(p, number): (p, i) for p, i in zip(group["params"], indices, strict=True)}
                _check_names(f"optimizer {number}, group {at}", had["params"], by_name)
                groups.append({**had, "params": indices})
                for name, (parameter, index) in by_name.items():
                    state[index] = entry = {}
                    for key, value in other["state"][name].items():
                        full = f"optimizer.{number}.{name}.{key}"
                        if value is not None:
                            entry[key] = value["value"]
                            continue
                        entry[key], buffers[full] = self._empty(full, parameter, *properties[full])
            states.append({"state": {i: entry for i, entry in state.items() if entry}, "param_groups": groups})
        return buffers, states

    def _name(self, parameter: nn.Parameter, number: int) -> str:
        try:
            return self._names[id(parameter)]
        except KeyError:
            raise ValueError(
                f"optimizer {number} holds a parameter of shape {list(parameter.shape)} that is not the model's"
            ) from None

    def _whole(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """A parameter-shaped tensor as the whole DTensor of which this rank holds its slots."""
        mesh = self._mesh.get(id(parameter))
        if mesh is None or tensor.dim() == 0:
            return tensor
        if tensor.shape[0] != parameter.shape[0]:
            raise ValueError(
                f"optimizer: state of shape {list(tensor.shape)} for {self._names[id(parameter)]} of shape "
                f"{list(parameter.shape)} on each rank cannot be divided by slots"
            )
        return DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)

    def _empty(
        self, name: str, parameter: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """An empty tensor for this rank's part of a saved one of whole shape `shape`, and the whole tensor."""
        if not shape:
            return (own := torch.empty((), dtype=dtype)), own  # a step count, which torch keeps on the CPU
        mesh = self._mesh.get(id(parameter))
        ranks = 1 if mesh is None else mesh.size()
        whole = [parameter.shape[0] * ranks, *parameter.shape[1:]]
        # factored state has size 1 along an axis
        if len(shape) != len(whole) or any(n not in (1, most) for n, most in zip(shape, whole, strict=True)):
            raise ValueError(f"{name}: the checkpoint has {list(shape)}, the parameter is {whole} over its ranks")
        if isinstance(parameter, DTensor):
            return (own := torch.empty_like(parameter, dtype=dtype)), own
        local = (shape[0] // ranks, *shape[1:])
        own = torch.empty(local, dtype=dtype, device=parameter.device)
        return own, self._whole(own, parameter)


def _check_names(where: str, saved: Any, own: Any) -> None:
    missing, unknown = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or unknown:
        raise ValueError(f"{where}: the checkpoint lacks {missing[:3]} and has unknown {unknown[:3]}")


def _expert_meshes(model: nn.Module) -> dict[int, DeviceMesh]:
    """For each divided expert parameter, by id, the mesh over which its slots are divided."""
    meshes: dict[int, DeviceMesh] = {}
    for name, layer in _divided_layers(model):
        place = layer.placement
        held = _slot_tensors(layer)
        for key, tensor in (*layer.experts.named_parameters(), *layer.experts.named_buffers()):
            if id(tensor) not in held or isinstance(tensor, DTensor):
                raise ValueError(
                    f"model: {unwrapped_name(name)}.experts.{key} of shape {list(tensor.shape)} on each rank is not "
                    f"divided by slots over the {place.ranks} ranks of the experts, and cannot be stored"
                )
        for tensor in held.values():
            meshes[id(tensor)] = DeviceMesh.from_group(place.group, tensor.device.type)
    return meshes


def _slot_tensors(layer: AdaptiveExperts) -> dict[int, Tensor]:
    """The parameters and buffers of this rank that hold its slots, by id."""
    axes = layer.slot_axes()
    held = (*layer.experts.parameters(), *layer.experts.buffers())
    return {id(tensor): tensor for tensor in held if id(tensor) in axes}


def _divided_layers(model: nn.Module) -> Iterator[tuple[str, AdaptiveExperts]]:
    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptiveExperts) or layer.placement.ranks == 1:
            continue
        if layer.placement.shards > 1:
            raise ValueError(
                f"model: each expert of {unwrapped_name(name)} is itself divided over {layer.placement.shards} ranks: "
                "such layers cannot be stored here"
            )
        if isinstance(layer.held_experts, CustomExperts) and not layer.held_experts.padded:
            raise ValueError(
                f"model: the experts of {unwrapped_name(name)} are a list of modules divided over ranks, whose names "
                "in a state dict are each rank's own: such layers cannot be stored here"
            )
        yield name, layer
