"""A script of the user's, and `dynmoe-tutel run` on it in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import PATIENCE

COMMAND = [sys.executable, "-m", "dynmoe_tutel", "run"]


def write(folder: Path, text: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def call(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process."""
    env = {**os.environ, **environment}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=env)
