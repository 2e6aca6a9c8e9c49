"""Compile the launches of the kernel and layer benchmarks on all processors, into Triton's disk cache.

    python -m benchmarks.warm [--arch sm_90] [--shape vit-s ...] [--jobs N] [--seconds N]

A benchmark compiles kernels one by one, a second or two each, which would use up the time for measuring. Here each
process has Triton compile its share of the launches that `benchmarks.launches` lists, for meta tensors and without
launching, so that later requests hit the cache. It needs no GPU. A kernel that does not compile is named and left to
the benchmark; the exit status is then 1. If only tools could not start, at every try, the status is 101.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dynmoe_tutel.kernels.gpu import tiles

from .common.patience import NOT_STARTED, NotStartedError, in_processes, patiently
from .common.results import reason
from .common.shapes import GPU_SHAPES, Shape
from .common.timing import duration, whole
from .launches.operations import VARIANTS, run_all
from .launches.record import Launch, launch_of, recording


class _Driver:
    """The part of a Triton driver that compiling needs: a device of the architecture."""

    def __init__(self, architecture: str) -> None:
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def lengths(shape: Shape) -> Iterator[Shape]:
    """The shape with each measured number of rows: exact (any number), bounded and full."""
    for rows in (shape.rows + 1, ceil(1.25 * shape.k * shape.T), shape.E * shape.T):
        yield replace(shape, k=rows / shape.T)


def call_all(architecture: str, shapes: Sequence[Shape]) -> None:
    """Call every operation on meta tensors, as the benchmarks do in bf16."""
    with tiles.assume(architecture):
        for shape in shapes:
            for length in lengths(shape):
                run_all(length, torch.bfloat16, VARIANTS["default"])


@contextmanager
def compiling(launches: Sequence[Launch], end: float) -> Iterator[tuple[list[Launch], list[str], list[str]]]:
    """Compile these launches when they come, until `end` of the monotonic clock.

    Yields three growing lists: the compiled launches, the reasons of failures, and those whose tool could not start.
    """
    left = set(launches)
    done: list[Launch] = []
    wrong: list[str] = []
    refused: list[str] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = launch_of(self, args, dict(kwargs), False)
        if launch not in left or time.monotonic() > end:
            return
        left.remove(launch)
        try:
            patiently(lambda: run(self, *args, grid=grid, warmup=True, **kwargs))
            done.append(launch)
        except NotStartedError as error:
            refused.append(f"{launch.kernel} ({launch.configuration}): {error}")
        except Exception as error:  # a compiler may raise anything
            wrong.append(f"{launch.kernel} ({launch.configuration}): {reason(error)}")

    JITFunction.run = compile_instead
    try:
        yield done, wrong, refused
    finally:
        JITFunction.run = run


def compile_share(
    architecture: str, shapes: Sequence[Shape], share: int, shares: int, end: float
) -> tuple[int, int, list[str], list[str]]:
    """Compile every `shares`-th launch from `share` on. Returns how many were to compile, how many did, the reasons of
    failures, and the launches whose tool could not start."""
    driver.set_active(_Driver(architecture))
    with recording() as launches:
        call_all(architecture, shapes)
    own = launches[share::shares]
    with compiling(own, end) as (done, wrong, refused):
        call_all(architecture, shapes)
    return len(own), len(done), wrong, refused


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=["sm_80", "sm_89", "sm_90", "sm_100"], help="default: the GPU's")
    parser.add_argument("--shape", nargs="+", choices=list(GPU_SHAPES), default=list(GPU_SHAPES))
    parser.add_argument("--jobs", type=whole(1), default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seconds", type=duration(), default=float("inf"), help="begin no compilation after this time")
    args = parser.parse_args(argv)
    if args.arch is None and not torch.cuda.is_available():
        parser.error("argument --arch: needed where torch sees no GPU")
    started = time.monotonic()
    architecture = args.arch or tiles.architecture(torch.device("cuda"))
    if not architecture.startswith("sm_"):
        print(f"nothing is compiled ahead for {architecture}")
        return 0
    shapes = [GPU_SHAPES[name] for name in args.shape]
    end = started + args.seconds  # the processes share this clock
    shares = [(architecture, shapes, i, args.jobs, end) for i in range(args.jobs)]
    results = list(in_processes(compile_share, shares, args.jobs))
    found = [result for result in results if not isinstance(result, NotStartedError)]
    refused = [f"a share of the kernels: {result}" for result in results if isinstance(result, NotStartedError)]
    wrong = [why for _, _, reasons, _ in found for why in reasons]
    refused += [why for *_, reasons in found for why in reasons]
    for why in wrong:
        print(f"FAILED {why}")
    for why in refused:
        print(f"NOT STARTED {why}")
    planned, compiled = sum(n for n, *_ in found), sum(n for _, n, *_ in found)
    print(f"{compiled} of {planned} kernels compiled in {time.monotonic() - started:.0f} s")
    return 1 if wrong else NOT_STARTED if refused else 0


if __name__ == "__main__":
    sys.exit(main())
