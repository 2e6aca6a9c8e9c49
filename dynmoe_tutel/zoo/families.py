"""The three families of DynMoE's vision-language checkpoints: their configurations, both ways, without any weights.

A checkpoint's config.json is that of a text model with keys of LLaVA's and a dict `moe`. Here it becomes a
`LlavaConfig` of transformers with a text model that computes the same, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .hugging_face import transformers

ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Family:
    """One family: `model_type` in its config.json, `text_type` the model type of transformers that computes the same.

    `root` is the prefix of its text model's keys. `gated` FFNs are act(gate(x)) * up(x), without biases.
    `text_config` and `raw_config` convert the keys of the text model.
    """

    name: str
    model_type: str
    architecture: str
    text_type: str
    root: str
    gated: bool
    text_config: Callable[[Mapping[str, Any]], Any]
    raw_config: Callable[[Any], dict[str, Any]]


def _copied(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The values of `given` under their new names: {old: new}; keys that it lacks are left out."""
    return {new: given[old] for old, new in names.items() if given.get(old) is not None}


_COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_SAME = {name: name for name in _COMMON}
_STABLELM = {
    **_SAME,
    "num_key_value_heads": "num_key_value_heads",
    "hidden_act": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "use_qkv_bias": "use_qkv_bias",
}
_PHI_KEYS = (
    "num_key_value_heads",
    "hidden_act",
    "layer_norm_eps",
    "qk_layernorm",
    "resid_pdrop",
    "embd_pdrop",
    "attention_dropout",
)
_PHI = {**_SAME, **{name: name for name in _PHI_KEYS}}
_QWEN = {**_SAME, "layer_norm_epsilon": "rms_norm_eps", "attn_dropout_prob": "attention_dropout"}
_QWEN_FIXED = {"no_bias": True, "scale_attn_weights": True, "rotary_pct": 1.0}


def _rope(raw: Mapping[str, Any], theta: str, share: str, default: float) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": raw.get(theta, ROPE_THETA),
        "partial_rotary_factor": raw.get(share, default),
    }


def _refuse_scaled_rope(raw: Mapping[str, Any]) -> None:
    if raw.get("rope_scaling"):
        raise ValueError(f"config.json: rope_scaling = {raw['rope_scaling']!r} is not supported: only null is")


def _stablelm(raw: Mapping[str, Any]) -> Any:
    _refuse_scaled_rope(raw)
    rope = _rope(raw, "rope_theta", "rope_pct", 0.25)
    given = {"use_qkv_bias": True, **_copied(raw, _STABLELM)}
    return transformers.StableLmConfig(**given, rope_parameters=rope)


def _raw_stablelm(text: Any) -> dict[str, Any]:
    if text.qk_layernorm or text.use_parallel_residual:
        raise ValueError("a StableLm with qk_layernorm or use_parallel_residual is none of the zoo's")
    rope = text.rope_parameters
    back = _copied(text.to_dict(), {new: old for old, new in _STABLELM.items()})
    return {**back, "rope_pct": rope["partial_rotary_factor"], "rope_theta": rope["rope_theta"]}


def _phi(raw: Mapping[str, Any]) -> Any:
    _refuse_scaled_rope(raw)
    return transformers.PhiConfig(
        **_copied(raw, _PHI), rope_parameters=_rope(raw, "rope_theta", "partial_rotary_factor", 0.5)
    )


def _raw_phi(text: Any) -> dict[str, Any]:
    rope = text.rope_parameters
    return {
        **_copied(text.to_dict(), _PHI),
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
    }


def _qwen(raw: Mapping[str, Any]) -> Any:
    """Qwen-1 is a Qwen2 whose queries are not grouped; its intermediate_size counts gate and up together."""
    for key, value in _QWEN_FIXED.items():
        if raw.get(key, value) != value:
            raise ValueError(
                f"config.json: {key} = {raw[key]!r} is not supported for {raw['model_type']}: {value!r} is"
            )
    given = _copied(raw, _QWEN)
    given["intermediate_size"] = given["intermediate_size"] // 2
    heads = given["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": float(raw.get("rotary_emb_base", ROPE_THETA))}
    return transformers.Qwen2Config(
        **given,
        num_key_value_heads=heads,
        head_dim=raw.get("kv_channels", given["hidden_size"] // heads),
        use_sliding_window=False,
        rope_parameters=rope,
    )


def _raw_qwen(text: Any) -> dict[str, Any]:
    if text.num_key_value_heads != text.num_attention_heads:
        raise ValueError(
            f"a Qwen2 with {text.num_key_value_heads} key-value heads for {text.num_attention_heads} heads cannot be "
            "written as the zoo's Qwen, whose queries are not grouped: save it with save_pretrained"
        )
    back = _copied(text.to_dict(), {new: old for old, new in _QWEN.items()})
    return {
        **back,
        **_QWEN_FIXED,
        "intermediate_size": 2 * text.intermediate_size,
        "kv_channels": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "rotary_emb_base": text.rope_parameters["rope_theta"],
        "seq_length": text.max_position_embeddings,
        # beyond seq_length the zoo's Qwen scales positions and attention, and a Qwen2 does not
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
    }


FAMILIES = (
    Family(
        "stablelm",
        "moe_llava_stablelm",
        "MoELLaVAStablelmForCausalLM",
        "stablelm",
        "model",
        True,
        _stablelm,
        _raw_stablelm,
    ),
    Family("phi", "moe_llava_phi", "MoELLaVAPhiForCausalLM", "phi", "model", False, _phi, _raw_phi),
    Family("qwen", "moe_llava_qwen", "MoELLaVAQWenForCausalLM", "qwen2", "transformer", True, _qwen, _raw_qwen),
)


def family_of_checkpoint(model_type: object) -> Family:
    """The family of a checkpoint's `model_type`; ValueError for any other."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    allowed = ", ".join(family.model_type for family in FAMILIES)
    raise ValueError(f"config.json: model_type = {model_type!r} is none of the zoo's: {allowed}")


def family_of_text(text_type: object) -> Family:
    """The family whose checkpoints hold a text model of this type of transformers; ValueError for any other."""
    for family in FAMILIES:
        if family.text_type == text_type:
            return family
    allowed = ", ".join(family.text_type for family in FAMILIES)
    raise ValueError(f"the text model is a {text_type!r}, and the zoo's format knows {allowed}: use save_pretrained")
