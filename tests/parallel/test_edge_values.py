"""Values that are not finite, on two ranks."""

from __future__ import annotations

from pathlib import Path

import edge_values
import ranks
from helpers import spawn_ranks


def test_a_broken_token_shows_in_its_own_output_alone(tmp_path: Path) -> None:
    spawn_ranks(ranks.run, (2, str(tmp_path), [edge_values.run_checks]), 2)
