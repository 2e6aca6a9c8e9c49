"""`ZooLlava`: a `LlavaForConditionalGeneration` whose configuration's `moe` names the layers with a `MoELayer`.

A class of its own for each family and kind of experts: transformers looks weight transforms up by class name.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from dynmoe_tutel.convert.find_ffns import fused_name
from dynmoe_tutel.convert.padding_mask import mask_padding_of
from dynmoe_tutel.layer import MoELayer

from .conversions import GROUPED, MODULES, conversions
from .families import FAMILIES, Family, family_of_text
from .hugging_face import needed, transformers
from .moe_dict import AUX_LOSSES, slots_by_layer

_activations: Any = needed("transformers.activations")
_mapping: Any = needed("transformers.conversion_mapping")


class ZooLlava(transformers.LlavaForConditionalGeneration):
    """A vision-language model with top-any layers, from a `LlavaConfig` with the attribute `moe`.

    Padding (`attention_mask`) reaches no expert. `load` makes one; `from_pretrained` of its class reads what
    `save_pretrained` wrote, in transformers' own names.
    """

    kind: ClassVar[str] = GROUPED

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = self.model.language_model
        layers = []
        for index, slots in slots_by_layer(config.moe).items():
            layer = moe_layer(config.text_config, slots, self.kind)
            text.layers[index].mlp = layer
            layers.append(layer)
        mask_padding_of(self, layers)
        limit = _sequence_limit(getattr(config, "zoo", None) or {})
        if limit is not None:
            text.register_forward_pre_hook(_WithinLength(limit), with_kwargs=True)


def moe_layer(text: Any, slots: int, kind: str = GROUPED) -> MoELayer:
    """A layer with `slots` experts in the place of an MLP of the text model with configuration `text`."""
    family = family_of_text(text.model_type)
    with torch.device("cpu"):  # the activation is tried, which the meta device cannot
        function = _activations.ACT2FN[text.hidden_act]
        activation = fused_name(function) or function
    experts = {
        "num_experts_per_device": slots,
        "hidden_size_per_expert": text.intermediate_size,
        "activation_fn": activation,
    }
    if kind == MODULES:
        experts |= {"type": "modules", "gated": family.gated, "bias": not family.gated}
    else:
        experts["type"] = "llama_ffn" if family.gated else "ffn"
    gate = {"type": "top_any", "max_expert_num": slots}
    return MoELayer(gate, text.hidden_size, experts, aux_losses=AUX_LOSSES)


class _WithinLength:
    """Forward pre-hook of a Qwen: refuses, in eval, positions where the checkpoint's model would scale attention."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeds = kwargs.get("inputs_embeds")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # as earlier releases of transformers 5 call it
        if module.training or embeds is None:
            return
        length = embeds.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
        if length > self.limit:
            raise ValueError(
                f"the sequence has {length} tokens, of images too, and seq_length of the checkpoint's Qwen is "
                f"{self.limit}: beyond it, this Qwen scales its positions (use_dynamic_ntk) and attention "
                "(use_logn_attn), which is not supported: give a shorter prompt"
            )


def _sequence_limit(raw: dict[str, Any]) -> int | None:
    """The longest sequence that a Qwen2 computes as the checkpoint's Qwen does in eval; None: any."""
    scales = raw.get("use_dynamic_ntk", True) or raw.get("use_logn_attn", True)
    if raw.get("model_type") != "moe_llava_qwen" or not scales:
        return None
    limit = raw.get("seq_length", raw.get("max_position_embeddings"))
    return None if limit is None else int(limit)


class StableLmLlava(ZooLlava):
    """DynMoE-StableLM."""


class PhiLlava(ZooLlava):
    """DynMoE-Phi-2."""


class QwenLlava(ZooLlava):
    """DynMoE-Qwen."""


class StableLmModulesLlava(ZooLlava):
    """DynMoE-StableLM with experts that are modules."""

    kind = MODULES


class PhiModulesLlava(ZooLlava):
    """DynMoE-Phi-2 with experts that are modules."""

    kind = MODULES


class QwenModulesLlava(ZooLlava):
    """DynMoE-Qwen with experts that are modules."""

    kind = MODULES


_CLASSES: dict[tuple[str, str], type[ZooLlava]] = {
    ("stablelm", GROUPED): StableLmLlava,
    ("phi", GROUPED): PhiLlava,
    ("qwen", GROUPED): QwenLlava,
    ("stablelm", MODULES): StableLmModulesLlava,
    ("phi", MODULES): PhiModulesLlava,
    ("qwen", MODULES): QwenModulesLlava,
}

for _family in FAMILIES:
    for _kind in (GROUPED, MODULES):
        _mapping.register_checkpoint_conversion_mapping(
            _CLASSES[_family.name, _kind].__name__, conversions(_family, _kind), overwrite=True
        )


def model_class(family: Family, kind: str) -> type[ZooLlava]:
    """The class of a family with `kind` of experts."""
    return _CLASSES[family.name, kind]
