"""Ten lines on a run of `benchmarks.gpu`, should nothing else be read.

    python -m benchmarks.summary DIR

DIR has the files that the run left, however few. Needs no torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import targets
from .common.shapes import TARGETS

Summary = dict[str, Any]
FILES = {name: f"{name}-gpu.json" for name in ("smoke", "layer", "kernels")}
TESTS = "tests-gpu.txt"
# kernels.PRODUCTS, which is not imported: that needs torch
PRODUCTS = {
    "up": "up",
    "down": "down",
    "activation gradient": "act. gradient",
    "weight gradient, first": "dW first",
    "weight gradient, second": "dW second",
    "rows of the tokens' gradient": "d rows",
}
CONTESTANTS = {targets.OURS: "graph", "ours, exact": "exact", "grouped_mm": "grouped_mm"}


def lines(results: Path, outcomes: Mapping[str, str] = {}) -> list[str]:
    """The lines for the files in a folder, however few there are, and the outcomes of the parts by name."""
    smoke, layer, kernels = (targets.read(results / name) for name in FILES.values())
    measured = list(_microseconds(kernels))
    found = [
        _machine(layer or kernels or smoke),
        _smoke(smoke),
        *(_layer(layer, name) for name in TARGETS),
        "share of bound, worst: " + _extreme(measured, lambda k: k["share"], min),
        "grouped_mm / ours, time: " + _extreme(measured, _against(measured, ": grouped_mm"), min),
        "skewed / equal loads, time: " + _extreme(measured, _against(measured, ", skewed"), max),
    ]
    late = [f"{name} {len(s.get('compiled', ()))}" for name, s in (("layer", layer), ("kernels", kernels)) if s]
    ends = [f"{name} {outcome}" for name, outcome in outcomes.items()]
    last = ["tests: " + _tests(results / TESTS), "compiled late: " + (", ".join(late) or "-"), *ends]
    return [*found, "; ".join(last)]


def _machine(summary: Summary | None) -> str:
    if summary is None:
        return "no results"
    about, rates = summary["environment"], summary.get("bounds")
    text = f"{about.get('gpu', 'no GPU')}, torch {about['torch']}, Triton {about['triton']}, Python {about['python']}"
    if rates is None:
        return text
    copy, product = rates["bytes_per_second"] / 1e12, rates["flops_per_second"] / 1e12
    return f"{text}, copy {copy:.2f} TB/s, product {product:.0f} TFLOP/s"


def _smoke(smoke: Summary | None) -> str:
    if smoke is None:
        return "smoke: no results"
    worst = max((found for r in smoke["results"] for name, found, _ in r["checks"] if name.endswith(" off")), default=0)
    failed = [f"{f['where']}: {f['why']}" for f in smoke["failures"]]
    checks = sum(len(r["checks"]) for r in smoke["results"])
    return f"smoke: {checks} checks, worst difference {worst:.1e}, " + _first(failed, "none failed")


def _first(texts: Sequence[str], none: str) -> str:
    """How many, and the first; short enough for a line."""
    return f"{len(texts)} FAILED: {texts[0][:150]}" if texts else none


def _layer(layer: Summary | None, name: str) -> str:
    own = [r for r in (layer["results"] if layer else ()) if targets.shape_name(r["shape"]) == name]
    if not own:
        return f"{name}: not measured"
    ms, over, skipped = own[0]["milliseconds"], own[0]["bare_over"], own[0]["skipped"]
    texts = [f"bare {ms['bare']['median']:.3f} ms"] if "bare" in ms else []
    for contestant, short in CONTESTANTS.items():
        if contestant in ms:
            ratio = f" ({over[contestant]:.2f})" if contestant in over else ""
            texts.append(f"{short} {ms[contestant]['median']:.3f}{ratio}")
    if skipped:
        texts.append(_first([f"{other}: {why}" for other, why in skipped.items()], ""))
    return f"{name}: " + ", ".join(texts or ["not measured"])


def _microseconds(kernels: Summary | None) -> Iterator[dict[str, Any]]:
    """Kernel, shape's name, microseconds and share of the bound, of what was measured at the shapes with targets."""
    for r in kernels["results"] if kernels else ():
        shape = targets.shape_name(r["shape"])
        if "failed" not in r and shape in TARGETS:
            us = r["microseconds"]["median"]
            yield {"kernel": r["kernel"], "shape": shape, "us": us, "share": r["share_of_bound"]}


def _against(measured: Sequence[dict[str, Any]], suffix: str) -> Callable[[dict[str, Any]], float | None]:
    """The time of the kernel's variant over its own."""
    by_name = {(m["kernel"], m["shape"]): m["us"] for m in measured}

    def ratio(m: dict[str, Any]) -> float | None:
        other = by_name.get((m["kernel"] + suffix, m["shape"]))
        return None if other is None else other / m["us"]

    return ratio


def _extreme(
    measured: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None], choose: Callable[..., Any]
) -> str:
    """Of each product the lowest or highest value, and its shape."""
    texts = []
    for kernel, short in PRODUCTS.items():
        values = [(v, m["shape"]) for m in measured if m["kernel"] == kernel and (v := value(m)) is not None]
        if values:
            found, shape = choose(values)
            texts.append(f"{short} {found:.2f} ({shape})")
    return ", ".join(texts) or "not measured"


def _tests(log: Path) -> str:
    """pytest's closing line."""
    closing = re.findall(r"=+ (.* in [\d.]+s.*?) =+\s*$", log.read_text(), re.MULTILINE) if log.exists() else []
    return closing[-1] if closing else "no closing line"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    given = sys.argv[1:] if argv is None else argv
    if len(given) != 1 or not Path(given[0]).is_dir():
        print("usage: python -m benchmarks.summary DIR", file=sys.stderr)
        return 2
    print("\n".join(lines(Path(given[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
