"""`tutel.system` for training scripts: the parallel environment, time, arrays on disk, a cache."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import net

__all__ = [
    "LocalCache",
    "apply_rank_size_from_pattern",
    "cache",
    "get_local_session",
    "init_affinity_at_program_beginning",
    "init_data_model_parallel",
    "load",
    "record_time",
    "save",
]

_log = logging.getLogger("dynmoe_tutel")
_session: list[net.ParallelEnvironment] = []


def init_data_model_parallel(group_count: int = 1, backend: str = "nccl") -> net.ParallelEnvironment:
    """This process's parallel environment, see `net.create_groups_from_world`; a single process initialises nothing."""
    before = dist.is_available() and dist.is_initialized()
    environment = net.create_groups_from_world(group_count, include_init=backend)
    if environment.is_distributed and not before:
        atexit.register(_quit)
    _session[:] = [environment]
    _log.info(
        "rank %d of %d: data_rank = %d, model_rank = %d",
        environment.global_rank,
        environment.global_size,
        environment.data_rank,
        environment.model_rank,
    )
    return environment


def _quit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        dist.destroy_process_group()


def get_local_session() -> net.ParallelEnvironment:
    """The last result of `init_data_model_parallel`; RuntimeError before the first call."""
    if not _session:
        raise RuntimeError(
            "there is no session yet: call tutel.system.init_data_model_parallel() first, or record_time(is_cuda=False)"
        )
    return _session[0]


def record_time(is_cuda: bool | None = None) -> float:
    """Seconds since the epoch, after the GPU has finished. `is_cuda` defaults to the session's device."""
    if get_local_session().is_cuda if is_cuda is None else is_cuda:
        torch.cuda.synchronize()
    return time.time()


def save(t: Tensor, path: str) -> None:
    """Write a tensor as a NumPy file."""
    import numpy as np

    np.save(path, t.detach().cpu().numpy())


def load(path: str, device: Any = None) -> Tensor:
    """Read what `save` wrote."""
    import numpy as np

    return torch.tensor(np.load(path), device=device)


def apply_rank_size_from_pattern(filename: str, rank: int, size: int, create_dir: bool = True) -> str:
    """`filename` with {rank} and {size} filled in; makes its folder."""
    if "{rank}" not in filename:
        _log.warning("filename = %r has no {rank}: all ranks would use one file", filename)
    filename = filename.replace("{size}", str(size)).replace("{rank}", str(rank))
    folder = os.path.dirname(filename)
    if create_dir and folder:
        os.makedirs(folder, exist_ok=True)
    return filename


def init_affinity_at_program_beginning() -> None:
    """Does nothing: the system places threads."""


class LocalCache:
    """A key-value cache of one process."""

    _CACHE: dict[Any, Any] = {}  # noqa: RUF012  (as in Tutel: one per process)

    @staticmethod
    def reset() -> None:
        """Forget everything."""
        LocalCache._CACHE = {}

    @staticmethod
    def set(key: Any, val: Any) -> None:
        """Keep `val` under `key`."""
        LocalCache._CACHE[key] = val

    @staticmethod
    def get(key: Any = None) -> Any:
        """The value under `key`; a list of all values if there is none."""
        return LocalCache._CACHE[key] if key in LocalCache._CACHE else list(LocalCache._CACHE.values())


def cache() -> type[LocalCache]:
    """The cache of this process."""
    return LocalCache


def forget_session() -> None:
    """Drop session, groups and cache, as in a new process; torch.distributed stays as it is."""
    _session.clear()
    net._environments.clear()
    LocalCache.reset()
