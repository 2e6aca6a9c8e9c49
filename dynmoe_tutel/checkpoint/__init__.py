"""Checkpoints: atomic files (`files`), and checkpoints of a job on any number of ranks (`distributed`)."""

from .files import (
    STATE,
    TEMPORARY,
    TENSORS,
    WRAPPERS,
    is_checkpoint,
    read_checkpoint,
    read_state_dict,
    sync_folder,
    write_checkpoint,
    write_file,
    write_synced,
)

__all__ = [
    "STATE",
    "TEMPORARY",
    "TENSORS",
    "WRAPPERS",
    "is_checkpoint",
    "read_checkpoint",
    "read_state_dict",
    "sync_folder",
    "write_checkpoint",
    "write_file",
    "write_synced",
]
