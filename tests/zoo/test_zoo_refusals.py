"""Checkpoints that are damaged, of another kind, or not supported: refused by the checkpoint's own key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_zoo_load import inputs
from tiny_zoo import MOE, TOWER, tensors_of, write, write_tensors

from dynmoe_tutel import zoo
from dynmoe_tutel.zoo.model import _WithinLength

EXPERT = "model.layers.2.mlp.deepspeed_moe.experts.deepspeed_experts.3.fc1.weight"
GATE = "model.layers.0.mlp.deepspeed_moe.gate.wg"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llava"}, "model_type = 'llava' is none of the zoo's: moe_llava_stablelm, moe_llava_phi"),
        ({"moe": None}, "moe = None: give a dict"),
        (
            {"moe": {**MOE, "top_k_experts": 2}},
            r"moe\['top_k_experts'\] = 2: this is a MoE-LLaVA checkpoint with a fixed",
        ),
        ({"moe": {**MOE, "use_residual": True}}, r"moe\['use_residual'\] = True"),
        ({"moe": {**MOE, "moe_enable": False}}, r"moe\['moe_enable'\] = False: the checkpoint is dense"),
        (
            {"moe": {**MOE, "moe_layers_idx": [0, 9]}},
            r"moe\['moe_layers_idx'\] = \[0, 9\]: give different layers from 0 to 3",
        ),
        ({"moe": {**MOE, "num_experts": [4, 4, 4]}}, r"moe\['num_experts'\] = \[4, 4, 4\]: give one number"),
        (
            {"moe": {**MOE, "moe_mode": "odd", "moe_layers_idx": None}},
            r"moe\['moe_mode'\] = 'odd': allowed are 'sparse'",
        ),
        ({"image_projector_type": "linear"}, "image_projector_type = 'linear' is not supported: 'mlp2x_gelu' is"),
        ({"mm_video_tower": "a/video"}, "mm_video_tower = 'a/video' is not supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ({"mm_vision_select_feature": "all"}, "mm_vision_select_feature = 'all': allowed are patch, cls_patch"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling = .* is not supported"),
        ({"hidden_size": None}, r"config\.json: hidden_size .*None"),
        ({"num_hidden_layers": "4"}, r"config\.json: num_hidden_layers .*'4'"),
        ({"num_attention_heads": 0}, r"config\.json: num_attention_heads .*0"),
        ({"layer_norm_eps": "small"}, r"config\.json: .*'layer_norm_eps'"),
        ({"mm_vision_select_layer": 99}, r"mm_vision_select_layer = 99: the image tower has \d layers"),
        ({"mm_vision_select_layer": "last"}, r"mm_vision_select_layer = 'last': the image tower has \d layers"),
    ],
)
def test_configurations(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "phi", **changed)
    with pytest.raises(ValueError, match=message):
        zoo.load(tmp_path, image_tower=TOWER)


def test_a_qwen_with_biases_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "qwen", no_bias=False)
    with pytest.raises(ValueError, match="no_bias = False is not supported for moe_llava_qwen: True is"):
        zoo.load(tmp_path, image_tower=TOWER)


def test_an_unknown_tower_needs_its_configuration(tmp_path: Path) -> None:
    write(tmp_path, "phi")
    with pytest.raises(ValueError, match="names the image tower 'a/tiny-tower', whose sizes are not known"):
        zoo.load(tmp_path)
    with pytest.raises(ValueError, match="image_tower = '/nowhere' is no folder"):
        zoo.load(tmp_path, image_tower="/nowhere")


@pytest.mark.parametrize("form", ["one", "shards", "bin"])
def test_keys(form: str, tmp_path: Path) -> None:
    write(tmp_path, "phi")
    tensors = tensors_of("phi")
    for change, message in (
        ({EXPERT: None}, f"lacks '{re.escape(EXPERT)}'"),
        ({EXPERT: torch.zeros(3, 5)}, rf"has '{re.escape(EXPERT)}' of shape \[3, 5\], .* means \[40, 32\]"),
        ({f"{GATE}.extra": torch.zeros(1)}, f"has keys .* no place for: '{re.escape(GATE)}.extra'"),
        ({f"{GATE}.temperature": torch.ones(1)}, rf"{re.escape(GATE)}.temperature = \[1.0\]: only temperature 0"),
        ({f"{GATE}.experts_mask": torch.zeros(4)}, rf"{re.escape(GATE)}.experts_mask = \[0.0, .* at least one active"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_tensors(folder, {k: v for k, v in {**tensors, **change}.items() if v is not None}, form)
        (folder / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
        with pytest.raises(ValueError, match=message):
            zoo.load(folder, image_tower=TOWER)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        zoo.load(tmp_path)
    write(tmp_path, "phi")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        zoo.load(tmp_path, image_tower=TOWER)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: none of model\.safetensors, "):
        zoo.load(tmp_path, image_tower=TOWER)
    torch.save({"a": object()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds Python objects beyond tensors"):
        zoo.load(tmp_path, image_tower=TOWER)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, "phi", form="shards")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00003\.safetensors"):
        zoo.load(tmp_path, image_tower=TOWER)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": {"a": 5}}'])
def test_an_index_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    write(tmp_path, "phi", form="shards")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of shards"):
        zoo.load(tmp_path, image_tower=TOWER)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_codes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """They would be loaded as the numbers that the codes are."""
    write(tmp_path, "phi")
    write_tensors(tmp_path, {**tensors_of("phi"), EXPERT: torch.ones(40, 32).to(dtype)})
    with pytest.raises(ValueError, match=rf"has '{re.escape(EXPERT)}' of torch\.\w*int\d+: its values"):
        zoo.load(tmp_path, image_tower=TOWER)


def test_the_limit_counts_the_cache_under_its_earlier_name() -> None:
    class Cache:
        def get_seq_length(self) -> int:
            return 40

    limit = _WithinLength(40)
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match="has 41 tokens"):
            limit(torch.nn.Linear(1, 1).eval(), (), {name: Cache(), "inputs_embeds": torch.zeros(1, 1, 2)})


def test_a_qwen_is_refused_beyond_its_sequence_length(tmp_path: Path) -> None:
    write(tmp_path, "qwen")  # seq_length 40
    model = zoo.load(tmp_path, image_tower=TOWER)
    within, beyond = inputs(False, length=40), inputs(False, length=41)
    with torch.no_grad():
        model(**within)
        with pytest.raises(ValueError, match=r"has 41 tokens, of images too, and seq_length .* is 40"):
            model(**beyond)
        with pytest.raises(ValueError, match="has 41 tokens"):
            model.generate(**inputs(False, length=38), max_new_tokens=5, min_new_tokens=5)
    model.train()(**beyond)
    write(tmp_path / "plain", "qwen", use_dynamic_ntk=False, use_logn_attn=False)
    zoo.load(tmp_path / "plain", image_tower=TOWER)(**beyond)


def test_options(tmp_path: Path) -> None:
    write(tmp_path, "phi")
    with pytest.raises(ValueError, match="experts = 'dense': allowed are 'grouped', 'modules'"):
        zoo.load(tmp_path, image_tower=TOWER, experts="dense")
    with pytest.raises(ValueError, match="dtype = 'bf16': give a floating-point"):
        zoo.load(tmp_path, "bf16", image_tower=TOWER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantization_config: quantizers replace"):
        zoo.load(tmp_path, image_tower=TOWER, quantization_config=object())
