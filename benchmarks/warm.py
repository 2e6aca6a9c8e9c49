"""Compile the launches of the kernel and layer benchmarks on all processors, into Triton's disk cache.

    python -m benchmarks.warm [--arch sm_90] [--shape vit-s ...] [--jobs N] [--seconds N]

A benchmark compiles kernels one by one, a second or two each, which would use up the time for measuring. Here each
process runs the benchmarks on tensors without values (`launches.rehearsal`) and compiles its share of what they launch,
without launching, so that later requests hit the cache. So there is no list of kernels to keep, and no GPU is needed.
A kernel that does not compile is named and left to the benchmark; the exit status is then 1. If only tools could not
start, at every try, the status is 101.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dynmoe_tutel.kernels.gpu import tiles

from .common.patience import NOT_STARTED, NotStartedError, in_processes, patiently
from .common.results import reason
from .common.shapes import GPU_SHAPES, Shape
from .common.timing import duration, whole
from .launches.driver import StubDriver
from .launches.record import Launch, launch_of
from .launches.rehearsal import run_benchmarks


@dataclass
class Compiled:
    """What a share of the launches came to: its launches, those that compiled, and by reason those that did not."""

    planned: set[Launch] = field(default_factory=set)
    done: set[Launch] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # a tool could not start


@contextmanager
def compiling(share: int, shares: int, end: float, launchers: bool) -> Iterator[Compiled]:
    """Compile every launch of this share when it comes, until `end` of the monotonic clock, in place of launching.

    `launchers`: also the C code that some versions of Triton have for each signature, which needs the GPU's driver.
    """
    found = Compiled()
    run: Callable[..., Any] = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = launch_of(self, args, dict(kwargs), False)
        if launch in found.planned or crc32(repr(launch).encode()) % shares != share:
            return
        found.planned.add(launch)
        if time.monotonic() > end:
            return
        try:
            kernel = patiently(lambda: run(self, *args, grid=grid, warmup=True, **kwargs))
            if launchers:
                patiently(lambda: make_launcher(kernel))
            found.done.add(launch)
        except NotStartedError as error:
            found.refused.append(f"{launch.kernel} ({launch.configuration}): {error}")
        except Exception as error:  # a compiler may raise anything
            found.wrong.append(f"{launch.kernel} ({launch.configuration}): {reason(error)}")

    JITFunction.run = compile_instead
    try:
        yield found
    finally:
        JITFunction.run = run


def make_launcher(kernel: Any) -> None:
    """Compile a kernel's launcher, where Triton has one in C for each signature (3.6)."""
    from triton.backends.nvidia import driver as nvidia

    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def compile_share(
    architecture: str, shapes: Sequence[Shape], share: int, shares: int, end: float, launchers: bool
) -> Compiled:
    """Compile one of `shares` parts of the launches; a shape whose benchmarks raise is one that is wrong."""
    driver.set_active(StubDriver(architecture))
    with compiling(share, shares, end, launchers) as found:
        for shape in shapes:
            try:
                run_benchmarks(architecture, shape)
            except Exception as error:
                found.wrong.append(f"the calls of {shape}: {reason(error)}")
    return found


def compile_all(shapes: Sequence[Shape], jobs: int, seconds: float, architecture: str | None = None) -> int:
    """Compile the launches of the shapes and say how it went; return the exit status. Default: for this GPU."""
    started = time.monotonic()
    launchers = architecture is None
    architecture = architecture or tiles.architecture(torch.device("cuda"))
    if not architecture.startswith("sm_"):
        print(f"nothing is compiled ahead for {architecture}")
        return 0
    end = started + seconds  # the processes share this clock
    shares = [(architecture, shapes, i, jobs, end, launchers) for i in range(jobs)]
    results = list(in_processes(compile_share, shares, jobs))
    found = [result for result in results if not isinstance(result, NotStartedError)]
    refused = [f"a share of the kernels: {result}" for result in results if isinstance(result, NotStartedError)]
    refused += [why for result in found for why in result.refused]
    wrong = list(dict.fromkeys(why for result in found for why in result.wrong))
    for why in wrong:
        print(f"FAILED {why}")
    for why in refused:
        print(f"NOT STARTED {why}")
    planned, done = sum(len(r.planned) for r in found), sum(len(r.done) for r in found)
    print(f"{done} of {planned} kernels compiled in {time.monotonic() - started:.0f} s", flush=True)
    return 1 if wrong else NOT_STARTED if refused else 0


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
    return compile_all([GPU_SHAPES[name] for name in args.shape], args.jobs, args.seconds, args.arch)


if __name__ == "__main__":
    sys.exit(main())
