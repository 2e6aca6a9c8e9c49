"""Checkpoints of a job on any number of ranks, which a job on any other number can read.

The folder has the format of torch.distributed.checkpoint. `model.<name>` and `optimizer.<i>.<name>.<key>` are whole
tensors under names without ranks: experts divided over ranks are DTensors, sharded by slots. Two kinds of bytes
(torch.save, read with weights_only) lie beside them: `shared`, from rank 0, and `rank.<r>`, each rank's own. Only the
same layout of ranks reads `rank.<r>` back unchanged; any other layout sums the records of an open window.

A save writes a temporary folder beside the target and renames it when all ranks are done: a folder of the final name
is whole, and no older checkpoint is touched. All functions but `latest` must be called on every rank.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..adaptive.controller import ExpertController, records_of, with_records
from ..adaptive.optimizer_state import Optimizers, optimizer_list
from .files import TEMPORARY, sync_folder
from .named_tensors import ShardedState

VERSION = 1
SHARED, RANK = "shared", "rank"
METADATA = ".metadata"  # torch.distributed.checkpoint writes it last

Properties = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # whole shape and dtype, by name


@dataclass(frozen=True)
class Restored:
    """The result of `load`: `extra` as saved; this rank's `rank_state`, None if the layout of ranks has changed.

    `ranks` is the number of ranks that saved.
    """

    extra: Any
    rank_state: Any
    ranks: int


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers = None,
    controller: ExpertController | None = None,
    *,
    extra: Any = None,
    rank_state: Any = None,
) -> Path:
    """Write the checkpoint `folder` on a file system that all ranks share; every rank must call it.

    `extra` (taken from rank 0) and `rank_state` (each rank's own, such as its random state) hold what
    `torch.load(weights_only=True)` reads: numbers, strings, tensors, lists, tuples and dicts of them. Replicated
    tensors are written once, from any rank.

    Raises ValueError on every rank, and writes nothing, if `folder` exists or something cannot be stored; RuntimeError
    that names the failed rank if writing fails. A killed save may leave a folder `.tmp-<name>`, which the next save of
    that name replaces.
    """
    folder = Path(folder)
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    with _agreed():
        state = ShardedState(model, optimizer_list(optimizer))
        of_optimizers, others = state.optimizer_tensors()
        tensors = {**state.model_tensors(), **of_optimizers}
        shared: dict[str, Any] = {"version": VERSION, "ranks": _world(), "optimizers": others, "extra": extra}
        own: dict[str, Any] = {"state": rank_state}
        if controller is not None:
            shared["controller"] = controller.state_dict()
            shared["record_ranks"] = {key: _ranks_of(group) for key, group in controller.record_groups().items()}
            own["records"] = records_of(shared["controller"])
        tensors[f"{RANK}.{_rank()}"] = _to_bytes("rank_state", own)
        if _rank() == 0:
            tensors[SHARED] = _to_bytes("extra", shared)
            _make_temporary(folder, temporary)
    try:
        with _torch_messages(f"checkpoint {folder} could not be written"):
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), no_dist=_world() == 1)
        with _agreed():
            if _rank() == 0:
                sync_folder(temporary)
                os.rename(temporary, folder)
                sync_folder(folder.parent)
    except BaseException:
        if _rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers = None,
    controller: ExpertController | None = None,
) -> Restored:
    """Put the checkpoint `folder` into the model, and into the optimizer and controller if given; on every rank.

    On the same layout of ranks (as many, with records summed over the same ranks) training continues bitwise. On
    another, the first rank of each group that sums a record gets the window's sums so far; the rest start empty.

    Raises ValueError on every rank, and changes nothing, if the checkpoint is not whole or its names, shapes, slots,
    parameter groups or gates differ from the arguments'. Raises RuntimeError that names the failed rank if reading
    fails; the model is then loaded in part. Load only checkpoints that you trust: torch's index in the folder is a
    pickle.
    """
    folder = Path(folder)
    with _agreed():
        properties = _properties(folder)
        shared = _read_bytes(folder, properties, SHARED)
        if shared.get("version") != VERSION:
            raise ValueError(f"checkpoint {folder} has version {shared.get('version')!r}, this package reads {VERSION}")
        state = ShardedState(model, optimizer_list(optimizer))
        tensors = state.model_tensors()
        _check_model(folder, tensors, properties)
        buffers: dict[str, Tensor] = {}
        states: list[dict[str, Any]] = []
        if optimizer is not None:
            buffers, states = state.optimizer_buffers(shared["optimizers"], properties)
        same = _same_ranks(shared, controller)
        own = _read_bytes(folder, properties, f"{RANK}.{_rank()}") if same else {}
        if controller is not None:
            if "controller" not in shared:
                raise ValueError(f"checkpoint {folder} was saved without a controller")
            of_controller = _with_own_records(folder, properties, shared, own, controller)
            controller.check_state_dict(of_controller)
    with _torch_messages(f"checkpoint {folder} could not be read"):
        dcp.load({**tensors, **buffers}, storage_reader=dcp.FileSystemReader(folder), no_dist=_world() == 1)
    for each, loaded in zip(optimizer_list(optimizer), states, strict=True):
        each.load_state_dict(loaded)
    if controller is not None:
        controller.load_state_dict(of_controller)
    return Restored(shared["extra"], own.get("state"), int(shared["ranks"]))


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint in `folder` whose name has the highest number ("step-900" before "step-1000"), or None."""
    names = Path(folder).iterdir() if Path(folder).is_dir() else ()
    whole = [path for path in names if not path.name.startswith(TEMPORARY) and (path / METADATA).is_file()]
    return max(whole, key=lambda path: ([int(n) for n in re.findall(r"\d+", path.name)], path.name), default=None)


def _with_own_records(
    folder: Path, properties: Properties, shared: dict[str, Any], own: dict[str, Any], controller: ExpertController
) -> dict[str, Any]:
    """The controller's state with the records for this rank to continue from."""
    if own:
        return with_records(shared["controller"], own["records"])
    needed = sorted({rank for ranks in shared["record_ranks"].values() for rank in ranks})
    saved = {rank: _read_bytes(folder, properties, f"{RANK}.{rank}")["records"] for rank in needed}
    records = {}
    for key, group in controller.record_groups().items():
        ranks = shared["record_ranks"].get(key, ()) if _ranks_of(group)[0] == _rank() else ()
        records[key] = [saved[rank][key] for rank in ranks]
    return with_records(shared["controller"], controller.merged_records(records))


def _same_ranks(shared: Mapping[str, Any], controller: ExpertController | None) -> bool:
    if shared["ranks"] != _world():
        return False
    if controller is None or "record_ranks" not in shared:
        return True
    return bool(shared["record_ranks"] == {k: _ranks_of(group) for k, group in controller.record_groups().items()})


def _check_model(folder: Path, tensors: Mapping[str, Tensor], properties: Properties) -> None:
    saved = {name for name in properties if name.startswith("model.")}
    lacking, unknown = sorted(set(tensors) - saved), sorted(saved - set(tensors))
    if lacking or unknown:
        raise ValueError(f"checkpoint {folder} lacks {lacking[:3]} of this model and has unknown {unknown[:3]}")
    for name, tensor in tensors.items():
        shape = properties[name][0]
        if shape != tuple(tensor.shape):
            raise ValueError(
                f"checkpoint {folder} has {name} of shape {list(shape)}, this model {list(tensor.shape)}: give the "
                "layer the slots (max_expert_num) and sizes that it was saved with"
            )


def _properties(folder: Path) -> Properties:
    """The whole shape and dtype of every tensor in the checkpoint."""
    if not (folder / METADATA).is_file():
        raise ValueError(f"{folder} is not a whole checkpoint: it has no {METADATA}")
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{folder / METADATA} cannot be read: {error}") from error
    found = {
        n: (tuple(m.size), m.properties.dtype) for n, m in metadata.items() if isinstance(m, TensorStorageMetadata)
    }
    if SHARED not in found:
        raise ValueError(f"{folder} is not a checkpoint of dynmoe_tutel: it has no tensor {SHARED!r}")
    return found


def _to_bytes(name: str, value: Any) -> Tensor:
    """`value` as uint8; ValueError if it could not be read back."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise ValueError(f"{name} holds what a checkpoint cannot store: {error}") from error
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _read_bytes(folder: Path, properties: Properties, name: str) -> dict[str, Any]:
    """The value of one tensor of bytes, read by this rank alone."""
    if name not in properties:
        raise ValueError(f"checkpoint {folder} is not whole: it has no {name!r}")
    packed = torch.empty(properties[name][0], dtype=torch.uint8)
    with _torch_messages(f"{name!r} of checkpoint {folder} could not be read"):
        dcp.load({name: packed}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    value: dict[str, Any] = torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)
    return value


def _make_temporary(folder: Path, temporary: Path) -> None:
    if folder.exists():
        raise ValueError(f"checkpoint {folder} exists already: a checkpoint is never overwritten")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed save
    temporary.mkdir(parents=True)


@contextmanager
def _torch_messages(what: str) -> Iterator[None]:
    """Turn torch's errors into a RuntimeError that names the failed rank; silence its warnings about one process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except dcp.api.CheckpointException as error:
        said = "; ".join(f"rank {r}: {type(e[0]).__name__}: {e[0]}" for r, e in sorted(error.failures.items()))
        raise RuntimeError(f"{what}: {said}") from error


@contextmanager
def _agreed() -> Iterator[None]:
    """Raise one rank's error on all ranks, so that none waits for it."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if _world() > 1:
        said: list[Any] = [None] * _world()
        dist.all_gather_object(said, None if failure is None else (type(failure).__name__, str(failure)))
        for rank, other in enumerate(said):
            if failure is None and other is not None:
                kind, message = other
                failure = (ValueError if kind == "ValueError" else RuntimeError)(f"rank {rank}: {message}")
    if failure is not None:
        raise failure


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _world() -> int:
    return dist.get_world_size() if _distributed() else 1


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _ranks_of(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group or dist.group.WORLD) if _distributed() else [0]
