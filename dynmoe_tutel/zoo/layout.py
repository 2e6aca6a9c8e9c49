"""The keys, shapes and dtypes of a checkpoint: those that a model's would have, and those that files do have.

Nothing here reads values but of masks and temperatures, which are checked.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .conversions import MASK, TEMPERATURE
from .hugging_face import needed

_loading: Any = needed("transformers.core_model_loading")
_safetensors: Any = needed("safetensors")

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Entry:
    """What a file says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def reverted(transforms: list[Any], state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A model's state under the checkpoint's keys; on the meta device too."""
    model = SimpleNamespace(_weight_conversions=transforms, config=config)
    found: dict[str, Tensor] = _loading.revert_weight_conversion(model, dict(state))
    return found


def expected_entries(transforms: list[Any], model: nn.Module, config: Any) -> dict[str, Entry]:
    """What a checkpoint of `model` has."""
    meta = {key: torch.empty_like(value, device="meta") for key, value in model.state_dict().items()}
    return {key: Entry(tuple(t.shape), t.dtype) for key, t in reverted(transforms, meta, config).items()}


class Files:
    """The files with the weights in a folder: one or shards, of safetensors or of torch; ValueError where none is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
        if name is None:
            raise ValueError(f"{folder} has no weights: none of {', '.join(WEIGHTS)}")
        self.safetensors = ".safetensors" in name
        if name.endswith(".index.json"):
            self.paths = [folder / each for each in _shards(folder / name)]
        else:
            self.paths = [folder / name]
        if lacking := [path.name for path in self.paths if not path.is_file()]:
            raise ValueError(f"{folder} lacks {', '.join(lacking)}, which {name} names")

    def read(self) -> tuple[dict[str, Entry], dict[str, Tensor]]:
        """All entries by key, and the values of masks and temperatures."""
        entries: dict[str, Entry] = {}
        values: dict[str, Tensor] = {}
        for path in self.paths:
            for key, entry, value in self._of_safetensors(path) if self.safetensors else self._of_torch(path):
                entries[key] = entry
                if value is not None:
                    values[key] = value
        return entries, values

    @staticmethod
    def _of_safetensors(path: Path) -> Iterator[tuple[str, Entry, Tensor | None]]:
        try:
            with _safetensors.safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    piece = file.get_slice(key)
                    dtype = _DTYPES.get(piece.get_dtype(), torch.uint8)
                    value = file.get_tensor(key) if _is_checked(key) else None
                    yield key, Entry(tuple(piece.get_shape()), dtype), value
        except _safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file (truncated or foreign): {error}") from error

    @staticmethod
    def _of_torch(path: Path) -> Iterator[tuple[str, Entry, Tensor | None]]:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds Python objects beyond tensors; only weights are read") from error
        except (RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} is not a readable torch file (truncated, foreign, or older than torch 1.6)"
            ) from error
        if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ValueError(f"{path} holds no state dict (a mapping of names to tensors)")
        for key, value in found.items():
            yield key, Entry(tuple(value.shape), value.dtype), value.clone() if _is_checked(key) else None


def _shards(index: Path) -> list[str]:
    """The files that an index names; ValueError that names the index where it is none."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        names = sorted(set(where.values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"weight_map = {where!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of shards ({type(error).__name__}: {error}): it needs a JSON object "
            "'weight_map' of keys to file names"
        ) from error
    return names


def check_entries(folder: Path, entries: Mapping[str, Entry], expected: Mapping[str, Entry]) -> None:
    """ValueError with the checkpoint's key where one is missing, extra, of another shape, or no float."""
    for what, keys in (
        ("lacks", [key for key in expected if key not in entries]),
        ("has keys that its config.json leaves no place for:", [key for key in entries if key not in expected]),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"the checkpoint in {folder} {what} {keys[0]!r}{more}")
    for key, entry in entries.items():
        if entry.shape != expected[key].shape:
            raise ValueError(
                f"the checkpoint in {folder} has {key!r} of shape {list(entry.shape)}, and its config.json (with the "
                f"image tower's) means {list(expected[key].shape)}"
            )
        if entry.dtype not in FLOATS and not key.endswith(MASK):
            raise ValueError(
                f"the checkpoint in {folder} has {key!r} of {entry.dtype}: its values would be taken for "
                "weights; packed or quantised checkpoints are not supported"
            )


def check_values(values: Mapping[str, Tensor]) -> None:
    """ValueError with the key for a temperature other than 0 and a mask that is none."""
    for key, value in values.items():
        if key.endswith(TEMPERATURE) and bool((value != 0).any()):
            raise ValueError(
                f"{key} = {value.float().flatten().tolist()}: only temperature 0 is supported, which all of DynMoE's "
                "checkpoints have: this gate multiplies cosines and thresholds by its exponential"
            )
        if key.endswith(MASK) and not (bool(((value == 0) | (value == 1)).all()) and bool(value.any())):
            raise ValueError(f"{key} = {value.float().tolist()}: give 0 and 1, with at least one active expert")


def _is_checked(key: str) -> bool:
    return key.endswith((TEMPERATURE, MASK))


def common_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """The dtype of a checkpoint's weights: the widest, masks excepted, which are fp32 beside half precision."""
    floats = {entry.dtype for key, entry in entries.items() if entry.dtype.is_floating_point and not _is_checked(key)}
    found = next(iter(floats), torch.float32)
    for dtype in floats:
        found = torch.promote_types(found, dtype)
    return found
