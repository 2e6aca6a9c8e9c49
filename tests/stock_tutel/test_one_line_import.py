"""Tutel's `helloworld` with one import changed prints the losses of Tutel itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

tutel = pytest.importorskip("tutel", reason="stock Tutel is not installed: its README says how")

IMPORT = "from tutel import moe as tutel_moe"
SIZES = ["--device=cpu", "--batch_size=4", "--num_tokens=64", "--model_dim=64", "--hidden_size=96", "--num_steps=10"]


def losses(source: str, folder: Path, options: list[str], processes: int) -> list[str]:
    """What the example prints."""
    folder.mkdir()
    (folder / "example.py").write_text(source)
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *launcher, "example.py", *SIZES, *options],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return re.findall(r"STEP-\d+: loss = ([\d.]+)", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "processes"),
    [
        ([], 1),
        (["--top=1", "--l_aux_wt=0.1", "--capacity_factor=-1.25"], 1),
        (["--dtype=float64", "--num_local_experts=4", "--capacity_factor=0"], 1),
        (["--expert_type=llama_ffn"], 1),
        ([], 2),
    ],
    ids=["default", "top-1", "float64", "llama_ffn", "2 processes"],
)
def test_helloworld_prints_the_same_losses(options: list[str], processes: int, tmp_path: Path) -> None:
    """All digits of ten losses; over two processes, too, where each draws its experts from a seed of its own."""
    source = (Path(tutel.__file__).parent / "examples" / "helloworld.py").read_text()
    assert source.count(IMPORT) == 1
    expected = losses(source, tmp_path / "tutel", options, processes)
    assert len(expected) == 10
    changed = source.replace(IMPORT, "from dynmoe_tutel import moe as tutel_moe")
    assert losses(changed, tmp_path / "changed", options, processes) == expected
