"""Fitting a layer's saved state to its slots: other active counts, other slot counts, other shapes of equal size.

Called by `MoELayer._load_from_state_dict` with a state dict that torch has copied, so it may be edited.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger("dynmoe_tutel")


def fit_slots(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Make the entries under `prefix` fit `layer`, in place; ValueError where active experts would be lost.

    More slots here than there: the saved ones come first, the rest keep their values and are inactive. Fewer: the
    surplus slots are dropped if none of them is active. Missing counts (dense or stock checkpoints) are filled in.
    """
    slots = layer.max_num_global_experts
    own = {f"{prefix}{name}": tensor for name, tensor in _tensors(layer).items()}
    saved = _saved_slots(own, state_dict, prefix, slots)
    for name in ("_num_global_experts", "_max_num_global_experts"):
        if prefix + name not in state_dict and any(key.startswith(prefix) for key in state_dict):
            _log.warning("%s%s is missing in the checkpoint: keeping this layer's", prefix, name)
            state_dict[prefix + name] = getattr(layer, name).clone()
    if f"{prefix}_max_num_global_experts" in state_dict:
        state_dict[f"{prefix}_max_num_global_experts"] = torch.tensor(slots)
    for key, target in own.items():
        if key not in state_dict:
            continue
        axis = _slot_axis(key)
        value = state_dict[key]
        if axis is not None and saved != slots:
            value = _resized(value, target, axis, saved, slots, key)
        if value.shape != target.shape and value.numel() == target.numel():
            value = value.reshape(target.shape)
        state_dict[key] = value


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def _slot_axis(key: str) -> int | None:
    """The axis of a tensor that counts slots, by the names of the state dict."""
    name = key.rsplit(".", 1)[-1]
    if name == "sim_matrix":
        return 1
    if name in ("gates", "experts_mask") or name.startswith(("batched_fc", "W_fc")) or key.endswith("wg.weight"):
        return 0
    return None


def _saved_slots(own: dict[str, Tensor], state_dict: dict[str, Any], prefix: str, slots: int) -> int:
    """Slots of the checkpoint; ValueError if they are more than `slots` and a surplus one is active."""
    masks = [key for key in own if key.endswith(".experts_mask") and key in state_dict]
    if not masks:
        return slots
    saved = int(state_dict[masks[0]].numel())
    for key in masks:
        active = state_dict[key].reshape(-1) > 0
        lost = active[slots:].nonzero().squeeze(1).tolist()
        if lost:
            raise ValueError(
                f"the checkpoint has {saved} slots at {prefix or 'top level'} and this layer {slots}: active experts "
                f"in slots {[slots + i for i in lost]} would be lost: build the layer with max_expert_num >= "
                f"{slots + max(lost) + 1}"
            )
    return saved


def _resized(value: Tensor, target: Tensor, axis: int, saved: int, slots: int, key: str) -> Tensor:
    """`value` with `slots` instead of `saved` entries along `axis`."""
    if value.dim() <= axis or value.shape[axis] != saved:
        return value
    if saved > slots:
        return value.narrow(axis, 0, slots)
    rest = target.detach().narrow(axis, saved, slots - saved).to(value)
    if key.endswith(".experts_mask"):
        rest = torch.zeros_like(rest)
    if value.dim() != target.dim():
        value = value.reshape(*value.shape[: axis + 1], *target.shape[axis + 1 :])
    return torch.cat([value, rest], dim=axis)
