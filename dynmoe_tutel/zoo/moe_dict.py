"""The dict `moe` in a checkpoint's config.json: which layers are mixtures, and of how many slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynmoe_tutel.validation import positive_int

MODES = ("sparse", "dense", "first_half", "second_half", "custom")
DEFAULTS: dict[str, Any] = {
    "moe_enable": True,
    "moe_mode": "sparse",
    "moe_layers_idx": None,
    "ep_size": 1,
    "top_k_experts": -1,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 2.0,
    "min_capacity": 0,
    "use_residual": False,
    "router_aux_loss_coef": 0.01,
    "train_modules": [],
    "num_experts": [4],
}
# the terms of l_aux in DynMoE's DeepSpeed layer; `router_aux_loss_coef` weighs their sum
AUX_LOSSES = {"diversity": 1.0, "simplicity": 1.0, "load_balance": 1.0, "efficiency": 1.0}
ANY_K = -1  # of top_k_experts: every token chooses its own k


def layers_of_mode(mode: str, num_layers: int) -> list[int]:
    """The layers of a mode, as MoE-LLaVA counts them: "sparse" is every second from 0 on."""
    chosen = {
        "sparse": range(0, num_layers, 2),
        "dense": range(num_layers),
        "first_half": range(num_layers // 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    return list(chosen[mode])


def checked_moe(given: object, num_layers: int) -> dict[str, Any]:
    """The dict whole, with `moe_layers_idx` and one entry of `num_experts` for each layer; ValueError by key.

    Refused by name: what activates a fixed number of experts (MoE-LLaVA's own checkpoints), and residual experts.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"moe = {given!r}: give a dict such as {{'moe_mode': 'sparse', 'num_experts': [4]}}")
    moe = {**DEFAULTS, **given}
    if not moe["moe_enable"]:
        raise ValueError("moe['moe_enable'] = False: the checkpoint is dense, and has no mixture of experts to load")
    if moe["top_k_experts"] != ANY_K:
        raise ValueError(
            f"moe['top_k_experts'] = {moe['top_k_experts']!r}: this is a MoE-LLaVA checkpoint with a fixed number of "
            f"experts a token, which has no top-any gate; DynMoE's have {ANY_K}"
        )
    if moe["use_residual"]:
        raise ValueError("moe['use_residual'] = True: experts beside a dense MLP are not supported: only False is")
    moe["moe_layers_idx"] = _layers(moe, num_layers)
    moe["num_experts"] = _slots(moe["num_experts"], len(moe["moe_layers_idx"]))
    return moe


def slots_by_layer(moe: Mapping[str, Any]) -> dict[int, int]:
    """The slots of each mixture by the index of its layer; of a checked dict."""
    return dict(zip(moe["moe_layers_idx"], moe["num_experts"], strict=True))


def _layers(moe: Mapping[str, Any], num_layers: int) -> list[int]:
    layers, mode = moe["moe_layers_idx"], moe["moe_mode"]
    if mode not in MODES:
        raise ValueError(f"moe['moe_mode'] = {mode!r}: allowed are {', '.join(map(repr, MODES))}")
    if layers is None:
        if mode == "custom":
            raise ValueError("moe['moe_mode'] = 'custom' needs moe['moe_layers_idx'], a list of layers")
        return layers_of_mode(mode, num_layers)
    fits = isinstance(layers, list | tuple) and all(type(i) is int and 0 <= i < num_layers for i in layers)
    if not fits or not layers or len(set(layers)) < len(layers):
        raise ValueError(f"moe['moe_layers_idx'] = {layers!r}: give different layers from 0 to {num_layers - 1}")
    return list(layers)


def _slots(given: object, layers: int) -> list[int]:
    every = given if isinstance(given, list | tuple) else [given]
    slots = [positive_int("moe['num_experts']", each) for each in every]
    if len(slots) == 1:
        return slots * layers
    if len(slots) != layers:
        raise ValueError(f"moe['num_experts'] = {slots}: give one number, or one for each of {layers} layers")
    return slots
