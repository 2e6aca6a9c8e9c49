"""`save`: a model with top-any layers as a checkpoint in the zoo's format, one layer after the other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynmoe_tutel.checkpoint.files import TEMPORARY, write_file
from dynmoe_tutel.experts.modules import ModuleExperts
from dynmoe_tutel.layer import MoELayer

from .configuration import CONFIG, raw_config
from .conversions import GROUPED, MODULES, conversions
from .families import family_of_text
from .hugging_face import needed, transformers
from .layout import reverted
from .moe_dict import checked_moe

_safetensors: Any = needed("safetensors.torch")

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
_LAYER = re.compile(r"^model\.(language_model|vision_tower)\..*?layers\.\d+\.")


def save(
    model: Any,
    folder: str | os.PathLike[str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    image_tower: str | None = None,
) -> Path:
    """Write `model` to `folder` as config.json and safetensors with the zoo's keys; returns the folder.

    `model` is from `load`, or a `LlavaForConditionalGeneration` that `zoo.convert` gave MoE layers. What was loaded in
    the file's dtype is written bitwise as it was. `image_tower` is the tower's name for config.json, where it has none.
    Raises ValueError for a model that the format cannot hold, before it writes. Files of the same names are replaced
    once all new ones are written, so that a save that fails leaves the folder as it was.
    """
    folder = Path(folder)
    config = _checked(model)
    family = family_of_text(config.text_config.model_type)
    transforms = conversions(family, _kind(model))
    raw = raw_config(config, image_tower)
    dtypes = {key: getattr(torch, name) for key, name in (getattr(config, "zoo_dtypes", None) or {}).items()}
    shards: list[list[str]] = [[]]
    room, total = max_shard_bytes, 0
    for key, tensor in _pieces(model, transforms, config, meta=True):
        size = tensor.numel() * dtypes.get(key, tensor.dtype).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(key)
        room, total = room - size, total + size
    names = _names(len(shards))
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{TEMPORARY}{name}" for name in names]
    _refuse_other_weights(folder, names, written)
    pieces = _pieces(model, transforms, config, meta=False)
    try:
        for path, keys in zip(written, shards, strict=True):
            tensors = {}
            for key in keys:
                found, tensor = next(pieces)
                assert found == key
                tensors[key] = tensor.to("cpu", dtypes.get(key, tensor.dtype)).contiguous()
            _safetensors.save_file(tensors, path, metadata={"format": "pt"})
        # once all are whole: shards of two models in one folder would be read as one
        for path, name in zip(written, names, strict=True):
            os.replace(path, folder / name)  # over the old file, never into it: a loaded model reads its pages
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    if len(names) > 1:
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_file(folder / INDEX, json.dumps(index, indent=2))
    raw["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    write_file(folder / CONFIG, json.dumps(raw, indent=2, sort_keys=True) + "\n")
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(folder)
    return folder


def _checked(model: Any) -> Any:
    """The model's configuration; ValueError unless its `moe` says which layers are mixtures, of how many slots."""
    if not isinstance(model, transformers.LlavaForConditionalGeneration):
        raise ValueError(f"model must be a LlavaForConditionalGeneration, got {type(model).__name__}")
    config = model.config
    layers = model.model.language_model.layers
    found = {i: layer.mlp for i, layer in enumerate(layers) if isinstance(layer.mlp, MoELayer)}
    if getattr(config, "moe", None) is None or not found:
        raise ValueError("model has no MoE layers of the zoo's: load it by zoo.load, or convert it by zoo.convert")
    moe = checked_moe(config.moe, len(layers))
    slots = dict(zip(moe["moe_layers_idx"], moe["num_experts"], strict=True))
    if slots != {i: layer.slots for i, layer in found.items()}:
        raise ValueError(
            f"config.moe says slots {slots} by layer, and the model has { {i: m.slots for i, m in found.items()} }: "
            "set moe_layers_idx and num_experts of model.config.moe"
        )
    for i, layer in found.items():
        gate = layer.held_gates[0]
        if len(layer.held_gates) != 1 or not gate.adaptive or getattr(gate, "temperature", None) is not None:
            raise ValueError(f"layer {i}: the zoo's format holds one top-any gate without temperature a layer")
        if getattr(gate, "budget_shift", None) is not None:
            raise ValueError(f"layer {i}: the zoo's format has no place for the shift of a budget's target_k")
        if layer.placement.ranks > 1:
            raise ValueError(f"layer {i}: its experts are divided over {layer.placement.ranks} ranks")
    return config


def _kind(model: Any) -> str:
    return MODULES if any(isinstance(m, ModuleExperts) for m in model.modules()) else GROUPED


def _pieces(model: Any, transforms: list[Any], config: Any, meta: bool) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of the checkpoint in order; tensors are converted a layer at a time, with `meta` without values."""
    group: dict[str, Tensor] = {}
    last = ""
    for name, tensor in model.state_dict().items():
        match = _LAYER.match(name)
        own = match[0] if match else name
        if group and own != last:
            yield from reverted(transforms, group, config).items()
            group = {}
        group[name], last = (torch.empty_like(tensor, device="meta") if meta else tensor), own
    yield from reverted(transforms, group, config).items()


def _refuse_other_weights(folder: Path, names: list[str], written: list[Path]) -> None:
    """ValueError where a reader would take other weights of the folder for these; remains of a killed save are none."""
    others = {path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern)} - set(names)
    others -= {path.name for path in written}
    others -= {INDEX} if len(names) > 1 else set()
    if others:
        raise ValueError(f"{folder} has other weights, {sorted(others)[0]}: give an empty folder, or remove them")


def _names(shards: int) -> list[str]:
    if shards == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
