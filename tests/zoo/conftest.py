"""Fixtures of the zoo's tests, which skip without the extra [hf]."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("transformers") else ["test_zoo_*.py"]

if find_spec("transformers"):
    from tiny_zoo import FAMILIES, write

    @pytest.fixture(scope="session", params=FAMILIES)
    def family(request: pytest.FixtureRequest) -> str:
        """Each family in turn."""
        return str(request.param)

    @pytest.fixture(scope="session")
    def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The folder of a checkpoint of the family, in fp32, one file."""
        folder = tmp_path_factory.mktemp(family)
        write(folder, family)
        return folder

    @pytest.fixture(autouse=True)
    def _quiet() -> Any:
        transformers = pytest.importorskip("transformers")
        transformers.utils.logging.disable_progress_bar()
