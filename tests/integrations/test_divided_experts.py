"""Real Trainers whose ranks divide the experts: norms, clipping, overflow and refusals, against one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import spawn_ranks

sys.path.insert(0, str(Path(__file__).parent))  # for the ranks' processes


@pytest.mark.parametrize(("job", "ranks"), [("run_transformers", 2), ("run_transformers_with_copies", 4)])
def test_transformers(job: str, ranks: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")
    import divided_jobs

    spawn_ranks(getattr(divided_jobs, job), (ranks, str(tmp_path)), ranks)


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install '.[test]'")
    import divided_jobs

    spawn_ranks(divided_jobs.run_lightning, (2, str(tmp_path)), 2)
