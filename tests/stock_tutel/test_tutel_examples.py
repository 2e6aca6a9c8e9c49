"""Tutel's own `helloworld` examples with a top-any gate, through `dynmoe-tutel run`, in one and two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

tutel = pytest.importorskip("tutel", reason="stock Tutel is not installed: its README says how")

SIZES = ["--batch_size=4", "--num_tokens=32", "--model_dim=64", "--num_steps=12"]
CPU, HIDDEN = ["--device=cpu"], ["--hidden_size=64"]
EXAMPLES = {
    "helloworld": CPU + HIDDEN,
    "helloworld_switch": CPU + HIDDEN,
    "helloworld_ddp_tutel": CPU + HIDDEN,
    "helloworld_custom_expert_sharded": CPU,
    "helloworld_custom_gate_expert": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, processes: int, tmp_path: Path) -> None:
    """Only the gate changes; the loss falls, and every process exits cleanly."""
    source = (Path(tutel.__file__).parent / "examples" / f"{name}.py").read_text()
    gate = "gate_type = {'type': 'top_any', 'max_expert_num': 4}"
    edited, edits = re.subn(r"gate_type\s*=\s*\{'type': '(top|custom)'[^}]*\}", gate, source)
    assert edits >= 1
    (tmp_path / "example.py").write_text(edited)
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, "-m", "dynmoe_tutel", "run", "example.py", *SIZES, *EXAMPLES[name]]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"STEP-\d+: loss = ([\d.]+)", done.stdout)]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
