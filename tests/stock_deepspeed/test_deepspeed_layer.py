"""Checks of `dynmoe_tutel.deepspeed` that need one process, each file in a process of its own.

DeepSpeed changes the process that imports it: its accelerator, its loggers, the modules that other tests look for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WITHOUT = "DeepSpeed is not installed: pip install 'dynmoe_tutel[deepspeed]'"


@pytest.mark.skipif(find_spec("deepspeed") is None, reason=WITHOUT)
@pytest.mark.parametrize("checks", [path.stem for path in sorted(HERE.glob("*_checks.py"))])
def test_in_a_process_of_its_own(checks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"{checks}.py")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
