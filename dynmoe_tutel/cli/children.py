"""Processes that a script starts by `spawn` or `forkserver` find Tutel (or its stand-in) and DeepSpeed as it does.

Such a child is a new interpreter that reads the "preparation data" of its parent before it imports the script. A value
in them calls `enter_child` when it is unpickled. A forked child has everything already.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import spawn
from typing import Any

__all__ = ["enter_child", "prepare_children"]

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# the child may start in a folder from which this package cannot be imported; its own modules find one another later
_ENTER = f"""import sys
sys.path.insert(0, {_ROOT!r})
try:
    from dynmoe_tutel.cli.children import enter_child
finally:
    sys.path.remove({_ROOT!r})
enter_child(path)
"""
_FORKSERVER = "ignore"  # the name under which the fork server itself asks for the data


class _Entrance:
    """Becomes a call in the process that unpickles it."""

    def __init__(self, path: list[str]) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, (_ENTER, {"path": self.path})


def prepare_children() -> Callable[[], None]:
    """Let the children of this process enter as it did; gives the function that undoes it."""
    original = spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        data = original(name)
        if name == _FORKSERVER:  # it would import the script ahead of its children, and find no Tutel
            return {key: value for key, value in data.items() if not key.startswith("init_main")}
        return {**data, "dynmoe_tutel": _Entrance(data["sys_path"])}

    def undo() -> None:
        spawn.get_preparation_data = original

    spawn.get_preparation_data = get_preparation_data
    return undo


def enter_child(path: list[str]) -> None:
    """Provide Tutel and DeepSpeed in a child whose parent has this `sys.path`, and in its own children."""
    run_script = importlib.import_module("dynmoe_tutel.cli.run_script")  # it imports this module
    sys.path[:] = path
    forever = ExitStack()
    run_script.show_log(forever)
    run_script.provide_tutel(forever)
    run_script.provide_deepspeed(forever)
    prepare_children()
