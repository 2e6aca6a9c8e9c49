"""`dynmoe-tutel run`: an unedited script that imports `deepspeed` gets DynMoE's `MoE`, and its children too."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import PATIENCE

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'dynmoe_tutel[deepspeed]'"
)

SCRIPT = """
import sys
import multiprocessing

assert "deepspeed" not in sys.modules  # until the script imports it
from deepspeed.moe.layer import MoE
import deepspeed
import torch
from torch import nn


def experts(queue=None):
    torch.manual_seed(0)
    layer = MoE(8, expert=nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), num_experts=4 // 2, ep_size=1, k=-1,
                capacity_factor=1.5, eval_capacity_factor=2.0, min_capacity=0.0, use_residual=False, max_expert_num=4)
    output, moe_loss, _ = layer(torch.randn(2, 5, 8))
    (output.sum() + moe_loss).backward()
    assert MoE is deepspeed.moe.layer.MoE
    found = f"{deepspeed.initialize.__globals__['__name__']}: {layer.num_experts} {type(layer.deepspeed_moe).__name__}"
    return found if queue is None else queue.put(found)


if __name__ == "__main__":
    print(experts(), deepspeed.__spec__.loader is deepspeed.__loader__, type(deepspeed.__loader__).__name__)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=experts, args=(queue,))
    child.start()
    print(queue.get())
    child.join()
"""


def test_an_unedited_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "DS_LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "dynmoe_tutel", "run", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    found = "dynmoe_tutel.deepspeed.engine: 4 DynMoELayer"
    said = [line for line in done.stdout.splitlines() if "DynMoELayer" in line]
    assert said == [f"{found} True SourceFileLoader", found]
