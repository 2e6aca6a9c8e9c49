"""Each Triton kernel against its bound: the copy bandwidth or the matrix rate that the same run measures.

    python -m benchmarks.kernels [--device cuda] [--shape vit-s ...] [--dtype bfloat16] [--seconds N] [--out FILE.json]

The shapes with targets come first. Each matrix product is also timed as torch.nn.functional.grouped_mm ("NAME:
grouped_mm": the product alone, on contiguous rows) and, at these shapes, on loads of which one expert has half ("NAME,
skewed").

It first compares a kernel with torch on the same device; a kernel that differs is named and not timed. It times
CUDA-graph replays over several sets of inputs, so that these come from memory. It writes FILE.json and FILE.md after
every kernel and the roofline FILE.png after every shape. The exit status is 1 if a kernel failed, 3 if the device was
lost; then `--resume` goes on. Without a GPU the kernels run in Triton's interpreter on a tiny shape: this tests the
program and measures nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .common.results import DEVICE_LOST, Progress, late_compilations, reason, usable
from .common.shapes import GPU_SHAPES, TARGETS, Shape
from .common.tensors import difference
from .common.timing import beside, bounds, check_outputs, duration, environment, seconds, spread, unable, whole
from .launches.kernel_calls import PRODUCTS, TINY, Inputs, Kernel, grouped_mm_of, kernels_of

L2_BYTES = 128 << 20  # more than any cache on a GPU holds
MOST_SETS = 8


def sets_of_inputs(shape: Shape, dtype: torch.dtype) -> int:
    """How many sets of inputs, used in turn, exceed any cache, counting only tokens; capped for small inputs."""
    tokens = shape.T * shape.D * dtype.itemsize
    return max(1, min(MOST_SETS, 1 + L2_BYTES // max(tokens, 1))) if tokens < L2_BYTES else 1


def measure(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    rates: dict[str, float],
    repeats: int,
    skewed: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield one result per kernel; `failed` gets the exception of a kernel that differs or does not run.

    `skewed`: the products alone, where one expert has half of the rows.
    """
    sets = sets_of_inputs(shape, dtype) if device.type == "cuda" else 1
    for same in zip(*(_kernels(Inputs(shape, dtype, device, seed, skewed)) for seed in range(sets)), strict=True):
        first = same[0]
        if skewed and first.name.split(":")[0] not in PRODUCTS:
            continue
        result: dict[str, Any] = {
            "shape": asdict(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "kernel": first.name + ", skewed" * skewed,
            "bytes": first.bytes,
            "flops": first.flops,
            "difference": None,
        }
        try:
            if first.expected is not None and device.type != "meta":
                result["difference"] = _checked(first, dtype)
            times = seconds([kernel.run for kernel in same], device, repeats)
            yield result | judged(first, times, rates)
        except Exception as error:  # compilation, launch and comparison may raise anything
            yield result | {"failed": error}


def _kernels(inputs: Inputs) -> Iterator[Kernel]:
    """Ours, then torch's products."""
    yield from kernels_of(inputs)
    yield from grouped_mm_of(inputs)


def _checked(kernel: Kernel, dtype: torch.dtype) -> float:
    """The kernel's difference from the torch operation; raises RuntimeError if it is large."""
    assert kernel.expected is not None
    error = difference(kernel.run(), kernel.expected())
    if not error < (1e-2 if dtype != torch.float32 else 1e-4):
        raise RuntimeError(f"differs from the torch operation by {error:.1e}")
    return error


def judged(kernel: Kernel, times: Sequence[float], rates: dict[str, float]) -> dict[str, Any]:
    """Times of one call in seconds, and the least time that the rates allow for its bytes and FLOPs."""
    by_bytes = kernel.bytes / rates["bytes_per_second"]
    by_flops = kernel.flops / rates["flops_per_second"]
    bound = max(by_bytes, by_flops)
    return {
        "microseconds": spread([1e6 * t for t in times]),
        "bound_microseconds": 1e6 * bound,
        "bound_by": "bytes" if by_bytes >= by_flops else "flops",
        "share_of_bound": bound / statistics.median(times),
    }


def rows(results: Sequence[dict[str, Any]]) -> list[str]:
    """One table line per result."""
    lines = []
    for r in results:
        head = f"| {Shape(**r['shape'])} | {r['dtype']} | {r['kernel']}"
        if "failed" in r:
            lines.append(f"{head} | failed: {r['failed']} | | | | |")
            continue
        us = r["microseconds"]
        lines.append(
            f"{head} | {us['median']:.1f} | {us['quartile_1']:.1f} to {us['quartile_3']:.1f} "
            f"| {r['bound_microseconds']:.1f} | {r['bound_by']} | **{r['share_of_bound']:.2f}** |"
        )
    return lines


def table(summary: dict[str, Any]) -> str:
    """The results as Markdown, below the measured rates."""
    name = summary["environment"].get("gpu", "CPU, interpreter: no times are meant")
    rates = summary["bounds"]
    copy, product = rates["bytes_per_second"] / 1e12, rates["flops_per_second"] / 1e12
    lines = [f"Copy {copy:.2f} TB/s, {rates['dtype']} product {product:.0f} TFLOP/s, {name}.", ""]
    lines += ["| shape | dtype | kernel | us | quartiles | bound us | by | share of bound |", "|---" * 8 + "|"]
    lines += rows(summary["results"])
    lines += [f"\nFailed: {failure['where']}: {failure['why']}" for failure in summary["failures"]]
    return "\n".join(lines)


def roofline(results: Sequence[dict[str, Any]], rates: dict[str, float], path: Path, title: str) -> None:
    """Plot achieved rate against arithmetic intensity for kernels with products, and the two measured bounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = [r for r in results if not r["kernel"].endswith((": grouped_mm", ", skewed"))]
    timed = [r for r in ours if r["flops"] and "failed" not in r]
    figure, axes = plt.subplots(figsize=(9, 6))
    bandwidth, rate = rates["bytes_per_second"], rates["flops_per_second"]
    ridge = rate / bandwidth
    xs = [ridge / 300, ridge, ridge * 30]
    axes.plot(xs, [min(rate, bandwidth * x) / 1e12 for x in xs], color="black", label="measured bounds")
    names = list(dict.fromkeys(r["kernel"] for r in timed))
    colours = plt.get_cmap("tab20").colors
    for colour, name in zip(colours, names, strict=False):
        own = [r for r in timed if r["kernel"] == name]
        x = [r["flops"] / r["bytes"] for r in own]
        y = [r["flops"] / r["microseconds"]["median"] / 1e6 for r in own]
        axes.scatter(x, y, color=colour, label=name, s=36, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte of inputs and outputs", ylabel="TFLOP/s", title=title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def steps_of(shapes: dict[str, Shape]) -> dict[str, tuple[Shape, bool]]:
    """Name of a step: shape, whether its loads are skewed. Skewed ones follow the shapes with targets."""
    plain = {name: (shape, False) for name, shape in shapes.items()}
    targets = {name: plain.pop(name) for name in TARGETS if name in plain}
    return targets | {f"{name}, skewed": (shape, True) for name, (shape, _) in targets.items()} | plain


def run(
    progress: Progress, shapes: dict[str, Shape], dtype: torch.dtype, device: torch.device, limit: float, repeats: int
) -> int:
    """Measure the shapes while time lasts; return the exit status."""
    started, lost = time.monotonic(), False
    plots = progress.out is not None and find_spec("matplotlib") is not None
    if progress.out is not None and not plots:
        print("no plot is drawn: matplotlib is not installed", file=sys.stderr)
    for name, (shape, skewed) in steps_of(shapes).items():
        if time.monotonic() - started > limit:
            print(f"skipped, no time is left: {name}: {shape}")
            continue
        if not progress.begin(name):
            continue
        try:
            for result in measure(shape, dtype, device, progress.summary["bounds"], repeats, skewed):
                error = result.get("failed")
                progress.results.append(result if error is None else result | {"failed": reason(error)})
                print(rows(progress.results[-1:])[0], flush=True)
                if error is not None:
                    progress.fail(f"{name}: {result['kernel']}", error)
                    lost = not usable(device)
                if lost:
                    break
                progress.save()
            progress.finish(name, "the device was lost" if lost else None)
        except Exception as error:  # raised while preparing a kernel's inputs
            progress.finish(name, error)
            lost = not usable(device)
        if lost:
            return DEVICE_LOST
        if plots:
            plots = _plotted(progress)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return progress.conclude(limit)


def _plotted(progress: Progress) -> bool:
    """Draw the roofline; False if that failed, which must not stop the other shapes."""
    assert progress.out is not None
    try:
        title = progress.summary["environment"].get("gpu", "interpreter")
        roofline(progress.results, progress.summary["bounds"], progress.out.with_suffix(".png"), title)
    except Exception as error:
        progress.fail("plot", error)
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--shape", nargs="+", choices=list(GPU_SHAPES), default=list(GPU_SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=whole(1), default=20)
    parser.add_argument("--seconds", type=duration(), default=float("inf"), help="start no shape after this time")
    parser.add_argument("--out", type=Path, help="JSON file; the table and the plot go beside it")
    parser.add_argument("--resume", action="store_true", help="go on with --out where a run before broke off")
    args = parser.parse_args(argv)
    why = unable(args.device)
    if why is not None:
        on_cpu = "" if args.device == "cpu" or default == "cuda" else ", allowed here: cpu with TRITON_INTERPRET=1"
        parser.error(f"argument --device: came {args.device!r}: {why}{on_cpu}")
    if args.out:
        check_outputs(parser, "--out", beside(args.out, ".md", ".png"))
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shapes = {name: GPU_SHAPES[name] for name in args.shape}
    if device.type != "cuda":
        shapes, dtype, args.repeats = {"tiny": TINY}, torch.float32, 2
    rates = bounds(device, dtype) | {"dtype": str(dtype).removeprefix("torch.")}
    progress = Progress(args.out, {"environment": environment(device), "bounds": rates}, table, args.resume)
    if device.type == "cuda":
        progress.summary["compiled"] = late_compilations()
    return run(progress, shapes, dtype, device, args.seconds, args.repeats)


if __name__ == "__main__":
    sys.exit(main())
