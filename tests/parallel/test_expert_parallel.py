"""Experts divided over real Gloo processes, against one process and the oracle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import features
import pytest
import ranks
from helpers import PATIENCE, outputs, spawn_ranks

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree_with_one_and_with_the_oracle(processes: int, tmp_path: Path) -> None:
    spawn_ranks(ranks.run, (processes, str(tmp_path), (*ranks.CHECKS, *features.CHECKS)), processes)


@pytest.mark.parametrize(("processes", "expert_ranks"), [(2, 2), (4, 2)])
def test_recipes_with_ddp_fsdp_and_all_reduce(processes: int, expert_ranks: int) -> None:
    """2 ranks share the experts; with 4, each pair holds a copy. Two Adam steps, gradients of the global mean loss."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, str(HERE / "recipe.py"), str(expert_ranks)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(("lost", "end"), [(2, "kill"), (0, "raise")])
def test_a_lost_rank_ends_the_others_with_its_name(lost: int, end: str, tmp_path: Path) -> None:
    """They end long before the group's timeout. The store is a file, or dies with the rank that keeps it."""
    store = f"file://{tmp_path}/store" if lost else f"tcp://127.0.0.1:{free_port()}"
    jobs = [
        subprocess.Popen(
            [sys.executable, str(HERE / "lost_rank.py"), str(rank), "3", store, str(lost), end],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [error for _, error in outputs(jobs)]
    assert jobs[lost].returncode == (-signal.SIGKILL if end == "kill" else 1)
    assert ("a bad batch" in errors[lost]) == (end == "raise")
    for rank in {0, 1, 2} - {lost}:
        assert jobs[rank].returncode == 1
        said = f"RuntimeError: rank {rank}: the exchange of expert rows failed, and rank(s) [{lost}] did not"
        assert said in errors[rank]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
