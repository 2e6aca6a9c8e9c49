"""Triton kernels on what is here: a GPU, or the CPU with Triton's interpreter (fp32 only: its bf16 dot is wrong)."""

from __future__ import annotations

import os

import pytest
from helpers import HAS_GPU

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before the first kernel is defined; nothing else in a test process defines one
    )

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def device() -> str:
    """Where the kernels of these tests run."""
    return "cuda" if HAS_GPU else "cpu"
