"""Writes and reads run checkpoints, and reads weights that others wrote.

A checkpoint is a folder of two files: `tensors.safetensors` and `state.json`. The JSON holds the nested state with
references to tensors, and the size and SHA-256 of the tensor file, so that a truncated or mismatched pair is refused.
The folder is written under a temporary name, synced to disk, then renamed: a reader sees a whole checkpoint or none.
Safetensors is imported when a checkpoint is read or written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "dynmoe_tutel.checkpoint"
FORMAT_VERSION = 1
TENSORS = "tensors.safetensors"
STATE = "state.json"
TEMPORARY = ".tmp-"

# State dicts often sit under one of these names in a file that holds more than weights.
WRAPPERS = ("model", "state_dict", "module", "model_state_dict", "model_dict")


def write_checkpoint(folder: str | os.PathLike[str], state: Mapping[str, Any]) -> Path:
    """Write `state` as the checkpoint `folder`, atomically: after an error or a kill `folder` is absent or whole.

    `state` is nested dicts (keys: str or int), lists, tuples, tensors (dense, any dtype and device), str, int,
    float, bool and None. Raises ValueError for anything else or if `folder` exists; after an OSError (no space, no
    permission) the temporary files are removed.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"checkpoint {folder} exists already: a checkpoint is never overwritten")
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "", tensors)
    packed = _safetensors().save(tensors)
    head = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tensors": {"bytes": len(packed), "sha256": hashlib.sha256(packed).hexdigest()},
        "state": tree,
    }
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write_synced(temporary / TENSORS, packed)
        write_synced(temporary / STATE, json.dumps(head, allow_nan=False).encode())
        sync_folder(temporary)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return folder


def read_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that `write_checkpoint` wrote, bit for bit, its tensors on the CPU.

    Raises ValueError, naming the file, if one is missing, truncated, damaged or of another format.
    """
    folder = Path(folder)
    head = _read_head(folder)
    path = folder / TENSORS
    try:
        packed = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"checkpoint {folder} lacks {TENSORS}: it is not whole") from None
    expected = head["tensors"]
    if len(packed) != expected["bytes"]:
        raise ValueError(
            f"{path} has {len(packed)} bytes, {STATE} says {expected['bytes']}: it is truncated or belongs elsewhere"
        )
    if hashlib.sha256(packed).hexdigest() != expected["sha256"]:
        raise ValueError(f"{path} does not match the SHA-256 in {STATE}: it is damaged or belongs elsewhere")
    tensors = _safetensors().load(packed)
    state: dict[str, Any] = _decode(head["state"], tensors)
    return state


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` looks like a checkpoint of this format (it may still be damaged)."""
    return (Path(folder) / STATE).is_file()


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The named tensors of a safetensors file or of a torch file (read with `weights_only=True`), on the CPU.

    Finds a state dict under a usual name ("model", "state_dict", "module", ...). Raises ValueError if the file is
    missing, truncated, foreign, needs arbitrary Python objects, or holds no named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        try:
            tensors: dict[str, Tensor] = _safetensors().load(path.read_bytes())
        except Exception as error:  # safetensors' error type is in its compiled module
            raise ValueError(f"{path} is not a readable safetensors file (truncated or foreign): {error}") from error
        return dict(sorted(tensors.items()))  # safetensors gives no order
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            raise ValueError(f"{path} holds Python objects beyond tensors; only weights are read") from error
        raise ValueError(f"{path} is not a readable torch file (truncated or foreign)") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a readable torch file (truncated or foreign)") from error
    found = _named_tensors(content)
    if not found:
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors)")
    return found


def write_file(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Put `content` at `path` atomically: written beside it, synced, then renamed over it."""
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        write_synced(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until its bytes are on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on the disk, if the system can sync folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _safetensors() -> Any:
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "checkpoints need safetensors, which is not installed: pip install 'dynmoe_tutel[experiments]'"
        ) from error


def _read_head(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    try:
        head = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint of dynmoe_tutel: it has no {STATE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON (truncated or foreign): {error}") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ValueError(f"{path} is not of the format {FORMAT!r}: the checkpoint is foreign")
    if head.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {head.get('version')!r}; this package reads {FORMAT_VERSION}")
    return head


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of `value`; its tensors go to `tensors` under their path in the tree."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        while name in tensors:  # two paths may look alike: "a/b", and "b" in "a"
            name += "'"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"$tensor": name}
    inner: Callable[[Any, Any], Any] = lambda key, item: _encode(item, f"{name}/{key}", tensors)  # noqa: E731
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: inner(key, item) for key, item in value.items()}
        if all(isinstance(key, (str, int)) and not isinstance(key, bool) for key in value):
            return {"$items": [[key, inner(key, item)] for key, item in value.items()]}
    elif isinstance(value, tuple):
        return {"$tuple": [inner(i, item) for i, item in enumerate(value)]}
    elif isinstance(value, list):
        return [inner(i, item) for i, item in enumerate(value)]
    raise ValueError(f"a checkpoint cannot hold {name.lstrip('/') or 'state'} of type {type(value).__name__}")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(_decode(item, tensors) for item in value["$tuple"])
    if "$items" in value:
        return {key: _decode(item, tensors) for key, item in value["$items"]}
    return {key: _decode(item, tensors) for key, item in value.items()}


def _named_tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for wrapper in WRAPPERS:
        inner = _named_tensors(content.get(wrapper))
        if inner:
            return inner
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
