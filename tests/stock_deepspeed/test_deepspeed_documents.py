"""The blocks of docs/deepspeed.md run, one after another, as a reader would run them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import PATIENCE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deepspeed.md"


@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'dynmoe_tutel[deepspeed]'"
)
def test_the_blocks_run() -> None:
    blocks = re.findall(r"^```python deepspeed\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    with socket.socket() as free:  # what torchrun sets for one process
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    code = "\n".join(["import torch", "torch.manual_seed(0)", *blocks])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"^3 experts$", done.stdout, re.MULTILINE)
    assert "grown expert 2 of moe" in done.stdout
