"""The folder of the tuned tiles, and what is remembered of the rules."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

from dynmoe_tutel import kernels
from dynmoe_tutel.kernels.gpu import tiles

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_looked_for_where_the_wheel_has_them() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["dynmoe_tutel.kernels"] == "tuned/*.json"
    assert Path(kernels.__file__).parent / "tuned" == tiles.TABLES


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_remembered_tile_is_that_of_the_rule(chip: str) -> None:
    """Batches of any size share few entries: the rule compares a mean number of rows with powers of two alone."""
    for kind in tiles.GEMM_KINDS:
        for K, N in ((384, 1536), (1536, 384), (100, 47)):
            for rows in [*range(70), *(2**k + d for k in range(6, 14) for d in (-1, 0, 1, 2**k // 2))]:
                given = (torch.bfloat16, rows, K, N)
                with tiles.assume(chip):
                    found = tiles.gemm(kind, torch.device("cpu"), *given)
                assert found == tiles.default_gemm(kind, chip, *given), (kind, *given)
