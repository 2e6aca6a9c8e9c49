"""Timing on a device, the two rates that bound it, the description of the machine, and checks of options.

Imports torch only inside functions: `benchmarks.gpu` checks its options in interpreters without torch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Call = Callable[[], Any]
FILL_SECONDS = 2e-3  # of work between two events, so that they and a launch cost little
COPY_BYTES, PRODUCT = 2**29, 8192  # sizes of the copy and the square product that measure a GPU's rates


def environment(device: torch.device) -> dict[str, Any]:
    """Names and versions, and on a GPU its name, driver and clocks."""
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "nvidia_smi": _nvidia_smi()}
    return found


def _nvidia_smi() -> str | None:
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{query}: {done.stdout.strip()}" if done.returncode == 0 else None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": median, "quartile_1": low, "quartile_3": high}


def in_turn(calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call on a CPU, by name, in `repeats` rounds of all calls; two rounds before do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios: a machine's drift cancels."""
    return spread([a / b for a, b in zip(one, other, strict=True)])


def seconds(calls: Sequence[Call], device: torch.device, repeats: int = 20, graph: bool = True) -> list[float]:
    """Seconds of one call, `repeats` times; `calls` do the same work on inputs in different memory, in turn.

    On a GPU, with `graph`, one CUDA graph holds all of them (short ones several times), so that the host plays no part,
    and events time a replay. On a CPU the clock times each call.
    """
    if device.type != "cuda":
        times: list[float] = []
        for i in range(repeats):
            start = time.perf_counter()
            calls[i % len(calls)]()
            times.append(time.perf_counter() - start)
        return times
    import torch

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compile and allocate before the capture
        for call in calls:
            call()
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)

    def once() -> None:
        for call in calls:
            call()

    rounds = max(1, min(64, math.ceil(FILL_SECONDS / min(_elapsed(once) for _ in range(2)))))

    def run() -> None:
        for _ in range(rounds):
            once()

    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        times = [_elapsed(captured.replay) for _ in range(repeats + 3)]
    else:
        times = [_elapsed(run) for _ in range(repeats + 3)]
    return [t / (rounds * len(calls)) for t in times[3:]]


def _elapsed(run: Call) -> float:
    """Seconds on the current device from the first to the last launch of `run`."""
    import torch

    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def peak_bytes(device: torch.device, fresh: bool = False) -> int:
    """Peak bytes allocated since the last `fresh` count, which restarts at the bytes allocated now."""
    import torch

    if device.type != "cuda":
        return 0
    if not fresh:
        return torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def bounds(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a large copy (read and written), and operations per second of a large matrix product."""
    import torch

    large = device.type == "cuda"
    n, m = (COPY_BYTES, PRODUCT) if large else (2**22, 256)
    source, target = torch.randn(n // 4, device=device), torch.empty(n // 4, device=device)
    copies = seconds([lambda: target.copy_(source)], device, 10)
    a = torch.randn(m, m, device=device).to(dtype)
    products = seconds([lambda: torch.mm(a, a)], device, 10)
    return {
        "bytes_per_second": 2 * n / statistics.median(copies),
        "flops_per_second": 2 * m**3 / statistics.median(products),
    }


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """For argparse: parse a whole number in this range."""

    def read(text: str) -> int:
        value: int | None
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            allowed = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"came {text!r}, allowed: a whole number {allowed}")
        return value

    return read


def duration(most: float = math.inf) -> Callable[[str], float]:
    """For argparse: parse a number of seconds that is positive and at most `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            limit = "" if most == math.inf else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"came {text!r}, allowed: seconds above 0{limit}")
        return value

    return read


def interpreted() -> bool:
    """Whether Triton runs its interpreter in this process; parses the variable as Triton does."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def unable(device: str, triton: bool = True) -> str | None:
    """The reason why "cuda" cannot be timed, or Triton's interpreter cannot run on "cpu"; None if it can."""
    import torch

    if triton and find_spec("triton") is None:
        return "Triton is not installed, allowed: an interpreter that has it"
    if device == "cpu":
        if interpreted():
            return None
        return "without a GPU kernels run in Triton's interpreter alone, allowed: TRITON_INTERPRET=1 in the environment"
    if not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} sees none"
    return "TRITON_INTERPRET is set, under which no time is meant, allowed: without it" if interpreted() else None


def check_outputs(parser: argparse.ArgumentParser, option: str, paths: Iterable[Path]) -> None:
    """Make the files' folders and check that each file can be written, else end with the parser's error.

    It keeps the content of existing files and leaves no new ones.
    """
    seen: list[str] = []
    for path in paths:
        # resolve links: the probe is removed, and must not be a link itself
        target = Path(os.path.realpath(path))
        try:
            if str(target) in seen:
                raise OSError("a file beside it has this name")
            seen.append(str(target))
            existed = target.exists()
            if existed and not target.is_file():
                raise OSError("it is there and is no regular file")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.open("ab").close()
            if not existed:
                target.unlink()
        except (OSError, ValueError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or error
            parser.error(f"argument {option}: came {str(path)!r}, not writable ({why}), allowed: a file that is")


def beside(path: Path, *suffixes: str) -> list[Path]:
    """The file, and its name with other suffixes."""
    return [path, *(path.with_suffix(suffix) for suffix in suffixes if path.name)]


def write(path: Path, results: dict[str, Any], table: str | None = None) -> None:
    """Write the results as JSON and, beside them, the table (if any) as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if table is not None:
        path.with_suffix(".md").write_text(table + "\n")
