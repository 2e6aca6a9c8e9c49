"""Runs Triton kernels on a GPU or, without one, in Triton's interpreter on the CPU, patched for bf16."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from guard_pages import GuardPages
from helpers import HAS_GPU

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def device() -> str:
    """The device for the kernels of these tests."""
    return "cuda" if HAS_GPU else "cpu"


def _single(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


@pytest.fixture(autouse=True)
def _guard_pages() -> Iterator[None]:
    """With GUARD_PAGES=end (or start) in the environment, out-of-bounds accesses end the process."""
    side = os.environ.get("GUARD_PAGES")
    if side is None:
        yield
        return
    with GuardPages(side):
        yield


@pytest.fixture(scope="session", autouse=True)
def _interpreter_with_bfloat16() -> Iterator[None]:
    """Patches the interpreter, which multiplies bf16 as 16-bit integers and truncates where a GPU rounds."""
    if HAS_GPU:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def single(handle: Any) -> Any:
        return TensorHandle(_single(handle.data), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, single(a), single(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        src, kind = single(src), dst_type.scalar
        if kind == tl.bfloat16:
            return TensorHandle(_bfloat16(src.data), kind)
        return cast(self, src, dst_type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        yield
