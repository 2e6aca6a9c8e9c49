"""Checking the caller's options: refusals that name the key, and warnings that come once."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable

_log = logging.getLogger("dynmoe_tutel")
_warned: set[str] = set()


def refuse_unknown(where: str, given: Iterable[str], allowed: Collection[str], hint: str = "") -> None:
    """ValueError that names every key of `given` that is not in `allowed`, with the nearest allowed one."""
    unknown = [key for key in given if key not in allowed]
    if not unknown:
        return
    near = difflib.get_close_matches(str(unknown[0]), allowed, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    names = ", ".join(repr(key) for key in unknown)
    raise ValueError(f"unknown key {names} in {where}: allowed are {', '.join(sorted(allowed))}{meant}{hint}")


def warn_once(message: str) -> None:
    """Log a warning the first time this message comes."""
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)


def positive_int(name: str, value: object) -> int:
    """`value` as an int > 0, else ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value!r}: give an integer of at least 1")
    return value
