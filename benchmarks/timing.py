"""Times on a device, the two rates that bound them, and what a result must say of the machine it was taken on."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
FILL_SECONDS = 2e-3  # of work between two events, beside which they and a launch weigh little


def environment(device: torch.device) -> dict[str, Any]:
    """Names and versions, and on a GPU its name, driver and clocks."""
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


def seconds(calls: Sequence[Call], device: torch.device, repeats: int = 20, graph: bool = True) -> list[float]:
    """Seconds of one call, `repeats` times; `calls` are the same work on inputs in different memory, taken in turn.

    On a GPU all of them, short ones several times, are captured in one CUDA graph, so that the host plays no part
    (`graph`), and a replay is timed with events; on a CPU each is timed by the clock.
    """
    if device.type != "cuda":
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            calls[i % len(calls)]()
            times.append(time.perf_counter() - start)
        return times
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
    """Seconds on the current device from the first to the last of what `run` launches."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def bounds(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a large copy, read and written, and operations a second of a large matrix product."""
    large = device.type == "cuda"
    n, m = (2**29, 8192) if large else (2**22, 256)
    source, target = torch.randn(n // 4, device=device), torch.empty(n // 4, device=device)
    copies = seconds([lambda: target.copy_(source)], device, 10)
    a = torch.randn(m, m, device=device).to(dtype)
    products = seconds([lambda: torch.mm(a, a)], device, 10)
    return {
        "bytes_per_second": 2 * n / statistics.median(copies),
        "flops_per_second": 2 * m**3 / statistics.median(products),
    }


def write(path: Path, results: dict[str, Any], table: str) -> None:
    """The results as JSON, and beside them the table as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(table + "\n")
