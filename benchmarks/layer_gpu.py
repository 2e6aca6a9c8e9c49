"""The whole layer on a GPU against the bare products and other implementations; run by `benchmarks.layer`.

* ours:        `MoELayer` forward and backward: exact, bounded (1.25 of the mean k) and full capacity; the last two also
               as a CUDA graph. Contestant "grouped_mm" is ours with torch's grouped product.
* bare:        only the experts' products, by cuBLAS on contiguous rows, all rows at once; timed before and after the
               others, so that its spread shows changes of the clocks.
* dense:       a dense MLP on A rows, as many FLOPs as the layer: the cost of an eager Linear, activation, Linear.
* loop:        the layer on the torch engine: a loop over the experts that waits for their sizes.
* peers:       every installed peer, and ours beside them, on the same fixed-k routing; eager, since some wait for the
               device, and last, since some compile for minutes. See `benchmarks.peers`.

The shapes with targets come first, with the contestants that answer most: bare, ours bounded as a graph, ours exact,
grouped_mm. Ratios are bare / contestant from the same pass; times are medians in milliseconds on the named GPU. Results
are on disk after every contestant. Exit status: 0, 1 if something failed, 3 if the device was lost.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import peers
from .common.results import DEVICE_LOST, Progress, late_compilations, reason, usable
from .common.shapes import GPU_SHAPES, TARGETS, Shape
from .common.tensors import difference
from .common.timing import bounds, environment, peak_bytes, seconds, spread
from .layer_case import GROUPS, Case, Group


def check(case: Case) -> float:
    """Relative RMS error of our output against the torch engine's; raises RuntimeError if it is large."""
    with torch.no_grad():
        error = difference(case.layer(case.x_TD), case.make("exact", "torch")(case.x_TD))
    if not error < (1e-2 if case.dtype != torch.float32 else 1e-5):
        raise RuntimeError(f"ours and the loop differ by {error:.1e}")
    return error


def measure(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    failed: Callable[[str, Exception], None] = lambda name, error: None,
    groups: Sequence[Group] = GROUPS,
    result: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a shape's result so far after every contestant; one that cannot run has its reason in place of a time.

    `failed` gets the name and the exception. An earlier `result` of the shape grows by the contestants of `groups`.
    """
    case = Case(shape, dtype, device)
    if result is None:
        result = {"shape": asdict(shape), "dtype": str(dtype).removeprefix("torch."), "rows": case.rows}
        result |= {"skipped": {}, "seconds": {}, "peak_bytes": {}, "peers": {}}
        result |= {"milliseconds": {}, "bare_over": {}, "teraflops": {}}
        result["relative_rms_to_loop"] = check(case)
        result["saved_over_bound"] = case.saved_share()
    yield result
    times: dict[str, list[float]] = {}  # of this pass: its ratios are between times of the same clocks
    flops = replace(shape, k=case.rows / shape.T).flops(backward=True)
    for name, run, graph in (contestant for group in groups for contestant in group(case)):
        try:
            before = peak_bytes(device, fresh=True)
            times[name] = times.get(name, []) + seconds([run], device, repeats, graph)
            result["peak_bytes"].setdefault(name, peak_bytes(device) - before)
        except Exception as error:  # out of memory, an engine that does not take this type, a kernel that fails
            result["skipped"][name] = reason(error)
            failed(name, error)
            yield result
            if not usable(device):
                raise
            continue
        median = {other: statistics.median(values) for other, values in times.items()}
        result["seconds"] |= times
        result["milliseconds"] |= {other: spread([1e3 * t for t in values]) for other, values in times.items()}
        result["teraflops"] |= {other: flops / t / 1e12 for other, t in median.items()}
        if "bare" in median:
            result["bare_over"] |= {other: median["bare"] / t for other, t in median.items()}
        yield result


def measure_peers(
    names: Sequence[str], case: peers.PeerCase, repeats: int, end: float = math.inf
) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield ours and the peers by name after each: milliseconds, ratio to ours and peak bytes, or why unmeasured.

    None begins after the time `end` of the monotonic clock. Raises if ours fails or the device is lost.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("ours", *names):
        why = None if name == "ours" else peers.unavailable(name, case)
        if name != "ours" and why is None and time.monotonic() > end:
            why = "no time was left"
        if why is not None:
            found[name] = {"skipped": why}
            continue
        try:
            peer = peers.ours(case) if name == "ours" else peers.build(name, case)
            error = peers.checked(peer, case)
            before = peak_bytes(case.device, fresh=True)
            times = seconds([peers.step(peer, case)], case.device, repeats, False)
        except Exception as error:  # another package may raise anything; the table gets the reason
            if name == "ours":
                raise
            found[name] = {"skipped": reason(error)}
            yield found
            if not usable(case.device):
                raise
            continue
        peak = peak_bytes(case.device) - before
        found[name] = {"milliseconds": spread([1e3 * t for t in times]), "peak_bytes": peak}
        found[name] |= {"note": peer.note, "k": case.k, "relative_rms": error}
        ours = found["ours"]["milliseconds"]["median"]
        found[name]["it_over_ours"] = found[name]["milliseconds"]["median"] / ours
        yield found
    yield found


def _captured_step(case: Case, repeats: int) -> float:
    """Seconds of a step as a CUDA graph with room for every assignment, so that the host plays no part."""
    return statistics.median(seconds([case.step(case.make("full", "auto"))], case.device, repeats, True))


def determination(rows: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """R2 and slope of the least-squares line through the times."""
    slope, start = statistics.linear_regression(rows, times)
    residual = sum((t - start - slope * r) ** 2 for r, t in zip(rows, times, strict=True))
    return 1 - residual / sum((t - statistics.mean(times)) ** 2 for t in times), slope


def affine(dtype: torch.dtype, device: torch.device, shape: Shape, repeats: int) -> dict[str, Any]:
    """Time against the number of assignments with the fit's R2; and the time if one token takes every expert."""
    rows, times = [], []
    for k in (0.5, 1, 2, 3, 4):
        case = Case(replace(shape, k=k), dtype, device)
        rows.append(case.rows)
        times.append(_captured_step(case, repeats))
    r2, slope = determination(rows, times)
    case = Case(shape, dtype, device)
    before = [_captured_step(case, repeats)]
    with torch.no_grad():  # along the sum of the orthonormal routing vectors it passes every threshold
        token = case.x_TD[0].clone()
        case.x_TD[0] = case.layer.gates[0].sim_matrix.sum(dim=1)
        assert int(case.layer.route(case.x_TD).k_per_token[0]) == shape.E
    after = _captured_step(case, repeats)
    with torch.no_grad():
        case.x_TD[0] = token
    before.append(_captured_step(case, repeats))
    return {
        "rows": rows,
        "seconds": times,
        "r2": r2,
        "nanoseconds_an_assignment": 1e9 * slope,
        "one_token_with_every_expert": after / statistics.mean(before),
        "the_same_again": before[1] / before[0],
    }


def rows(result: dict[str, Any]) -> list[str]:
    """A shape's lines in the table."""
    head, lines = f"| {Shape(**result['shape'])}, {result['dtype']}", []
    for name, ms in result["milliseconds"].items():
        peak, over = result["peak_bytes"][name], result["bare_over"].get(name)
        lines.append(
            f"{head} | {name} | {ms['median']:.3f} | {ms['quartile_1']:.3f} to {ms['quartile_3']:.3f} "
            f"| {'-' if over is None else f'**{over:.2f}**'} | {result['teraflops'][name]:.0f} | {peak / 2**20:.0f} |"
        )
    lines += [f"{head} | {name} | not measured: {why} | | | | |" for name, why in result["skipped"].items()]
    lines.append(f"{head} | saved / (x + h + 8 A) | {result['saved_over_bound']:.3f} | | | | |")
    return lines


def peer_rows(result: dict[str, Any]) -> list[str]:
    """A shape's lines in the table of peers."""
    lines = []
    for name, entry in result["peers"].items():
        head = f"| {Shape(**result['shape'])}, {result['dtype']} | {name}"
        if "skipped" in entry:
            lines.append(f"{head} | | skipped: {entry['skipped']} | | | |")
            continue
        ms = entry["milliseconds"]
        lines.append(
            f"{head}{', ' + entry['note'] if entry['note'] else ''} | {entry['k']} | {ms['median']:.3f} "
            f"| {ms['quartile_1']:.3f} to {ms['quartile_3']:.3f} | **{entry['it_over_ours']:.2f}** "
            f"| {entry['peak_bytes'] / 2**20:.0f} |"
        )
    return lines


def table(summary: dict[str, Any]) -> str:
    """Results as Markdown."""
    name, rates = summary["environment"].get("gpu", "CPU: no times are meant"), summary["bounds"]
    lines = [
        f"Forward and backward. {name}, copy {rates['bytes_per_second'] / 1e12:.2f} TB/s, matrix product "
        f"{rates['flops_per_second'] / 1e12:.0f} TFLOP/s. FLOPs are those of the experts' products.",
        "",
        "| shape | contestant | ms | quartiles | bare / it | TFLOP/s | peak MiB |",
        "|---" * 7 + "|",
    ]
    for result in summary["results"]:
        lines += rows(result)
    fit = summary.get("affine")
    if fit is not None:
        lines += [
            "",
            f"Time against assignments (ViT-S): R2 {fit['r2']:.4f}, {fit['nanoseconds_an_assignment']:.2f} ns each; "
            f"one token with every expert: {fit['one_token_with_every_expert']:.4f} of the time without (the same "
            f"measured again: {fit['the_same_again']:.4f}).",
        ]
    lines += ["", "Peers, all on the same fixed-k routing, eager, forward and backward:", ""]
    lines += ["| shape | peer | k | ms | quartiles | it / ours | peak MiB |", "|---" * 7 + "|"]
    for result in summary["results"]:
        lines += peer_rows(result)
    lines += [f"\nFailed: {failure['where']}: {failure['why']}" for failure in summary["failures"]]
    return "\n".join(lines)


def _measure_shape(
    progress: Progress,
    step: str,
    groups: Sequence[Group],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> None:
    """Measure all but the peers; a contestant that cannot run is a failure."""

    def failed(name: str, error: Exception) -> None:
        progress.fail(f"{step}: {name}", error)

    wanted = (asdict(shape), str(dtype).removeprefix("torch."))
    known = next((r for r in progress.results if (r["shape"], r["dtype"]) == wanted), None)
    for result in measure(shape, dtype, device, repeats, failed, groups, known):
        if known is None:
            progress.results.append(known := result)  # grows as it is measured
        progress.save()
    assert known is not None
    print("\n".join(rows(known)), flush=True)


def _measure_peers(
    progress: Progress,
    names: Sequence[str],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    end: float,
) -> None:
    """Measure the peers of a shape, and ours again beside them if there are any."""
    wanted = (asdict(shape), str(dtype).removeprefix("torch."))
    for result in progress.results:
        if (result["shape"], result["dtype"]) != wanted:
            continue
        case, known = peers.PeerCase(shape, dtype, device), result["peers"]
        whys = {name: peers.unavailable(name, case) for name in names}
        if "ours" in known and all(whys.values()):
            known |= {name: {"skipped": why} for name, why in whys.items()}
            continue
        for found in measure_peers(names, case, repeats, end):
            known |= {name: entry for name, entry in found.items() if name not in known}
            progress.save()
        print("\n".join(peer_rows(result)), flush=True)


def run(
    device: torch.device, dtypes: Sequence[str], limit: float, repeats: int, out: Path | None, resume: bool = False
) -> int:
    """Measure in order of weight while time lasts.

    Shapes with targets, the affine fit, their further contestants, the other shapes, peers.
    """
    end = time.monotonic() + limit
    first = getattr(torch, dtypes[0])
    progress = Progress(out, {"environment": environment(device), "bounds": bounds(device, first)}, table, resume)
    if device.type == "cuda":
        progress.summary["compiled"] = late_compilations()

    def fit() -> None:
        progress.summary["affine"] = affine(first, device, GPU_SHAPES["vit-s"], repeats)

    Step = tuple[str, Callable[[], None]]
    steps: list[Step] = []
    more: list[Step] = []
    quick: list[Step] = []
    slow: list[Step] = []
    others = [name for name in peers.ADAPTERS if name not in peers.TUNING]
    for dtype in dtypes:
        for name, shape in GPU_SHAPES.items():
            case = (shape, getattr(torch, dtype), device, repeats)
            step = f"{name}, {dtype}"
            if name in TARGETS:
                steps.append((step, partial(_measure_shape, progress, step, GROUPS[:1], *case)))
                later = f"{step}, further"
                more.append((later, partial(_measure_shape, progress, later, GROUPS[1:], *case)))
            else:
                more.append((step, partial(_measure_shape, progress, step, GROUPS, *case)))
            quick.append((f"peers, {step}", partial(_measure_peers, progress, others, *case, end)))
            slow.append((f"peers that tune, {step}", partial(_measure_peers, progress, peers.TUNING, *case, end)))
    for step, call in [*steps, ("affine", fit), *more, *quick, *slow]:
        if time.monotonic() > end:
            print(f"skipped, no time is left: {step}")
            continue
        if not progress.begin(step):
            continue
        try:
            call()
            progress.finish(step)
        except Exception as error:  # the next step may still work
            progress.finish(step, error)
            if not usable(device):
                return DEVICE_LOST
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return progress.conclude(limit)
