"""Tests that need a GPU. `DYNMOE_TEST_DEVICE=cpu` runs those that a CPU can run, to check the tests themselves."""

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
    """Mark every test in this directory `gpu`."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """ "cuda", or the environment's device; tests of a GPU's streams, graphs or memory skip on any other."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch sees")
    if DEVICE != "cuda" and request.node.get_closest_marker("cuda_only"):
        pytest.skip("about streams, graphs or memory of a GPU")
    return DEVICE


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    """Multiply fp32 in fp32 unless a test asks for tf32, let warnings come anew, and restore both afterwards."""
    matmul = torch.backends.cuda.matmul  # read its flag: torch's older getter raises once that is set
    precision, warned = matmul.fp32_precision, set(validation._warned)
    torch.set_float32_matmul_precision("highest")
    validation._warned.clear()
    yield
    matmul.fp32_precision = precision
    validation._warned.clear()
    validation._warned.update(warned)
