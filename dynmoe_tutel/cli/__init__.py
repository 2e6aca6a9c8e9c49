"""The command line `dynmoe-tutel`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

__all__ = ["app", "main"]


def main() -> None:
    """The entry point of the console script. `run` needs no extra, so it is told apart before typer is imported."""
    command, *arguments = sys.argv[1:] or [""]
    if command == "run" and (arguments[:1] != ["--help"] or find_spec("typer") is None):
        from .run_script import main as run

        sys.exit(run(arguments[arguments[:1] == ["--"] :]))
    from .commands import app

    app()


def __getattr__(name: str) -> Any:
    if name == "app":
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
