"""A vision transformer of timm with the weights of a local file, and which of its blocks get experts.

timm is imported when a model is built, and only from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn

from dynmoe_tutel.checkpoint import read_state_dict
from dynmoe_tutel.experiments.vision.vit import seeded

NAMED = 3  # tensors that a message names


def build_timm(
    arch: str, classes: int, image_size: int, drop_path: float, weights: Mapping[str, Tensor] | None, seed: int
) -> nn.Module:
    """The model `arch` with a new head for that many classes, drawn from the seed, and the weights, or all of it drawn
    where there are none.

    ValueError for a name that timm does not know, a model without transformer blocks, and weights of another one.
    ImportError that names the extra where timm or a library of its is missing.
    """
    timm = _timm()
    if not timm.is_model(arch):
        near = timm.list_models(f"*{arch.split('_')[0]}*")[:10] or timm.list_models("deit*")[:10]
        raise ValueError(f"arch must be a model of timm, got {arch!r}; there are for example {', '.join(near)}")

    def build() -> nn.Module:
        try:
            return cast(
                nn.Module,
                timm.create_model(
                    arch, pretrained=False, num_classes=classes, img_size=image_size, drop_path_rate=drop_path
                ),
            )
        except (TypeError, AssertionError, RuntimeError) as error:
            raise ValueError(
                f"arch {arch!r} cannot be built for images of {image_size} pixels: {error}; it must be a vision "
                "transformer"
            ) from error

    model = seeded(seed, 0, build)
    if not isinstance(getattr(model, "blocks", None), nn.Sequential | nn.ModuleList):
        raise ValueError(f"arch must be a vision transformer with `blocks`, got {arch!r} ({type(model).__name__})")
    if weights is not None:
        load_weights(model, arch, weights)
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file. ValueError where it is none."""
    try:
        return read_state_dict(path)
    except ValueError as error:
        raise ValueError(f"weights: {error}") from error


def load_weights(model: nn.Module, arch: str, weights: Mapping[str, Tensor]) -> None:
    """Put the weights into a model of timm; its head stays as it is. Position embeddings are resampled for another
    image size, as timm does. ValueError where tensors are missing, unknown or of another shape."""
    classifier = str(cast(Any, model).pretrained_cfg.get("classifier") or "head")
    heads = (f"{classifier}.", "head.", "head_dist.", "pre_logits.", "fc.")
    found = {key: tensor for key, tensor in _adapted(model, weights).items() if not key.startswith(heads)}
    wanted = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(heads)}
    for what, keys in (
        ("lack", [key for key in wanted if key not in found]),
        ("have, beyond it,", [key for key in found if key not in wanted]),
        ("differ in shape in", [key for key in wanted if key in found and found[key].shape != wanted[key].shape]),
    ):
        if keys:
            example = ", ".join(keys[:NAMED])
            shapes = "" if what != "differ in shape in" else f" ({list(found[keys[0]].shape)}"
            if shapes:
                shapes += f" instead of {list(wanted[keys[0]].shape)})"
            raise ValueError(
                f"weights: the file is not of arch {arch!r}: its tensors {what} {len(keys)} of the "
                f"{len(wanted)} of the model, first {example}{shapes}"
            )
    model.load_state_dict(found, strict=False)


def moe_blocks(depth: int) -> tuple[int, ...]:
    """GMoE's choice: two alternate blocks near the end, the 9th and 11th of 12."""
    return tuple(block for block in (depth - 4, depth - 2) if block >= 0)


def _adapted(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names of this timm, whose own filter knows older and foreign names."""
    module = import_module(type(model).__module__)
    adapt = getattr(module, "checkpoint_filter_fn", None)
    if adapt is None:
        return dict(weights)
    try:
        return dict(adapt(dict(weights), model))
    except (
        KeyError,
        RuntimeError,
        ValueError,
        AttributeError,
        AssertionError,
    ):  # of another model: said above, by name
        return dict(weights)


def _timm() -> ModuleType:
    try:
        return import_module("timm")
    except ImportError as error:
        missing = error.name or "timm"
        raise ImportError(
            f"a model of timm needs {missing}, which is not installed or does not fit this torch ({error}): "
            "pip install 'dynmoe_tutel[vision]'"
        ) from error
