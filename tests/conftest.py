"""One thread per test process: `make test` runs two processes, and OpenMP threads spin."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that tests start

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any test module imports Triton, as Lightning and transformers do

from dynmoe_tutel import MoELayer


def pytest_configure(config: pytest.Config) -> None:
    """Have numba compile the loops once, before processes that would each do it; they read its cache."""
    if getattr(config.option, "numprocesses", None):
        experts = {"num_experts_per_device": 2, "hidden_size_per_expert": 4}
        for dtype in (torch.float32, torch.bfloat16):
            layer = MoELayer("top_any", 4, experts).to(dtype)
            layer(torch.ones(8, 4, dtype=dtype)).sum().backward()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, by torch's deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch's global random state, so that a test's draws do not depend on earlier tests.

    No generator of a test has this seed: a layer drawn from the same numbers as its tokens would have some of them
    orthogonal to its routing vectors, on the very threshold.
    """
    torch.manual_seed(20240522)
