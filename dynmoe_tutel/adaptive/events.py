"""Lines that tell a user how experts grow and are pruned, also under a script that logs warnings alone."""

from __future__ import annotations

import logging
import os
import sys

import torch.distributed as dist

__all__ = ["EVENTS", "announce", "is_first_rank", "is_shown"]

EVENTS = "DYNMOE_TUTEL_EVENTS"
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK")


def announce(logger: logging.Logger, message: str) -> None:
    """Log an event at INFO. Where the environment variable DYNMOE_TUTEL_EVENTS is set, and not to 0, the first rank
    also writes it to stderr, unless a handler shows it."""
    logger.info("%s", message)
    asked = os.environ.get(EVENTS, "") not in ("", "0")
    if asked and is_first_rank() and not is_shown(logger, logging.INFO):
        sys.stderr.write(f"dynmoe_tutel: {message}\n")


def is_first_rank() -> bool:
    """Whether this process has rank 0 of the job, by torch.distributed or else by the launcher's environment."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return next((os.environ[name] for name in _RANKS if os.environ.get(name)), "0") == "0"


def is_shown(logger: logging.Logger, level: int) -> bool:
    """Whether a record of `level` reaches a handler that is no file; one with a method `shows(level)` is asked."""
    if not logger.isEnabledFor(level):
        return False
    at: logging.Logger | None = logger
    while at is not None:
        for handler in at.handlers:
            writes = not isinstance(handler, logging.FileHandler | logging.NullHandler) and level >= handler.level
            if writes and getattr(handler, "shows", lambda level: True)(level):
                return True
        at = at.parent if at.propagate else None
    return False
