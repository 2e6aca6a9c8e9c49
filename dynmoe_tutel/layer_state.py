"""Fits a layer's saved state to its slots: another number of slots, this rank's block, other shapes of equal size.

`_load_from_state_dict` of the layer calls it with torch's copy of the state dict, so it may edit that.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn

from .routing import is_active
from .validation import has_no_data

_log = logging.getLogger("dynmoe_tutel")


def fit_slots(layer: Any, state_dict: dict[str, Any], prefix: str, block: tuple[int, int] | None = None) -> None:
    """Make the entries under `prefix` fit `layer`, in place; ValueError if active experts would be lost.

    If the layer has more slots than the state, the saved ones come first; the rest keep their values and are inactive.
    If it has fewer, the surplus slots are dropped if none is active. Missing counts (dense or stock checkpoints) are
    filled in, and so are budgets' shifts, by 0. A layer divided over ranks takes its own slots from a whole state.
    `block` is (first, end) of the slots if the state is one rank's: ValueError unless they are this rank's.
    """
    _check_block(layer, prefix, block)
    slots = layer.slots
    if hasattr(layer.experts, "name_module"):
        layer.experts.name_module(state_dict, f"{prefix}experts.")
    own = {f"{prefix}{name}": tensor for name, tensor in _tensors(layer).items()}
    axes = layer.slot_axes()
    saved = _saved_slots(own, state_dict, prefix, slots)
    _round_masks(own, state_dict)
    if any(key.startswith(prefix) for key in state_dict):
        _fill_counts(layer, state_dict, prefix)
        _fit_shifts(own, state_dict, prefix)
        _refuse_broken_state(layer, own, state_dict)
    if not getattr(layer.experts, "padded", True):
        _fit_modules(layer, state_dict, prefix, own)
    for key, target in own.items():
        value = state_dict.get(key)
        if not isinstance(value, Tensor):
            continue
        if layer.wire is not None and key.startswith(f"{prefix}experts."):
            value = value if id(target) not in axes else _own_block(layer, value, target, saved, key)
        elif saved != slots:
            value = _resized(value, target, axes.get(id(target)), saved, slots, key)
        if _fits(key, value, target):
            value = value.reshape(target.shape)
        state_dict[key] = value


def _fits(key: str, value: Tensor, target: Tensor) -> bool:
    """Whether the shapes differ in axes of size 1 only: upstream's converters save biases as [E, 1, H], and Tutel's
    llama_ffn holds its weights as one row."""
    return _without_ones(value) == _without_ones(target) or _is_flat(key, value, target)


def _without_ones(tensor: Tensor) -> list[int]:
    return [n for n in tensor.shape if n != 1]


def _is_flat(key: str, value: Tensor, target: Tensor) -> bool:
    of_llama = key.rpartition(".")[2] in ("W_fc1", "W_fc2", "W_fc3")
    return of_llama and 1 in (value.dim(), target.dim()) and value.numel() == target.numel()


def _check_block(layer: Any, prefix: str, block: tuple[int, int] | None) -> None:
    """ValueError if the state has slots that this rank does not hold."""
    own = None if layer.wire is None else (layer.placement.first, layer.placement.first + layer.placement.local)
    if block is not None and tuple(block) != own:
        held = "all slots" if own is None else f"slots {own[0]} to {own[1] - 1}"
        raise ValueError(
            f"the checkpoint has at {prefix or 'top level'} the experts of one rank, slots {block[0]} to "
            f"{block[1] - 1}, and this rank holds {held}: load what the same rank of as many saved, or use "
            "dynmoe_tutel.checkpoint.distributed"
        )


def _own_block(layer: Any, value: Tensor, target: Tensor, saved: int, key: str) -> Tensor:
    """This rank's slots from a tensor of all `saved` slots; slots that it lacks keep their values."""
    whole = torch.empty([saved, *target.shape[1:]], device="meta")
    if not _fits(key, value, whole):
        return value
    block = value.reshape(whole.shape)[layer.placement.first : layer.placement.first + layer.placement.local]
    return torch.cat([block, target.detach()[len(block) :].to(block)])


def _fit_modules(layer: Any, state_dict: dict[str, Any], prefix: str, own: dict[str, Tensor]) -> None:
    """For custom experts of one module a slot: take this rank's slots; slots missing in the file keep their values."""
    stem = f"{prefix}experts.module."
    number = re.compile(re.escape(stem) + r"(\d+)\.")
    found = {key: int(match[1]) for key in state_dict if (match := number.match(key))}
    count = max(found.values(), default=-1) + 1
    first = layer.placement.first if count > layer.placement.local else 0  # a block is numbered from 0
    values = {key: state_dict.pop(key) for key in found}
    for key, slot in found.items():
        if first <= slot < first + layer.placement.local:
            state_dict[f"{stem}{slot - first}.{key[number.match(key).end() :]}"] = values[key]  # type: ignore[union-attr]
    for key, tensor in own.items():
        if count and (match := number.match(key)) and int(match[1]) + first >= count:
            state_dict.setdefault(key, tensor.detach())


def _round_masks(own: dict[str, Tensor], state_dict: dict[str, Any]) -> None:
    """Make masks that were averaged 0 or 1, with a warning: an average of states that does not follow the layer's."""
    for key in own:
        mask = state_dict.get(key)
        if not key.endswith(".experts_mask") or not isinstance(mask, Tensor) or mask.is_meta:
            continue
        rounded = is_active(mask).to(mask.dtype)
        between = (rounded != mask).flatten().nonzero().flatten().tolist()
        if between:
            state_dict[key] = rounded
            _log.warning(
                "%s of the checkpoint is neither 0 nor 1 in slots %s: these experts were averaged with what their "
                "slots held before; those above one half are active. Give averages to ExpertController(averages=)",
                key,
                between,
            )


def _fill_counts(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Fill in the counts: slots are the layer's, active experts follow the saved masks if there are any."""
    count, slots = prefix + "_num_global_experts", prefix + "_max_num_global_experts"
    for key in (count, slots):
        if key not in state_dict:
            _log.warning("%s is missing in the checkpoint and is filled in", key)
    masks = [v for k, v in state_dict.items() if k.startswith(f"{prefix}gates.") and k.endswith(".experts_mask")]
    if masks:  # the masks win over the saved count
        state_dict[count] = torch.stack([is_active(mask.reshape(-1)) for mask in masks]).any(dim=0).sum()
    elif count not in state_dict:
        state_dict[count] = layer.held_gates[0].active().sum()
    state_dict[slots] = torch.tensor(layer.slots)


def _fit_shifts(own: dict[str, Tensor], state_dict: dict[str, Any], prefix: str) -> None:
    """Fill in a missing shift of a budget by 0; ValueError for a shift where the layer has none: its k would differ."""
    for key in own:
        if key.endswith(".budget_shift") and key not in state_dict:
            _log.warning("%s is missing in the checkpoint and is filled in: the budget starts at shift 0", key)
            state_dict[key] = torch.zeros(1)
    for key in state_dict:
        if key.startswith(f"{prefix}gates.") and key.endswith(".budget_shift") and key not in own:
            raise ValueError(
                f"the checkpoint has the shift of a budget, {key}, and this layer's gate none: build it with "
                "gate_type['budget'] = {'target_k': ...}, the mean number of experts a token that it was trained or "
                "calibrated for; or take the key out to have each token's number of experts without a budget"
            )


def _refuse_broken_state(layer: Any, own: dict[str, Tensor], state_dict: dict[str, Any]) -> None:
    """ValueError where what moves after steps is not finite: unlike a threshold's, that would neither show nor mend."""
    moved = {id(getattr(gate, name)) for gate in layer.held_gates for name in gate.exact_buffers}
    for key, tensor in own.items():
        value = state_dict.get(key)
        if id(tensor) not in moved or not isinstance(value, Tensor) or has_no_data(value):
            continue
        if not bool(value.isfinite().all()):
            at_start = " (torch.zeros(1) starts the budget anew)" if key.endswith(".budget_shift") else ""
            raise ValueError(
                f"{key} of the checkpoint is {value.flatten()[:4].tolist()}: give finite numbers{at_start}; the "
                "checkpoint may be damaged, or of a training that diverged"
            )


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def _saved_slots(own: dict[str, Tensor], state_dict: dict[str, Any], prefix: str, slots: int) -> int:
    """Number of slots in the checkpoint; ValueError if an active one lies beyond `slots`."""
    own_masks = [key for key in own if key.endswith(".experts_mask")]
    masks = [key for key in own_masks if key in state_dict]
    if not masks:  # a fixed-k gate: all experts are active
        count = state_dict.get(f"{prefix}_num_global_experts")
        if count is None or not own_masks:
            return slots
        if int(count) > slots:
            raise ValueError(
                f"the checkpoint has {int(count)} active experts at {prefix or 'top level'} and this layer {slots} "
                f"slots: build the layer with max_expert_num >= {int(count)}"
            )
        return int(count)
    saved = int(state_dict[masks[0]].numel())
    for key in masks:
        active = is_active(state_dict[key].reshape(-1))
        if not active.any():
            raise ValueError(f"{key} of the checkpoint has no active expert: a layer has at least one")
        lost = active[slots:].nonzero().squeeze(1).tolist()
        if lost:
            raise ValueError(
                f"the checkpoint has {saved} slots at {prefix or 'top level'} and this layer {slots}: active experts "
                f"in slots {[slots + i for i in lost]} would be lost: build the layer with max_expert_num >= "
                f"{slots + max(lost) + 1}"
            )
    return saved


def _resized(value: Tensor, target: Tensor, axis: int | None, saved: int, slots: int, key: str) -> Tensor:
    """`value` with `slots` instead of `saved` entries along `axis`; unchanged if its other axes do not fit."""
    if axis is None:
        return value
    expected = [*target.shape]
    expected[axis] = saved
    if not _fits(key, value, torch.empty(expected, device="meta")):
        return value
    value = value.reshape(expected)
    if saved > slots:
        return value.narrow(axis, 0, slots)
    rest = target.detach().narrow(axis, saved, slots - saved).to(value)
    if key.endswith(".experts_mask"):
        rest = torch.zeros_like(rest)
    return torch.cat([value, rest], dim=axis)
