"""Tests that need a GPU. `DYNMOE_TEST_DEVICE=cpu` runs on a CPU the bodies that it can run, to check the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# before CUDA starts: the poisoned tests run in torch's deterministic mode, which cuBLAS refuses without it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from dynmoe_tutel import validation

DEVICE = os.environ.get("DYNMOE_TEST_DEVICE", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this directory carries the marker `gpu`."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """ "cuda", or what the environment says, but for tests that are about streams, graphs or memory of a GPU."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch sees")
    if DEVICE != "cuda" and request.node.get_closest_marker("cuda_only"):
        pytest.skip("about streams, graphs or memory of a GPU")
    return DEVICE


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    """fp32 products are fp32 unless a test asks for tf32, and warnings come anew; both as before afterwards."""
    matmul = torch.backends.cuda.matmul  # its flag is read, since torch's older getter raises where that was set
    precision, warned = matmul.fp32_precision, set(validation._warned)
    torch.set_float32_matmul_precision("highest")
    validation._warned.clear()
    yield
    matmul.fp32_precision = precision
    validation._warned.clear()
    validation._warned.update(warned)
