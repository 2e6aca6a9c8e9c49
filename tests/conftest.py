"""One thread a test process: `make test` runs two processes, and OpenMP threads spin."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that tests start

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any test module imports Triton, as Lightning and transformers do


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, as torch's deterministic mode fills it."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """torch's global random state is that of seed 0: what a test draws does not depend on the tests before it."""
    torch.manual_seed(0)
