"""The experts' products of a layer for an H100 or H200 without one: their machine code, and a model of their time.

    python -m benchmarks.static [--shape vit-s ...]

Compiles for sm_90 what a forward and backward in bf16 launch, and counts instructions a warp: those of one step of a
product's loop, and those of the rest of a tile (addresses, activation, stores), the epilogue. The model takes the
largest of four times:

* tensor: 2,048 multiplications a cycle and multiprocessor
* issue: one instruction a cycle and scheduler, of which programs that share a multiprocessor use 0.8, one alone 0.65
* L2: operands and the epilogue's rows at 7.5 TB/s; this rate decides most, and nobody has measured it here
* in turn: where one program is alone on its multiprocessor, a tile's loop, then its epilogue and 1,500 cycles to fill

at 132 multiprocessors and 1.75 GHz, over the share of the waves that is full. The sums of pieces (`joins`) come on top.
It is a prediction for a GPU run to prove right or wrong, and no measurement.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from dynmoe_tutel.kernels.gpu import tiles

from .aot import ARCHITECTURES, _nvidia_usage
from .common.shapes import GPU_SHAPES, Shape
from .launches.operations import VARIANTS, run_all
from .launches.record import Launch, launch_of

ARCH = "sm_90"
PROCESSORS, CYCLES_A_US = 132, 1750
L2_BYTES_A_CYCLE = 7.5e12 / 1.75e9 / PROCESSORS  # of one multiprocessor, if all read
MEMORY_BYTES_A_US = 4.2e6
REGISTERS, SHARED_KB = 65536, 227
PRODUCTS = ("up_kernel", "linear_kernel", "activation_gradient_kernel", "weight_gradient_kernel")


@dataclass(frozen=True)
class Code:
    """Instructions a warp of a kernel with a product."""

    loop: int
    matrix: int  # of the loop, on tensor cores
    epilogue: int  # of a tile, outside the loop


def instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of each instruction."""
    return [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]


def count(code: list[tuple[int, str]]) -> Code:
    """Find the loops by their branches back: the inner ones that multiply, and the outermost, of the tiles."""
    loops = []
    for at, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            body = [t for a, t in code if int(target[1], 16) <= a <= at]
            loops.append((int(target[1], 16), at, len(body), sum("HGMMA" in t for t in body)))
    multiply = [loop for loop in loops if loop[3]]
    inner = [a for a in multiply if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in multiply)]
    outer = max((loop for loop in loops if loop not in inner), key=lambda loop: loop[2], default=None)
    whole = len(code) if outer is None or outer[2] < sum(loop[2] for loop in inner) else outer[2]
    return Code(sum(loop[2] for loop in inner), sum(loop[3] for loop in inner), whole - sum(loop[2] for loop in inner))


@dataclass(frozen=True)
class Product:
    """A launch of a product with what its machine code needs."""

    launch: Launch
    grid: tuple[int, ...]
    code: Code
    registers: int
    shared: int
    spilled: int

    @property
    def values(self) -> dict[str, Any]:
        """Compile-time constants by name."""
        names = [name for name, _ in self.launch.signature]
        return {names[i]: value for i, value in self.launch.constants} | dict(self.launch.options)

    @property
    def residents(self) -> int:
        """Programs that fit on a multiprocessor."""
        warps = self.values["num_warps"]
        by_registers = REGISTERS // (ceil(self.registers / 8) * 8 * 32 * warps)
        return max(1, min(by_registers, SHARED_KB * 1024 // (self.shared + 1024)))

    def times(self, shape: Shape) -> dict[str, float]:
        """Microseconds by the model, and the share of the waves that is full."""
        v, kernel = self.values, self.launch.kernel
        D, H, rows, E = shape.D, shape.H, shape.rows, shape.E
        M, N, step, warps = v["BLOCK_M"], v["BLOCK_N"], v["BLOCK_K"], v["num_warps"]
        operands = 2 if v.get("GATED") and kernel == "up_kernel" else 1
        if kernel == "weight_gradient_kernel":
            # before pieces, the second number of the grid was that of experts times splits
            count_, steps, full = self.grid[0] * self.grid[1], rows / self.grid[1] / step, self._full(self.grid)
            epilogues = count_ * (1 + E / self.grid[1] if "SPLIT" in v else 1)
            written = 2 * M * N
        else:
            inner, columns = (H, D) if kernel == "linear_kernel" else (D, H)
            count_ = ceil(rows / E / M) * E * ceil(columns / N)
            steps, full = inner / step * (2 if v.get("PAIR") else 1), self._full((count_,))
            epilogues = count_
            written = {"up_kernel": 4 * operands, "linear_kernel": 2}.get(kernel, 10 if v.get("GATED") else 6) * M * N
        alone = self.residents == 1 or (kernel != "weight_gradient_kernel" and self.grid[0] <= PROCESSORS)
        rate = 0.65 if alone else 0.8
        cycles = count_ / PROCESSORS / full
        tensor = steps * M * N * step * operands / 2048
        loop, rest = (n * warps / 4 / rate for n in (steps * self.code.loop, self.code.epilogue * epilogues / count_))
        l2 = (steps * (M + operands * N) * step * 2 + written * epilogues / count_) / L2_BYTES_A_CYCLE
        turns = max(tensor, loop) + rest + 1500 * epilogues / count_ if alone else 0.0
        every = {"tensor": tensor, "issue": loop + rest, "L2": l2, "in turn": turns}
        found = {name: n * cycles / CYCLES_A_US for name, n in every.items()}
        # of each border of pieces, about two parts in fp32 are written and read
        joins = 16 * (self.grid[1] - 1) * D * H / MEMORY_BYTES_A_US if v.get("SPLIT") else 0.0
        return found | {"joins": joins, "full": full, "predicted": max(found.values()) + joins}

    def _full(self, grid: tuple[int, ...]) -> float:
        """The share of the waves that is full; a persistent grid has tiles for programs.

        The programs of the last wave spread over the multiprocessors, and finish sooner where fewer share one.
        """
        total = grid[0] * (grid[1] if len(grid) > 1 else 1)
        waves, left = divmod(total, PROCESSORS * self.residents)
        return total / PROCESSORS / (waves * self.residents + ceil(left / PROCESSORS))


def products(shape: Shape) -> Iterator[Product]:
    """The launches of the experts' products, compiled."""
    found: list[tuple[Launch, tuple[int, ...]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((launch_of(self, args, dict(kwargs), False), grid))

    run = JITFunction.run
    JITFunction.run = record
    try:
        with tiles.assume(ARCH):
            run_all(shape, torch.bfloat16, VARIANTS["default"], ("top_any_ffn",))
    finally:
        JITFunction.run = run
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for launch, grid in found:
        if launch.kernel not in PRODUCTS:
            continue
        compiled = launch.compile(ARCHITECTURES[ARCH].target)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
        registers, spilled = _nvidia_usage(compiled.asm["cubin"])
        yield Product(launch, grid, count(instructions(sass)), registers, compiled.metadata.shared, spilled)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(GPU_SHAPES), default=["vit-s", "bert-l"])
    args = parser.parse_args(argv)
    print(f"sm_90, bf16, Triton {triton.__version__}; microseconds are predictions of the model\n")
    columns = "shape | kernel | tile, warps | an SM | registers | shared KB | spills | loop / HGMMA | epilogue"
    print(f"| {columns} | tensor | issue | L2 | in turn | joins | waves full | predicted us |")
    print("|" + "---|" * 16)
    for name in args.shape:
        for p in products(GPU_SHAPES[name]):
            v, t = p.values, p.times(GPU_SHAPES[name])
            tile = f"{v['BLOCK_M']}x{v['BLOCK_N']}x{v['BLOCK_K']}, {v['num_warps']}"
            times = " | ".join(f"{t[key]:.0f}" for key in ("tensor", "issue", "L2", "in turn", "joins"))
            print(
                f"| {name} | {p.launch.kernel.removesuffix('_kernel')} | {tile} | {p.residents} | {p.registers} "
                f"| {p.shared // 1024} | {p.spilled} | {p.code.loop} / {p.code.matrix} | {p.code.epilogue} "
                f"| {times} | {t['full']:.2f} | {t['predicted']:.0f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
