"""The folder of the tuned tiles."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

from dynmoe_tutel import kernels
from dynmoe_tutel.kernels.gpu import tiles

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_looked_for_where_the_wheel_has_them() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["dynmoe_tutel.kernels"] == "tuned/*.json"
    assert Path(kernels.__file__).parent / "tuned" == tiles.TABLES
