"""Experts divided over real Gloo processes, against one process and the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree_with_one_and_with_the_oracle(processes: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ranks.run, args=(processes, str(tmp_path), ranks.one_group), nprocs=processes)
