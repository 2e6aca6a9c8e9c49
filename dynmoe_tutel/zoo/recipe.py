"""`convert`: MoE-LLaVA's recipe for a Llava of one's own. Every second MLP of the text model becomes a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynmoe_tutel import convert as dense
from dynmoe_tutel.layer import MoELayer
from dynmoe_tutel.validation import positive_int, refuse_unknown

from .conversions import GROUPED, KINDS, MODULES
from .hugging_face import transformers
from .moe_dict import AUX_LOSSES, DEFAULTS, checked_moe, slots_by_layer


def convert(
    model: Any,
    moe: Mapping[str, Any] | None = None,
    *,
    active: int | None = None,
    experts: str = GROUPED,
    **layer_options: Any,
) -> Any:
    """Replace MLPs of the text model by top-any layers, in place, each slot a copy of its MLP; returns `model`.

    Args:
        model: a `LlavaForConditionalGeneration` of transformers with weights.
        moe: keys of a checkpoint's dict `moe`, for what differs from `DEFAULTS`: "moe_mode" ("sparse": every second
            layer from 0 on, "dense", "first_half", "second_half", or "custom" with "moe_layers_idx"), "num_experts"
            (slots a layer). It becomes `model.config.moe`, whole. `train_modules` freezes nothing here.
        active: experts active at start; default half the slots.
        experts: "grouped" or "modules", as for `load`.
        layer_options: further arguments of `MoELayer`; `aux_losses` are all four terms of DynMoE by default.

    Train it with `DynMoECallback`, with `moe["router_aux_loss_coef"]` as `aux_weight`, and write it by `save`.
    """
    if not isinstance(model, transformers.LlavaForConditionalGeneration):
        raise ValueError(f"model must be a LlavaForConditionalGeneration, got {type(model).__name__}")
    if experts not in KINDS:
        raise ValueError(f"experts = {experts!r}: allowed are {', '.join(map(repr, KINDS))}")
    text = model.model.language_model
    if any(isinstance(module, MoELayer) for module in text.modules()):
        raise ValueError("model has MoE layers already")
    refuse_unknown("moe", moe or {}, tuple(DEFAULTS))
    whole = checked_moe(moe or {}, len(text.layers))
    slots = slots_by_layer(whole)
    if active is not None and positive_int("active", active) > min(slots.values()):
        raise ValueError(f"active = {active}: a layer has {min(slots.values())} slots")
    for count in sorted(set(slots.values())):
        dense.convert(
            text,
            [f"layers.{i}.mlp" for i, own in slots.items() if own == count],
            gate_type={"type": "top_any", "max_expert_num": count},
            num_experts=active or max(1, count // 2),
            experts=MODULES if experts == MODULES else None,
            **{"aux_losses": AUX_LOSSES, **layer_options},
        )
    model.config.moe = whole
    return model
