"""What `make gpu` runs on a machine with a GPU: its tests, then each kernel and the whole layer, in under 8 minutes.

    python -m benchmarks.gpu [--results DIR] [--seconds 460]

Each part has a share of the time. Benchmarks skip what no time is left for and say so; a part that overruns is ended.
Leaves tests-gpu.txt, kernels-gpu.{json,md,png} and layer-gpu.{json,md} in the results directory. The exit status is 0
if every part succeeded, 2 if there is nothing to run on.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .timing import beside, check_outputs, duration, interpreted

RESULTS = Path(__file__).resolve().parent / "results"
TESTS = ("tests/gpu", "tests/kernels/gpu")


@dataclass(frozen=True)
class Part:
    """A command, its share of the time, and where its output goes beside the screen."""

    name: str
    command: tuple[str, ...]
    share: float
    log: str | None = None


def missing() -> str | None:
    """Why nothing can be run here, or None."""
    if find_spec("torch") is None:
        return f"{sys.executable} has no torch: name an interpreter that has it, make gpu PYTHON=..."
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        build = f"built for {built}" if built else "a build for CPUs only"
        return f"no GPU: torch {torch.__version__} of {sys.executable} ({build}) sees none"
    if find_spec("triton") is None:
        return f"{sys.executable} has no Triton: pip install triton, or name another interpreter, make gpu PYTHON=..."
    if interpreted():
        return "TRITON_INTERPRET is set, under which no time is meant: unset it"
    if find_spec("dynmoe_tutel.kernels") is None:
        return "dynmoe_tutel.kernels is not importable: run `make gpu`, which lays out the package, or install it"
    return None


def parts(results: Path, seconds: float) -> list[Part]:
    """The commands, in order."""
    python = sys.executable
    workers = () if find_spec("xdist") is None else ("-n", str(min(12, os.cpu_count() or 1)))
    tests = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *TESTS)

    def benchmark(module: str, share: float) -> tuple[str, ...]:
        budget = f"{0.85 * share * seconds:g}"  # the rest is for starting up and for the last measurement
        out = str(results / f"{module}-gpu.json")
        return (python, "-m", f"benchmarks.{module}", "--device", "cuda", "--seconds", budget, "--out", out)

    return [
        Part("tests", tests, 0.42, "tests-gpu.txt"),
        Part("kernels", benchmark("kernels", 0.25), 0.25),
        Part("layer", benchmark("layer", 0.33), 0.33),
    ]


def run(part: Part, limit: float, results: Path) -> str:
    """Run a part to its end or its limit: "passed", "failed (status)" or "ended after N s"."""
    print(f"\n== {part.name}: {' '.join(part.command)}", flush=True)
    process = subprocess.Popen(
        part.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    overran = threading.Event()

    def end() -> None:
        overran.set()
        os.killpg(process.pid, signal.SIGKILL)  # with the workers of the tests

    timer = threading.Timer(limit, end)
    timer.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    timer.cancel()
    outcome = f"ended after {limit:.0f} s" if overran.is_set() else f"failed ({status})" if status else "passed"
    if part.log:
        (results / part.log).write_text("".join(lines))
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=duration(86400), default=460)
    args = parser.parse_args(argv)
    why = missing()
    if why is not None:
        print(f"make gpu: {why}", file=sys.stderr)
        return 2
    results = args.results.resolve()
    reports = [*beside(results / "kernels-gpu.json", ".md", ".png"), *beside(results / "layer-gpu.json", ".md")]
    check_outputs(parser, "--results", [results / "tests-gpu.txt", *reports])
    started = time.monotonic()
    outcomes = {}
    for part in parts(results, args.seconds):
        outcomes[part.name] = run(part, part.share * args.seconds, results)
    print(f"\n{time.monotonic() - started:.0f} s; results in {results}")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    return 0 if all(outcome == "passed" for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
