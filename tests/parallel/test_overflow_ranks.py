"""`OverflowRepair` over real Gloo processes: what one rank dropped, all repeat."""

from __future__ import annotations

from pathlib import Path

import overflow_checks
import ranks
from helpers import spawn_ranks


def test_all_ranks_repeat(tmp_path: Path) -> None:
    spawn_ranks(ranks.run, (2, str(tmp_path), overflow_checks.CHECKS), 2)
