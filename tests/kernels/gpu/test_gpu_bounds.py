"""Kernels on odd shapes between protected pages: an out-of-bounds access ends the process.

It runs a sample of this directory's tests; for all of them: GUARD_PAGES=end (and start) pytest tests/kernels/gpu.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from helpers import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="guards the interpreter's memory; GPUs have their own checkers")

SAMPLE = (
    "test_gpu_grouped_ffn.py::test_edges_of_tiles",
    "test_gpu_row_sums.py",
    "test_gpu_dispatch_combine.py::test_strides",
    "test_gpu_dispatch_combine.py::test_gate_gradients",
    "test_gpu_ragged_index.py::test_many_blocks",
    "test_gpu_ragged_index.py::test_the_smallest_margins_go",
    "test_gpu_threshold_gate.py::test_strides",
    "test_gpu_threshold_gate.py::test_sum_over_the_tokens",
    "test_gpu_router_losses.py::test_values_and_gradient",
)


@triton.jit
def _copy_kernel(x, out, FIRST: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, tl.load(x + FIRST + n))


def guarded(side: str, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests of this directory with guard pages on that side."""
    paths = [str(Path(__file__).parent / test) for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:faulthandler", *paths]
    return subprocess.run(command, env={**os.environ, "GUARD_PAGES": side}, capture_output=True, text=True)


def test_no_kernel_leaves_its_tensors() -> None:
    done = guarded("end", *SAMPLE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize(("side", "first"), [("end", 1), ("start", -1)])
def test_the_guard_sees_one_element(side: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAVE_TENSOR", "1")
    done = guarded(side, f"{Path(__file__).name}::test_this_leaves_its_tensor[{first}]")
    assert done.returncode == -signal.SIGSEGV, done.stdout[-2000:]


@pytest.mark.parametrize("first", [-1, 1])
def test_this_leaves_its_tensor(first: int) -> None:
    if "LEAVE_TENSOR" not in os.environ:
        pytest.skip("run by test_the_guard_sees_one_element")
    x, out = torch.arange(16.0) + 1, torch.empty(16)
    _copy_kernel[(1,)](x, out, FIRST=first, N=16)
