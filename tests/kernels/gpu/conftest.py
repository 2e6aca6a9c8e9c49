"""Triton kernels on what is here: a GPU, or the CPU with Triton's interpreter (fp32 only: its bf16 dot is wrong)."""

from __future__ import annotations

import pytest
from helpers import HAS_GPU

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def device() -> str:
    """Where the kernels of these tests run."""
    return "cuda" if HAS_GPU else "cpu"
