"""The one-line import of Tutel's scripts, on real Gloo processes."""

from __future__ import annotations

from pathlib import Path

import drop_in
import ranks
from helpers import spawn_ranks


def test_no_group_means_what_it_means_in_tutel(tmp_path: Path) -> None:
    spawn_ranks(ranks.run, (2, str(tmp_path), drop_in.CHECKS), 2)
