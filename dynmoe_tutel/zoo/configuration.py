"""A checkpoint's config.json as a `LlavaConfig` of transformers, and a model's configuration as a config.json.

The `LlavaConfig` has two attributes more: `moe`, the dict of `moe_dict`, and `zoo`, the config.json as it was read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_tutel.validation import positive_int

from .families import Family, family_of_checkpoint, family_of_text
from .hugging_face import needed, transformers
from .moe_dict import checked_moe

_errors: Any = needed("huggingface_hub.errors")

CONFIG = "config.json"
FEATURES = {"patch": "default", "cls_patch": "full"}  # mm_vision_select_feature, and LlavaConfig's name for it
PROJECTOR = "mlp2x_gelu"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_L, "image_size": 224},
}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; ValueError that names the file if it is missing or is none."""
    path = folder / name
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {name}: give the folder of a checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def read_config(folder: Path, image_tower: Any = None) -> tuple[Family, Any]:
    """The family and the `LlavaConfig` of the checkpoint in `folder`; ValueError by the key of its config.json."""
    raw = read_json(folder, CONFIG)
    family = family_of_checkpoint(raw.get("model_type"))
    for key in SIZES:
        positive_int(f"{CONFIG}: {key}", raw.get(key))
    try:
        text = family.text_config(raw)
    except _errors.StrictDataclassError as error:
        raise ValueError(f"{CONFIG}: {error}") from error
    moe = checked_moe(raw.get("moe"), text.num_hidden_layers)
    for key, allowed in (
        ("image_projector_type", PROJECTOR),
        ("mm_video_tower", None),
        ("tie_word_embeddings", False),
        ("mm_use_im_start_end", False),
    ):
        if raw.get(key, allowed) != allowed:
            raise ValueError(f"{CONFIG}: {key} = {raw[key]!r} is not supported: {allowed!r} is")
    feature = raw.get("mm_vision_select_feature", "patch")
    if feature not in FEATURES:
        raise ValueError(f"{CONFIG}: mm_vision_select_feature = {feature!r}: allowed are {', '.join(FEATURES)}")
    tower = vision_config(raw.get("mm_image_tower"), image_tower)
    layer, most = raw.get("mm_vision_select_layer", -2), tower.num_hidden_layers
    if type(layer) is not int or not -most - 1 <= layer <= most:
        raise ValueError(f"{CONFIG}: mm_vision_select_layer = {layer!r}: the image tower has {most} layers")
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=text.vocab_size - 1,
        image_seq_length=image_tokens(tower, FEATURES[feature]),
        vision_feature_layer=layer,
        vision_feature_select_strategy=FEATURES[feature],
    )
    config.moe, config.zoo = moe, raw
    return family, config


def vision_config(name: object, given: Any = None) -> Any:
    """The configuration of the CLIP tower: `given` (a CLIPVisionConfig, a dict of its keys, or a folder), else by name.

    config.json has only the tower's name; those in `TOWERS` are known. ValueError for any other.
    """
    known = TOWERS.get(str(name))
    if given is None and known is None and isinstance(name, str) and (Path(name) / CONFIG).is_file():
        given = name
    if isinstance(given, transformers.CLIPVisionConfig):
        return given
    if isinstance(given, Mapping):
        return transformers.CLIPVisionConfig(**given)
    if given is not None:
        if not (Path(given) / CONFIG).is_file():
            raise ValueError(f"image_tower = {str(given)!r} is no folder with a {CONFIG}")
        return transformers.CLIPVisionConfig.from_pretrained(given)
    if known is None:
        raise ValueError(
            f"{CONFIG} names the image tower {name!r}, whose sizes are not known (known: {', '.join(TOWERS)}): give "
            "image_tower, a CLIPVisionConfig or a folder with the tower's config.json"
        )
    return transformers.CLIPVisionConfig(**known)


def image_tokens(tower: Any, strategy: str) -> int:
    """The tokens of one image: its patches, and one more with the class token."""
    patches: int = (tower.image_size // tower.patch_size) ** 2
    return patches + (strategy == "full")


def raw_config(config: Any, image_tower: str | None = None) -> dict[str, Any]:
    """The config.json of a model with the `LlavaConfig` `config`, whose `moe` is a checked dict.

    A model that was read keeps the keys that it was read with; sizes and `moe` are always those of the model.
    """
    family = family_of_text(config.text_config.model_type)
    read = getattr(config, "zoo", None)
    if config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings = True cannot be written: the zoo's checkpoints have an lm_head")
    if config.vision_config.model_type != "clip_vision_model":
        raise ValueError(f"the image tower is a {config.vision_config.model_type!r}, and the zoo's are CLIP's")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer = {config.vision_feature_layer!r}: the zoo's format knows one layer")
    own = {
        **family.raw_config(config.text_config),
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": {new: old for old, new in FEATURES.items()}[config.vision_feature_select_strategy],
    }
    if read is not None:
        kept = {key: value for key, value in own.items() if key in read}
        return {**read, **_changed(kept, read, family), "moe": dict(config.moe)}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **own,
        "tie_word_embeddings": False,
        "mm_image_tower": image_tower or _tower_name(config.vision_config),
        "mm_hidden_size": config.vision_config.hidden_size,
        "image_projector_type": PROJECTOR,
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 2048,
        "moe": dict(config.moe),
    }


def _changed(own: dict[str, Any], read: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The keys of `own` that the model has changed since it was read."""
    before = family.raw_config(family.text_config(read))
    return {key: value for key, value in own.items() if key not in before or before[key] != value}


def _tower_name(tower: Any) -> str:
    known = (n for n, keys in TOWERS.items() if all(getattr(tower, key) == value for key, value in keys.items()))
    name = next(known, None) or getattr(tower, "_name_or_path", "")
    if not name:
        raise ValueError(f"image_tower: the tower is none of {', '.join(TOWERS)}: give the name to write")
    return str(name)
