"""Compile every Triton kernel in every shipped configuration, without the GPUs, and judge the code.

    python -m benchmarks.aot [--all] [--arch sm_90 ...] [--shape vit-s ...] [--jobs N] [--out FILE.json]

The operations' host functions run on meta tensors, which records what they would launch (`launches.record`); each form
is compiled once per architecture. Without --all it compiles a representative set, for `make test`; with --all, every
shape, dtype, precision, activation and variant, and every entry of `kernels/tuned/<arch>.json`.

The exit status is the number of wrong kernels, at most 100. A kernel is wrong if it spills registers, needs more shared
memory than the architecture has, or has a half-precision matrix product without matrix instructions. In the expert
networks it is also wrong if it stores aligned half-precision rows one by one, or lacks `wgmma` on sm_90. On sm_90 and
sm_100 it is wrong if a matrix product may read copies in shared memory before a fence has made them visible to it,
which depends on the version of Triton. A kernel whose compiler never started is not judged; if there are such kernels
and no wrong one, the status is 101. Triton keeps compiled kernels on disk (TRITON_CACHE_DIR), so a second run is fast.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from dynmoe_tutel.kernels.gpu import tiles

from .common.patience import NOT_STARTED, PAUSES, NotStartedError, in_processes, patiently
from .common.ptx import unfenced_products
from .common.shapes import GPU_SHAPES, Shape
from .launches.operations import FILES, VARIANTS, Variant, run_all
from .launches.record import Launch, recording

KB = 1024
MATRIX_MODULES = ("gemm_kernels", "weight_gradient")  # of the expert networks: must use wgmma on sm_90

SUM_STORES = 1  # a column of sums has fewer elements than a program has threads


@dataclass(frozen=True)
class Architecture:
    """What the judgement needs to know of an architecture."""

    target: GPUTarget
    shared_memory: int  # bytes per program
    matrix: dict[str, str]  # name -> pattern of its matrix instructions in the assembly


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163 * KB, {"mma": r"\bmma\.sync"}),
    "sm_89": Architecture(GPUTarget("cuda", 89, 32), 99 * KB, {"mma": r"\bmma\.sync"}),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 * KB, {"wgmma": r"\bwgmma\.mma_async", "mma": r"\bmma\.sync"}),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227 * KB, {"tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 * KB, {"mfma": r"\bv_mfma_"}),
}
REPRESENTATIVE = ("sm_80", "sm_90", "sm_100", "gfx942")  # compiled without --all
# rows that are not multiples of 16 bytes, and every size 1: Triton makes integers that are 1 constants
ODD = (Shape(1000, 97, 47, 7, 2), Shape(1000, 97, 47, 7, 2, gated=True), Shape(1, 1, 1, 1, 1))
# the gate that uses the most shared memory: routing vectors in three parts for many experts
LARGE_GATE = (Shape(4096, 768, 64, 256, 2), torch.bfloat16, VARIANTS["normalized"])


@dataclass(frozen=True)
class Dot:
    """One `tl.dot` of a kernel, [M, K] by [K, N], with its type."""

    M: int
    N: int
    K: int
    dtype: str


@dataclass(frozen=True)
class Report:
    """Findings in a compiled kernel."""

    arch: str
    module: str
    kernel: str
    types: str
    configuration: str
    warps: int = 0
    registers: int = 0
    shared_memory: int = 0
    spilled: int = 0  # bytes of stack and local memory a thread (NVIDIA), registers and bytes of scratch (AMD)
    dots: tuple[Dot, ...] = ()
    matrix: dict[str, int] = field(default_factory=dict)  # instructions by name
    single_stores: int = 0  # 2-byte stores in the code for rows that are multiples of 16 elements (NVIDIA)
    unfenced: int = 0  # products that may read copies in shared memory without a fence (NVIDIA)
    error: str = ""  # why it did not compile
    not_started: str = ""  # why a tool could not start; then the kernel is not judged


def judge(report: Report) -> list[str]:
    """The faults of a compiled kernel."""
    if report.not_started:
        return []
    if report.error:
        return [f"does not compile: {report.error}"]
    found = []
    limit = ARCHITECTURES[report.arch].shared_memory
    if report.spilled:
        found.append(f"spills ({report.spilled})")
    if report.shared_memory > limit:
        found.append(f"needs {report.shared_memory} bytes of shared memory, {report.arch} has {limit}")
    half = [dot for dot in report.dots if dot.dtype in ("f16", "bf16")]
    if half and not any(report.matrix.values()):
        found.append("has a product in half precision and no matrix instruction")
    # a warpgroup multiplies at least 64 rows: smaller tiles are for experts with few rows
    large = any(dot.M >= 64 for dot in half) and report.warps >= 4
    if report.arch == "sm_90" and large and report.module in MATRIX_MODULES and not report.matrix.get("wgmma"):
        found.append("is a matrix kernel without wgmma")
    if half and report.module in MATRIX_MODULES and report.single_stores > SUM_STORES:
        found.append(f"stores aligned rows element by element ({report.single_stores} stores)")
    if report.unfenced:
        found.append(f"has no fence between copies to shared memory and {report.unfenced} matrix instructions")
    return found


def _dots(ttir: str) -> tuple[Dot, ...]:
    pattern = r"tt\.dot .*?: tensor<(\d+)x(\d+)x(\w+).*?> \* tensor<\d+x(\d+)x"
    return tuple(Dot(int(m), int(n), int(k), dtype) for m, k, dtype, n in re.findall(pattern, ttir))


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack and local memory per thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers per thread, and the number spilled plus bytes of scratch memory."""
    usage = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    registers = usage["vgpr_count"] + usage.get("agpr_count", 0)
    return registers, usage["vgpr_spill_count"] + usage["private_segment_fixed_size"]


def _about(arch: str, launch: Launch) -> tuple[str, str, str, str, str]:
    return arch, launch.module.rsplit(".", 1)[-1], launch.kernel, launch.types(), launch.configuration


def compile_one(arch: str, launch: Launch, pauses: Sequence[float] = PAUSES) -> Report:
    """Compile a launch for an architecture and read its code; pause and retry if the machine refuses a tool."""
    try:
        return _compile(arch, launch, pauses)
    except NotStartedError as error:
        return Report(*_about(arch, launch), not_started=str(error))


def _compile(arch: str, launch: Launch, pauses: Sequence[float]) -> Report:
    about, architecture = _about(arch, launch), ARCHITECTURES[arch]
    try:
        compiled: Any = patiently(lambda: launch.compile(architecture.target), pauses)
    except NotStartedError:
        raise
    except Exception as error:  # any compiler error is a finding; the other kernels still compile
        return Report(*about, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
    hip = architecture.target.backend == "hip"
    assembly = compiled.asm["amdgcn" if hip else "ptx"]
    usage = _amd_usage(assembly) if hip else patiently(lambda: _nvidia_usage(compiled.asm["cubin"]), pauses)
    registers, spilled = usage
    aligned = "N" in {launch.signature[i][0] for i, _ in launch.attributes}
    return Report(
        *about,
        compiled.metadata.num_warps,
        registers,
        compiled.metadata.shared,
        spilled,
        _dots(compiled.asm["ttir"]),
        {name: len(re.findall(pattern, assembly)) for name, pattern in architecture.matrix.items()},
        len(re.findall(r"\bst\.global\.[bu]16\b", assembly)) if aligned else 0,
        0 if hip else unfenced_products(assembly),
    )


Case = tuple[Shape, torch.dtype, Variant, bool]  # with tf32


def representative(shapes: Sequence[Shape]) -> Iterator[Case]:
    """The cases of `make test`: half precision, both kinds of experts, and a gate with weights."""
    for shape in shapes:
        yield shape, torch.bfloat16, VARIANTS["default"], False
    yield shapes[0], torch.bfloat16, VARIANTS["fixed k, no bias"], False


def every_case(shapes: Sequence[Shape]) -> Iterator[Case]:
    """All dtypes, precisions and variants of every shape, and the odd sizes."""
    for shape in shapes:
        for dtype, tf32 in (
            (torch.bfloat16, False),
            (torch.float16, False),
            (torch.float32, False),
            (torch.float32, True),
        ):
            yield shape, dtype, VARIANTS["default"], tf32
        for variant in VARIANTS.values():
            yield shape, torch.bfloat16, variant, False
    for shape in ODD:
        for dtype in (torch.bfloat16, torch.float32):
            yield shape, dtype, VARIANTS["default"], False


def tuned_shapes(arch: str) -> Iterator[tuple[Shape, torch.dtype]]:
    """One shape for every entry of the tuned table, whose operations use that entry."""
    for key in tiles.tuned(arch):
        kind, dtype, *sizes = key.split("/")
        rows, K, N = (int(re.sub(r"\D", "", size)) for size in sizes)
        D, H = (N, K) if kind in ("linear", "activation_gradient", "activation_gradient_gated") else (K, N)
        if kind.startswith("activation_gradient"):
            D, H = K, N
        yield Shape(rows * 4, D, H, 4, 1.0, kind.endswith("gated")), getattr(torch, dtype)


def record(arch: str, cases: Sequence[Case], large_gate: bool = False) -> list[Launch]:
    """The distinct launches of the operations for an architecture."""
    hip = ARCHITECTURES[arch].target.backend == "hip"
    before = torch.get_float32_matmul_precision()
    with tiles.assume(arch), recording(hip) as launches:
        try:
            for shape, dtype, variant, tf32 in cases:
                torch.set_float32_matmul_precision("high" if tf32 else "highest")
                run_all(shape, dtype, variant, FILES)
            if large_gate:
                torch.set_float32_matmul_precision("highest")
                run_all(*LARGE_GATE, ("threshold_gate", "score_gradient"))
        finally:
            torch.set_float32_matmul_precision(before)
    return launches


def compile_all(tasks: Sequence[tuple[str, Launch]], jobs: int) -> Iterator[Report]:
    """Reports in the order of the tasks, from `jobs` processes."""
    if jobs <= 1 or len(tasks) < 4:
        pauses = PAUSES
        for task in tasks:
            report = compile_one(*task, pauses)
            pauses = () if report.not_started else PAUSES  # after a refusal, try only once until a tool starts again
            yield report
        return
    for task, found in zip(tasks, in_processes(compile_one, tasks, jobs), strict=True):
        yield found if isinstance(found, Report) else Report(*_about(*task), not_started=str(found))


def table(reports: Sequence[Report]) -> str:
    """A Markdown table for each architecture."""
    lines = []
    for arch in dict.fromkeys(report.arch for report in reports):
        own = [report for report in reports if report.arch == arch]
        lines += [
            "",
            f"### {arch}, Triton {triton.__version__}",
            "",
            "| kernel | types | configuration | registers | shared KB | spills | matrix instructions | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in own:
            matrix = ", ".join(f"{n} {name}" for name, n in r.matrix.items() if n)
            lines.append(
                f"| {r.kernel} | {r.types} | {r.configuration} | {r.registers} | {r.shared_memory / KB:.1f} "
                f"| {r.spilled} | {matrix or '-'} | {'; '.join(judge(r)) or ('not judged' if r.not_started else '')} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the number of wrong kernels, at most 100, or 101 if some could not be judged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every shape, dtype, activation and variant")
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), help="default: all")
    parser.add_argument(
        "--shape", nargs="+", choices=list(GPU_SHAPES), help="default: vit-s and llm-2k, with --all all"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--out", type=Path, help="JSON file for the reports")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    names = args.shape or (list(GPU_SHAPES) if args.all else ["vit-s", "llm-2k"])
    shapes = [GPU_SHAPES[name] for name in names]
    tasks: list[tuple[str, Launch]] = []
    for arch in args.arch or ARCHITECTURES:
        cases = list(every_case(shapes) if args.all else representative(shapes))
        if not (args.all or args.arch or arch in REPRESENTATIVE):
            cases = []  # only the large gate
        cases += [(shape, dtype, VARIANTS["default"], False) for shape, dtype in tuned_shapes(arch)]
        large = args.all or arch not in REPRESENTATIVE
        tasks += [(arch, launch) for launch in record(arch, cases, large)]
    reports = list(compile_all(tasks, args.jobs))
    print(table(reports))
    wrong = [(report, judge(report)) for report in reports if judge(report)]
    unknown = [report for report in reports if report.not_started]
    not_judged = f", {len(unknown)} not judged: a tool could not be started" if unknown else ""
    print(f"\n{len(reports)} kernels in {time.perf_counter() - started:.0f} s, {len(wrong)} wrong{not_judged}")
    for report, problems in wrong:
        print(f"WRONG {report.arch} {report.kernel} ({report.configuration}): {'; '.join(problems)}")
    for report in unknown:
        print(f"NOT STARTED {report.arch} {report.kernel} ({report.configuration}): {report.not_started}")
    if args.out:
        args.out.write_text(json.dumps([asdict(report) | {"problems": judge(report)} for report in reports], indent=1))
    return min(len(wrong), 100) or (NOT_STARTED if unknown else 0)


if __name__ == "__main__":
    sys.exit(main())
