"""All that a first run on a GPU should answer, in under 8 minutes; `make gpu`, or without make:

    python3 -m benchmarks.gpu [--results DIR] [--seconds 460]

from the checkout's root, with any interpreter that has torch and Triton; nothing need be installed. Parts, in order:

* smoke: a step at two shapes against the torch engine, and 50 bitwise equal ones;
* compilation of the benchmarks' kernels on all processors;
* layer, kernels: the measurements, the shapes with targets first;
* tests.

Each part gets a share of the time that is left, so unused time goes to the next ones. Benchmarks skip what they have no
time for and say so. A part that overruns is ended; its results so far are on disk. If a part fails, the next one still
runs. A benchmark that lost the device (as by an illegal access) goes on in a fresh process after the step at fault.

Ten lines say what is known (`benchmarks.summary`), after every part and at the end. Writes smoke-gpu.json,
layer-gpu.{json,md}, kernels-gpu.{json,md,png}, tests-gpu.txt and targets-gpu.md to the results directory. The exit
status is 0 if every part succeeded, 1 if one did not, 2 if there is no GPU to run on.
"""

from __future__ import annotations

import argparse
import contextlib
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

from . import summary, targets
from .common.patience import NOT_STARTED, NotStartedError, patiently
from .common.timing import beside, check_outputs, duration, interpreted

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TESTS = ("tests/gpu", "tests/kernels/gpu")
GRACE = 15.0  # seconds that tests get for their summary between the interrupt and the kill
UNKILLABLE = 10.0  # seconds after which a killed process is left alone: a lost device may hold it in the kernel
FAILURES = 60  # lines on failed tests on the screen, of which often only the end is kept
DEVICE_LOST = 3  # exit status, as in `common.results`, which imports torch
RESTARTS = 3
LEAST_SECONDS = 15.0  # with less, a benchmark is not started again


@dataclass(frozen=True)
class Part:
    """A command, and its share of the time."""

    name: str
    command: tuple[str, ...]
    share: float
    log: str | None = None  # file for the output; the screen gets headings and the names of tests that fail
    budget: bool = False  # takes --seconds, after which it begins no step
    resumes: bool = False  # takes --resume
    grace: float = 0.0  # seconds between an interrupt and the end


def missing() -> str | None:
    """The reason why nothing can run here, or None."""
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
    return lay_out(ROOT)


def lay_out(root: Path) -> str | None:
    """Make the link to the kernels in a copy of the checkout that lost it; the reason why that failed, or None."""
    kernels = root / "dynmoe_tutel" / "kernels"
    if (kernels / "__init__.py").exists():
        return None
    try:
        kernels.unlink(missing_ok=True)  # git without symbolic links has a file there
        kernels.symlink_to(Path("..", "kernels"))
    except OSError as error:
        return f"{kernels} is no link to {root / 'kernels'} and cannot be made one ({error.strerror})"
    return None


def parts(results: Path) -> list[Part]:
    """The commands, in order."""
    python = sys.executable
    options = ["-v", "-p", "no:cacheprovider", "-p", "benchmarks.common.lost_device"]
    if find_spec("xdist") is not None:
        options += ["-n", str(min(12, os.cpu_count() or 1))]
    if find_spec("pytest_timeout") is not None:  # a kernel that hangs costs one test
        options += ["--timeout", "90", "--timeout-method", "thread"]

    def benchmark(module: str) -> tuple[str, ...]:
        out = str(results / f"{module}-gpu.json")
        return (python, "-m", f"benchmarks.{module}", "--device", "cuda", "--out", out)

    return [
        Part("smoke", benchmark("smoke"), 0.16, budget=True),
        Part("compilation", (python, "-m", "benchmarks.warm"), 0.11, budget=True),
        Part("layer", benchmark("layer"), 0.27, budget=True, resumes=True),
        Part("kernels", benchmark("kernels"), 0.19, budget=True, resumes=True),
        Part("tests", (python, "-m", "pytest", *options, *TESTS), 0.27, summary.TESTS, grace=GRACE),
    ]


def _command(part: Part, limit: float, again: bool) -> list[str]:
    """The command of a part with `limit` seconds."""
    budget = ["--seconds", f"{0.85 * limit:g}"] if part.budget else []  # leaves the rest to the last measurement
    return [*part.command, *budget, *(["--resume"] if again else [])]


def _end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to the process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a command in its own session, with its output in one pipe."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a shell's background job; children inherit it
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
        )
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(part: Part, limit: float, results: Path, again: bool = False) -> tuple[str, int]:
    """Run a part to its end or its limit: "passed", "failed (status)", "ended after N s" or "could not be started";
    and the exit status."""
    command = _command(part, limit, again)
    print(f"\n== {part.name}: {' '.join(command)}", flush=True)
    try:
        process = patiently(lambda: _start(command))
    except NotStartedError as error:
        return f"could not be started: {error}", NOT_STARTED
    overran = threading.Event()
    killed: list[float] = []

    def interrupt() -> None:
        overran.set()
        process.send_signal(signal.SIGINT)  # pytest then ends its workers and reports the failures

    def kill() -> None:
        overran.set()
        _end(process, signal.SIGKILL)
        killed.append(time.monotonic())

    def clear() -> None:
        process.wait()
        _end(process, signal.SIGKILL)  # its children may hold the pipe open

    threading.Thread(target=clear, daemon=True).start()
    timers = [threading.Timer(limit, kill)]
    if part.grace:
        timers.append(threading.Timer(max(limit - part.grace, limit / 4), interrupt))
    for timer in timers:
        timer.start()
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(process, part.log is not None, lines), daemon=True)
    reader.start()
    try:
        while reader.is_alive() and not (killed and time.monotonic() - killed[0] > UNKILLABLE):
            reader.join(0.2)
        status = -signal.SIGKILL if reader.is_alive() else process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        _end(process, signal.SIGKILL)  # if this process is interrupted
        if part.log:
            (results / part.log).write_text("".join(lines))
    if overran.is_set():
        return f"ended after {limit:.0f} s", status
    if status == NOT_STARTED:
        return "failed: a tool could not be started", status
    return (f"failed ({status})" if status else "passed"), status


def _read(process: subprocess.Popen[str], tests: bool, lines: list[str]) -> None:
    """Keep the output's lines and print them; of tests, only pytest's headings and so many failures."""
    assert process.stdout is not None
    failures = 0
    for line in process.stdout:
        lines.append(line)
        failed = "FAILED" in line or "ERROR" in line
        failures += failed
        if not tests or line.startswith("=") or (failed and failures <= FAILURES):
            print(line[:300].rstrip("\n"), flush=True)


def run_all(results: Path, seconds: float) -> dict[str, str]:
    """Run every part; return the outcomes by name."""
    end, left, outcomes = time.monotonic() + seconds, parts(results), {}
    while left:
        part = left[0]
        limit = max(0.1, end - time.monotonic()) * part.share / sum(other.share for other in left)
        last = time.monotonic() + limit
        outcome, status = run(part, limit, results)
        for _ in range(RESTARTS):
            limit = last - time.monotonic()
            crashed = outcome.startswith("failed") and (status == DEVICE_LOST or status < 0)
            if not (part.resumes and crashed and limit > LEAST_SECONDS):
                break
            again, status = run(part, limit, results, again=True)
            outcome = f"{outcome}, then {again}" if again != "passed" else f"{outcome}, the rest passed"
            if not again.startswith("failed"):
                break
        outcomes[part.name] = outcome
        left = left[1:]
        print("\n".join(["", *summary.lines(results, outcomes)]), flush=True)
    return outcomes


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
    smoke, layer, kernels = (results / name for name in summary.FILES.values())
    reports = [smoke, *beside(layer, ".md"), *beside(kernels, ".md", ".png")]
    reports += [results / summary.TESTS, results / "targets-gpu.md"]
    check_outputs(parser, "--results", reports)
    for path in reports:  # the table must not read another run's results
        path.unlink(missing_ok=True)
    started = time.monotonic()
    outcomes = run_all(results, args.seconds)
    text = targets.report(kernels, layer)
    known = summary.lines(results, outcomes)
    (results / "targets-gpu.md").write_text("\n".join([text, "", *(f"* {line}" for line in known)]) + "\n")
    print(f"\n{text}\n\n{time.monotonic() - started:.0f} s; results in {results}")
    print("\n".join(known))
    return 0 if all(outcome == "passed" for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
