"""Tiny checkpoints in the zoo's layout of keys, and a model that computes the same by plain loops over experts.

Neither uses anything of `dynmoe_tutel.zoo`: the names of keys are written out here once more.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

V, D, HEADS, LAYERS, SLOTS = 512, 32, 4, 4, 4
I = {"stablelm": 48, "phi": 40, "qwen": 44}
MIXTURES = (0, 2)
MASKS = {0: (1.0, 0.0, 1.0, 1.0), 2: (1.0, 1.0, 1.0, 1.0)}
PATCHES, IMAGE = 4, 8
FAMILIES = ("stablelm", "phi", "qwen")
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
}
LLAVA = {
    "mm_image_tower": "a/tiny-tower",
    "mm_hidden_size": TOWER["hidden_size"],
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "pad",
    "tokenizer_model_max_length": 64,
}
MOE = {
    "moe_enable": True,
    "moe_mode": "sparse",
    "moe_layers_idx": list(MIXTURES),
    "ep_size": 1,
    "top_k_experts": -1,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 2.0,
    "min_capacity": 0,
    "use_residual": False,
    "router_aux_loss_coef": 0.01,
    "train_modules": ["wg"],
    "num_experts": [SLOTS] * len(MIXTURES),
}
_SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}


def config_json(family: str) -> dict[str, Any]:
    """The config.json of a family."""
    own: dict[str, Any] = {
        "stablelm": {
            "intermediate_size": I[family],
            "num_key_value_heads": HEADS,
            "rope_pct": 0.25,
            "rope_theta": 10000,
            "norm_eps": 1e-5,
            "use_qkv_bias": True,
            "max_position_embeddings": 128,
            "hidden_act": "silu",
        },
        "phi": {
            "intermediate_size": I[family],
            "num_key_value_heads": HEADS,
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu_new",
            "max_position_embeddings": 128,
        },
        "qwen": {
            "intermediate_size": 2 * I[family],
            "kv_channels": D // HEADS,
            "layer_norm_epsilon": 1e-6,
            "rotary_emb_base": 10000,
            "rotary_pct": 1.0,
            "no_bias": True,
            "scale_attn_weights": True,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "seq_length": 40,
            "max_position_embeddings": 40,
        },
    }[family]
    base = {"model_type": f"moe_llava_{family}", "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    return {**base, **_SIZES, **own, **LLAVA, "moe": MOE}


def _norm(name: str, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (D,), **({f"{name}.bias": (D,)} if bias else {})}


def _ffn(family: str, prefix: str) -> dict[str, tuple[int, ...]]:
    H = I[family]
    if family == "phi":
        sizes = {"fc1.weight": (H, D), "fc1.bias": (H,), "fc2.weight": (D, H), "fc2.bias": (D,)}
    elif family == "stablelm":
        sizes = {"gate_proj.weight": (H, D), "up_proj.weight": (H, D), "down_proj.weight": (D, H)}
    else:
        sizes = {"w1.weight": (H, D), "w2.weight": (H, D), "c_proj.weight": (D, H)}
    return {prefix + name: size for name, size in sizes.items()}


def _mixture(family: str, prefix: str) -> dict[str, tuple[int, ...]]:
    wg = f"{prefix}deepspeed_moe.gate.wg."
    shapes = {f"{wg}sim_matrix": (D, SLOTS), f"{wg}gates": (SLOTS,), f"{wg}experts_mask": (SLOTS,)}
    shapes[f"{wg}temperature"] = (1,)
    for slot in range(SLOTS):
        shapes |= _ffn(family, f"{prefix}deepspeed_moe.experts.deepspeed_experts.{slot}.")
    return shapes


def _block(family: str, prefix: str) -> dict[str, tuple[int, ...]]:
    if family == "qwen":
        attention = {"attn.c_attn.weight": (3 * D, D), "attn.c_attn.bias": (3 * D,), "attn.c_proj.weight": (D, D)}
        norms = {**_norm("ln_1", bias=False), **_norm("ln_2", bias=False)}
    else:
        maps = [f"self_attn.{name}_proj" for name in "qkv"]
        attention = {f"{m}.weight": (D, D) for m in maps} | {f"{m}.bias": (D,) for m in maps}
        if family == "phi":
            attention |= {"self_attn.dense.weight": (D, D), "self_attn.dense.bias": (D,)}
            norms = _norm("input_layernorm")
        else:
            attention |= {"self_attn.o_proj.weight": (D, D)}
            norms = {**_norm("input_layernorm"), **_norm("post_attention_layernorm")}
    return {prefix + name: size for name, size in {**attention, **norms}.items()}


def _tower(prefix: str) -> dict[str, tuple[int, ...]]:
    C, H, patch = TOWER["hidden_size"], TOWER["intermediate_size"], TOWER["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (C,),
        "embeddings.patch_embedding.weight": (C, 3, patch, patch),
        "embeddings.position_embedding.weight": (PATCHES + 1, C),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{name}.weight": (C,), f"{name}.bias": (C,)}
    for i in range(TOWER["num_hidden_layers"]):
        own = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{own}self_attn.{name}.weight": (C, C), f"{own}self_attn.{name}.bias": (C,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{own}{name}.weight": (C,), f"{own}{name}.bias": (C,)}
        shapes |= {f"{own}mlp.fc1.weight": (H, C), f"{own}mlp.fc1.bias": (H,)}
        shapes |= {f"{own}mlp.fc2.weight": (C, H), f"{own}mlp.fc2.bias": (C,)}
    return {prefix + name: size for name, size in shapes.items()}


def shapes_of(family: str) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint with its shape."""
    root = "transformer" if family == "qwen" else "model"
    shapes: dict[str, tuple[int, ...]] = {f"{root}.{'wte' if family == 'qwen' else 'embed_tokens'}.weight": (V, D)}
    for i in range(LAYERS):
        prefix = f"{root}.{'h' if family == 'qwen' else 'layers'}.{i}."
        shapes |= _block(family, prefix)
        shapes |= _mixture(family, f"{prefix}mlp.") if i in MIXTURES else _ffn(family, f"{prefix}mlp.")
    last = {"stablelm": "norm", "phi": "final_layernorm", "qwen": "ln_f"}[family]
    shapes |= _norm(f"{root}.{last}", bias=family != "qwen")
    shapes |= _tower(f"{root}.image_tower.image_tower.vision_model.")
    projector = f"{root}.mm_projector.image_spatial_proj."
    shapes |= {f"{projector}0.weight": (D, TOWER["hidden_size"]), f"{projector}0.bias": (D,)}  # type: ignore[dict-item]
    shapes |= {f"{projector}2.weight": (D, D), f"{projector}2.bias": (D,), "lm_head.weight": (V, D)}
    return shapes


def tensors_of(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights by key: masks are fp32 and temperatures 0, as in the zoo."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for key, shape in shapes_of(family).items():
        drawn = torch.randn(shape, generator=generator)
        if key.endswith("experts_mask"):
            index = int(key.split(".")[2])
            tensors[key] = torch.tensor(MASKS.get(index, (1.0,) * SLOTS))
        elif key.endswith("temperature"):
            tensors[key] = torch.zeros(1, dtype=dtype)
        elif "norm" in key.rsplit(".", 2)[-2] or ".ln_" in key:
            tensors[key] = (0.1 * drawn + key.endswith("weight")).to(dtype)
        else:
            width = 1 if key.endswith(("sim_matrix", "embed_tokens.weight", "wte.weight")) else 0.15
            tensors[key] = (drawn * (0.2 if key.endswith("gates") else width)).to(dtype)
    return tensors


def write(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, form: str = "one", **changed: Any
) -> dict[str, Tensor]:
    """Write a checkpoint: "one" file, "shards", or "bin"; `changed` keys of config.json. Returns its tensors."""
    tensors = tensors_of(family, dtype)
    write_tensors(folder, tensors, form)
    (folder / "config.json").write_text(json.dumps({**config_json(family), **changed}))
    return tensors


def write_tensors(folder: Path, tensors: dict[str, Tensor], form: str = "one") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if form == "one":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        keys = list(tensors)
        where = {key: f"model-0000{i + 1}-of-00003.safetensors" for i in range(3) for key in keys[i::3]}
        for name in sorted(set(where.values())):
            own = {key: tensors[key] for key, file in where.items() if file == name}
            save_file(own, folder / name, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


class LoopMixture(nn.Module):
    """A mixture in eval by a loop over tokens and experts; keeps the k of each token of its last call."""

    def __init__(self, family: str, tensors: dict[str, Tensor], prefix: str) -> None:
        super().__init__()
        self.family, self.k = family, torch.zeros(0)
        own = {key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)}
        wg = "deepspeed_moe.gate.wg."
        self.w, self.g, self.mask = own[f"{wg}sim_matrix"], own[f"{wg}gates"], own[f"{wg}experts_mask"]
        stem = "deepspeed_moe.experts.deepspeed_experts."
        self.experts = [
            {k.removeprefix(f"{stem}{e}."): v for k, v in own.items() if k.startswith(f"{stem}{e}.")}
            for e in range(SLOTS)
        ]

    def expert(self, e: int, x: Tensor) -> Tensor:
        w = self.experts[e]
        if self.family == "phi":
            h = F.gelu(F.linear(x, w["fc1.weight"], w["fc1.bias"]), approximate="tanh")
            return F.linear(h, w["fc2.weight"], w["fc2.bias"])
        gate, up, down = {"stablelm": ("gate_proj", "up_proj", "down_proj"), "qwen": ("w2", "w1", "c_proj")}[
            self.family
        ]
        h = F.silu(F.linear(x, w[f"{gate}.weight"])) * F.linear(x, w[f"{up}.weight"])
        return F.linear(h, w[f"{down}.weight"])

    def forward(self, x: Tensor) -> Tensor:
        flat, ks = x.reshape(-1, D), []
        out = torch.zeros_like(flat)
        for t, token in enumerate(flat):
            cosines = F.normalize(token, dim=0) @ F.normalize(self.w, dim=0)
            active = [e for e in range(SLOTS) if self.mask[e] and cosines[e] > self.g[e]]
            if not active:
                active = [int(cosines.masked_fill(self.mask == 0, -2).argmax())]
            ks.append(len(active))
            out[t] = torch.stack([self.expert(e, token) for e in active]).mean(dim=0)
        self.k = torch.tensor(ks)
        return out.view_as(x)


def reference(family: str, tensors: dict[str, Tensor]) -> Any:
    """A fp32 model of transformers' own parts with loops for mixtures, filled key by key."""
    raw = config_json(family)
    sizes = {**_SIZES, "intermediate_size": I[family], "max_position_embeddings": raw["max_position_embeddings"]}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text: Any
    if family == "stablelm":
        rope["partial_rotary_factor"] = 0.25
        text = transformers.StableLmConfig(
            **sizes, num_key_value_heads=HEADS, use_qkv_bias=True, layer_norm_eps=1e-5, rope_parameters=rope
        )
    elif family == "phi":
        rope["partial_rotary_factor"] = 0.5
        text = transformers.PhiConfig(**sizes, layer_norm_eps=1e-5, rope_parameters=rope)
    else:
        text = transformers.Qwen2Config(**sizes, num_key_value_heads=HEADS, rms_norm_eps=1e-6, rope_parameters=rope)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER), text_config=text, image_token_index=V - 1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    state = {key: value for old, tensor in tensors.items() for key, value in _native(family, old, tensor.float())}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(".mlp." in key and int(key.split(".")[3]) in MIXTURES for key in missing)
    for i in MIXTURES:
        prefix = f"transformer.h.{i}.mlp." if family == "qwen" else f"model.layers.{i}.mlp."
        model.model.language_model.layers[i].mlp = LoopMixture(family, tensors, prefix)
    return model


def _native(family: str, key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The keys and values of transformers' model for one of the checkpoint's; none for those of mixtures."""
    if "deepspeed_moe" in key:
        return []
    root, _, rest = key.partition(".")
    if root == "lm_head":
        return [(key, tensor)]
    if rest.startswith("image_tower."):
        return [(rest.replace("image_tower.image_tower.vision_model", "model.vision_tower"), tensor)]
    if rest.startswith("mm_projector."):
        number = {"0": "1", "2": "2"}[rest.split(".")[2]]
        return [(f"model.multi_modal_projector.linear_{number}.{rest.rsplit('.', 1)[1]}", tensor)]
    if family == "qwen":
        if ".c_attn." in rest:
            name = rest.replace("h.", "layers.", 1).replace("attn.c_attn", "self_attn.{}_proj")
            thirds = zip("qkv", tensor.chunk(3), strict=True)
            return [(f"model.language_model.{name.format(part)}", third) for part, third in thirds]
        for old, new in (
            ("wte.", "embed_tokens."),
            ("ln_f.", "norm."),
            ("ln_1.", "input_layernorm."),
            ("ln_2.", "post_attention_layernorm."),
            ("attn.c_proj.", "self_attn.o_proj."),
            ("mlp.c_proj.", "mlp.down_proj."),
            ("mlp.w1.", "mlp.up_proj."),
            ("mlp.w2.", "mlp.gate_proj."),
        ):
            rest = rest.replace(old, new)
        rest = f"layers.{rest[2:]}" if rest.startswith("h.") else rest
    return [(f"model.language_model.{rest}", tensor)]


def write_tiktoken(path: Path, merged: tuple[bytes, ...] = (b"th", b"the", b" a", b" c", b" ca", b" cat")) -> int:
    """A vocabulary of tiktoken: all bytes, then `merged`; returns the number of ranks."""
    tokens = [bytes([i]) for i in range(256)] + list(merged)
    path.write_bytes(b"\n".join(b"%s %d" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
    return len(tokens)


def write_words(folder: Path, words: tuple[str, ...]) -> None:
    """A tokenizer.json that knows bytes and `words` as single tokens, with the stop token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    known.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known.decoder = decoders.ByteLevel()
    known.add_tokens(list(words))
    known.add_special_tokens(["<|endoftext|>"])
    known.save(str(folder / "tokenizer.json"))
