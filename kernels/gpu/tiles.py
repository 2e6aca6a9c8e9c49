"""Tile shapes of the Triton kernels, by architecture, dtype and shape; nothing is tuned at run time.

`python -m benchmarks.tune` measures candidates on the current GPU and writes `tuned/<architecture>.json`. An entry of
that table takes precedence over the rules below.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from .sizes import power_of_two

TABLES = Path(__file__).parents[1] / "tuned"
_assumed: ContextVar[str | None] = ContextVar("dynmoe_tutel_architecture", default=None)


@contextmanager
def assume(architecture: str) -> Iterator[None]:
    """Choose configurations for `architecture` ("sm_90", "gfx942") on any device, to compile ahead of time."""
    token = _assumed.set(architecture)
    try:
        yield
    finally:
        _assumed.reset(token)


@lru_cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """E.g. "sm_90" or "gfx942"; "interpreter" on a CPU, where Triton's interpreter runs the kernels."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return _architecture(device) if device.type == "cuda" else "interpreter"


_PROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(device: torch.device) -> int:
    """Multiprocessors of the device: the size of a persistent grid."""
    if device.type == "cuda":
        return _processors(device)
    return _PROCESSORS.get(architecture(device), 4)


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a grouped matrix product, BLOCK_M rows (or first dimension) by BLOCK_N by BLOCK_K, and launch options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8  # row tiles that share a run of columns
    programs: int = 1  # persistent programs per multiprocessor
    pieces: int = 1  # the epilogue processes a tile's columns in this many runs, to save registers
    max_registers: int | None = None  # per thread, so that `programs` fit; for NVIDIA's compiler


# the experts' matrix products; gated experts have their own
GEMM_KINDS = (
    "up",
    "up_gated",
    "linear",
    "linear_pair",  # with two pairs of operands, or with unused rows to clear
    "activation_gradient",
    "activation_gradient_gated",
    "weight_gradient",
)


def gemm_key(kind: str, dtype: torch.dtype, rows: int, K: int, N: int) -> str:
    """The key of a product in the tuned tables; `rows` is the mean number of rows per expert."""
    return f"{kind}/{str(dtype).removeprefix('torch.')}/rows{power_of_two(rows, 16, 4096)}/K{K}/N{N}"


@lru_cache
def tuned(architecture: str) -> dict[str, GemmConfig]:
    """The table that `benchmarks.tune` wrote for an architecture; empty if none is shipped."""
    path = TABLES / f"{architecture}.json"
    if not path.exists():
        return {}
    return {key: GemmConfig(**values) for key, values in json.loads(path.read_text())["configs"].items()}


def gemm(kind: str, device: torch.device, dtype: torch.dtype, rows: int, K: int, N: int) -> GemmConfig:
    """The tile for one of GEMM_KINDS: from the tuned table, else by rule.

    `rows` is the mean number of rows per expert, K the inner dimension, N the columns of the output. For
    "weight_gradient" the output is [K, N] and the rows are the inner dimension.
    """
    chip = architecture(device)
    table = tuned(chip)
    found = table.get(gemm_key(kind, dtype, rows, K, N)) if table else None
    return found or _by_rule(kind, chip, dtype, same_side(rows), K, N)


def same_side(rows: int) -> int:
    """A number on the same side of every power of two, so that few are remembered; rules compare rows with no other."""
    power = 1 << max(rows.bit_length() - 1, 0)
    return rows if rows <= power else power + power // 2


@lru_cache(maxsize=1024)
def _by_rule(kind: str, chip: str, dtype: torch.dtype, rows: int, K: int, N: int) -> GemmConfig:
    return default_gemm(kind, chip, dtype, rows, K, N)


# Half precision. Chosen by the register counts of `benchmarks.aot`: 255 a thread, 64 Ki a multiprocessor.
_SQUARE = GemmConfig(128, 128, 64, 8, 3)
_IN_PIECES = replace(_SQUARE, pieces=8)  # with an activation after the product
# On sm_90 a tile reads its operands from L2, (M + N) / (M N) bytes an operation: a large tile reads a quarter less.
# If the inner dimension is short, the activation takes as long as the product; two or three programs overlap the two.
_WIDE = replace(_SQUARE, block_n=256)
_TALL = replace(_SQUARE, block_m=256)
_UP_WIDE = replace(_WIDE, pieces=8)
_UP_BESIDE = replace(_IN_PIECES, programs=2, max_registers=128)
# Three fit on a multiprocessor with gelu, two with other activations: six are whole waves of either.
_GRADIENT_BESIDE = replace(_SQUARE, block_m=64, num_warps=4, programs=6, pieces=2)
_SHORT_UP = 768  # the longest inner dimension that counts as short; `benchmarks.static` has the model
_SHORT_GRADIENT = 512
_MANY_ROWS = 1024  # with so many rows an expert wastes at most an eighth on its last, half empty tile


def _half(kind: str, chip: str, rows: int, K: int, N: int) -> GemmConfig:
    """The largest tile of a product in half precision with aligned rows."""
    activates = kind.startswith(("up", "activation_gradient"))
    wide = N % 256 == 0 and rows >= 128
    if kind == "up_gated":  # two accumulators: too many registers for four warps
        return _IN_PIECES if chip == "sm_90" and rows > 64 else replace(_IN_PIECES, block_n=64)
    if chip != "sm_90":
        return _IN_PIECES if activates else _SQUARE
    if kind == "up":
        return _UP_BESIDE if K <= _SHORT_UP else _UP_WIDE if wide else _IN_PIECES
    if kind == "activation_gradient":  # with 128 x 256, Triton 3.7 spills 8 bytes
        return _GRADIENT_BESIDE if K <= _SHORT_GRADIENT else _IN_PIECES
    if activates:
        return replace(_GRADIENT_BESIDE, programs=2, pieces=8) if K <= _SHORT_GRADIENT else _IN_PIECES
    if kind == "weight_gradient":
        return _WIDE if wide else _TALL if K % 256 == 0 and rows >= 128 else _SQUARE
    return _WIDE if wide else _TALL if rows >= _MANY_ROWS else _SQUARE


_SINGLE = GemmConfig(64, 64, 32, 4, 2, programs=2, pieces=4)
_SINGLE_NARROW = replace(_SINGLE, block_n=32, pieces=2)  # for two accumulators, or a long epilogue
_UNALIGNED = GemmConfig(64, 32, 32, 4, 2, programs=2, pieces=2)
_UNALIGNED_NARROW = replace(_UNALIGNED, block_k=16)


def default_gemm(kind: str, chip: str, dtype: torch.dtype, rows: int, K: int, N: int) -> GemmConfig:
    """The rule for untuned shapes: the largest tile that compiles without spills and that the shape fills."""
    if chip == "interpreter":
        return GemmConfig(16, 32, 32, 4, 2, group_m=2, pieces=2)
    half = dtype in (torch.bfloat16, torch.float16)
    aligned = K % 8 == 0 and N % 8 == 0
    if not aligned:  # rows that are not multiples of 16 bytes pass through registers
        two = kind in ("up_gated", "linear_pair", "activation_gradient_gated")  # two products, or a long epilogue
        large = _UNALIGNED if half and not two else _UNALIGNED_NARROW
        if two and not half:
            large = replace(large, block_m=32)
    elif half:
        large = _half(kind, chip, rows, K, N)
    else:
        large = _SINGLE if kind in ("up", "linear", "weight_gradient") else _SINGLE_NARROW
    if chip != "sm_90" and large.max_registers is not None:
        large = replace(large, max_registers=None, programs=1)
    if chip.startswith("gfx"):  # 64 KB of shared memory, wavefronts of 64
        large = replace(large, block_k=min(large.block_k, 32 if half else 16), num_stages=2, num_warps=4)
    elif chip.startswith("sm_8") and half and aligned:
        large = replace(large, block_k=32, num_stages=4)
    elif chip == "sm_100" and not half:
        large = replace(large, block_n=32, pieces=min(large.pieces, 2))
    elif chip != "sm_90" and half and aligned:
        warps = 8 if kind == "activation_gradient_gated" else 4  # there four would spill
        large = replace(large, block_m=64, block_n=64, num_warps=warps, pieces=4)
    # wgmma multiplies 64 rows. With fewer, loading the weights takes the time; and if most experts have no rows, the
    # others have many more than the mean
    least = 64 if chip == "sm_90" and half and aligned and kind != "weight_gradient" else 16
    sizes = (K, N, rows) if kind == "weight_gradient" else (rows, N, K)
    block_m, block_n, block_k = (
        power_of_two(size, low, most)
        for size, low, most in zip(sizes, (least, 16, 16), (large.block_m, large.block_n, large.block_k), strict=True)
    )
    fewer = 2 * block_m <= large.block_m and large.num_warps > 4
    return replace(
        large,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=large.num_warps // 2 if fewer else large.num_warps,
        programs=2 if fewer else large.programs,
        pieces=min(large.pieces, block_n // 16),
        max_registers=None if fewer else large.max_registers,
    )
