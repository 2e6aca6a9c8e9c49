"""Experts divided over real Gloo processes, against one process and the oracle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import features
import pytest
import ranks
from helpers import spawn_ranks

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree_with_one_and_with_the_oracle(processes: int, tmp_path: Path) -> None:
    spawn_ranks(ranks.run, (processes, str(tmp_path), (*ranks.CHECKS, *features.CHECKS)), processes)


@pytest.mark.parametrize(("processes", "expert_ranks"), [(2, 2), (4, 2)])
def test_recipes_with_ddp_fsdp_and_all_reduce(processes: int, expert_ranks: int) -> None:
    """2 ranks share the experts; of 4, two pairs hold copies. Two steps of Adam, gradients of the global mean loss."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, str(HERE / "recipe.py"), str(expert_ranks)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("end", ["kill", "raise"])
def test_a_lost_rank_ends_the_others_with_its_name(end: str, tmp_path: Path) -> None:
    started = time.monotonic()
    jobs = [
        subprocess.Popen(
            [sys.executable, str(HERE / "lost_rank.py"), str(rank), "3", str(tmp_path), end],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [job.communicate(timeout=90)[1] for job in jobs]
    assert time.monotonic() - started < 60
    assert jobs[2].returncode == (-signal.SIGKILL if end == "kill" else 1)
    assert ("a bad batch" in errors[2]) == (end == "raise")
    for rank in (0, 1):
        assert jobs[rank].returncode == 1
        assert f"RuntimeError: rank {rank}: the exchange of expert rows failed, and rank(s) [2] did not" in errors[rank]
