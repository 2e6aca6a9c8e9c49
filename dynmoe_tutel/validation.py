"""Checks of the caller's options: errors that name the key, and warnings that come once."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Collection, Iterable
from numbers import Integral, Real

import torch
from torch import Tensor

_log = logging.getLogger("dynmoe_tutel")
_warned: set[str] = set()


def refuse_unknown(where: str, given: Iterable[str], allowed: Collection[str], hint: str = "") -> None:
    """Raise ValueError if keys of `given` are not in `allowed`; name each, with the nearest allowed key."""
    unknown = [key for key in given if key not in allowed]
    if not unknown:
        return
    near = difflib.get_close_matches(str(unknown[0]), allowed, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    names = ", ".join(repr(key) for key in unknown)
    raise ValueError(f"unknown key {names} in {where}: allowed are {', '.join(sorted(allowed))}{meant}{hint}")


def has_no_data(tensor: Tensor) -> bool:
    """Whether `tensor` has a shape and no values: meta, or in a FakeTensorMode without symbolic shapes."""
    if tensor.is_meta:
        return True
    mode = None if torch.compiler.is_compiling() else getattr(tensor, "fake_mode", None)
    return mode is not None and mode.shape_env is None


def warn_once(message: str) -> None:
    """Log a warning the first time this message comes; silent while torch.compile traces."""
    if torch.compiler.is_compiling():
        return
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)


def positive_int(name: str, value: object) -> int:
    """`value`, an integer of any type, as an int > 0; else ValueError with `name`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} = {value!r}: give an integer of at least 1")
    return int(value)


def number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """`value` as a finite float in [low, high] (above low if `open_low`); else ValueError with `name`."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= float(value) <= high or (open_low and float(value) == low):  # type: ignore[arg-type]
        if low == -math.inf:
            raise ValueError(f"{name} = {value!r}: give a finite number")
        least = f"above {low:g}" if open_low else f"of at least {low:g}"
        most = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} = {value!r}: give a finite number {least}{most}")
    return float(value)  # type: ignore[arg-type]


def flag(name: str, value: object) -> bool:
    """`value` (True, False, 0 or 1) as a bool; else ValueError with `name`."""
    if isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1)):
        return bool(value)
    if type(value).__name__ in ("bool", "bool_"):  # numpy's
        return bool(value)
    raise ValueError(f"{name} = {value!r}: give True or False")


def environment_flag(name: str) -> bool:
    """Whether the environment variable `name` is an integer other than 0; unset or empty means 0."""
    text = os.environ.get(name, "") or "0"
    try:
        return int(text) != 0
    except ValueError:
        raise ValueError(f"environment variable {name} = {text!r}: set it to 0 or 1") from None


def environment_number(name: str, default: float) -> float:
    """The environment variable `name` as a finite float; `default` where it is unset or empty."""
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return number(name, float(text), -math.inf)
    except ValueError:
        raise ValueError(f"environment variable {name} = {text!r}: set it to a finite number") from None


def describe(value: object) -> str:
    """Type, shape and device of a value, for messages."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r}"[:80]
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
