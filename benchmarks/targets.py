"""The targets for an H200 beside what `benchmarks.kernels` and `benchmarks.layer` measured.

    python -m benchmarks.targets kernels-gpu.json layer-gpu.json [--out FILE.md]

Prints the lines of the table in docs/performance.md. What was not measured is said so, and a target over several shapes
is held against the worst of them. The exit status does not depend on what is met. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .common.shapes import GPU_SHAPES, TARGETS, Shape

Summary = dict[str, Any]
LARGE_GATE = 8 << 20  # T D from which the gate is held against the copy bandwidth
# the layer as it is held against `bare`: both as CUDA graphs, so that the host plays no part
OURS = "ours, bounded, graph"
NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Target:
    """One line: what it is about, two bounds, and the value with the shape that it is of, if measured."""

    name: str
    must: float
    stretch: float | None
    value: float | None
    of: str = ""
    unit: str = ""
    least: bool = True  # the bounds are lower bounds

    @property
    def bounds(self) -> str:
        """Both, as they are in the table."""
        both = [self.must] if self.stretch is None else [self.must, self.stretch]
        texts = [f"{bound:g}{self.unit}" if self.unit or not bound else f"{bound:.2f}" for bound in both]
        return " | ".join([*texts, ""][:2])

    @property
    def met(self) -> str:
        """ "stretch", "must", "no", or "" where nothing is measured."""
        if self.value is None:
            return ""
        for name, bound in (("stretch", self.stretch), ("must", self.must)):
            if bound is not None and (self.value >= bound if self.least else self.value <= bound):
                return name
        return "no"


def shape_name(shape: dict[str, Any]) -> str:
    """The name of a shape."""
    found = Shape(**{field.name: shape[field.name] for field in fields(Shape)})
    return next((name for name, other in GPU_SHAPES.items() if other == found), str(found))


def _worst(values: Iterable[tuple[float, str]], least: bool = True) -> tuple[float | None, str]:
    """The lowest value, or the highest where bounds are upper ones, with what it is of."""
    found = sorted(values, reverse=not least)
    return found[0] if found else (None, "")


def _layer_values(
    layer: Summary | None, shapes: Sequence[str], read: Callable[[dict[str, Any]], float | None]
) -> list[tuple[float, str]]:
    """The values of the shapes, in bf16; none unless all of them have one."""
    found = {}
    for result in layer["results"] if layer else ():
        value = read(result) if result["dtype"] == "bfloat16" else None
        if value is not None:
            found[shape_name(result["shape"])] = value
    return [(found[name], name) for name in shapes] if set(shapes) <= found.keys() else []


def _kernel_values(
    kernels: Summary | None, kernel: str, read: Callable[[dict[str, Any]], float], chosen: Callable[[Shape], bool]
) -> list[tuple[float, str]]:
    """The values of a kernel at the shapes that count and are measured; none where one of them failed."""
    own = [
        r
        for r in (kernels["results"] if kernels else ())
        if r["kernel"] == kernel and r["dtype"] == "bfloat16" and chosen(Shape(**r["shape"]))
    ]
    return [] if any("failed" in r for r in own) else [(read(r), shape_name(r["shape"])) for r in own]


def targets(kernels: Summary | None, layer: Summary | None) -> list[Target]:
    """All targets for a GPU, of the summaries that the benchmarks write."""

    def over(name: str, shapes: Sequence[str], must: float, stretch: float) -> Target:
        values = _layer_values(layer, shapes, lambda r: r["bare_over"].get(OURS))
        return Target(f"bare / ours, {name}", must, stretch, *_worst(values))

    gate = _kernel_values(kernels, "gate", lambda r: r["share_of_bound"], lambda s: s.T * s.D >= LARGE_GATE)
    index = _kernel_values(
        kernels,
        "index (bounded)",
        lambda r: r["microseconds"]["median"],
        lambda s: s.T <= 32768 and s.E <= 64,
    )
    saved = _layer_values(layer, TARGETS, lambda r: r["saved_over_bound"])
    fit = (layer or {}).get("affine") or {}
    return [
        over("ViT-S (384/1536, E 8)", ("vit-s",), 0.62, 0.75),
        over("ViT-B (768/3072), BERT-L (1024/4096, E 16)", ("vit-b", "bert-l"), 0.72, 0.82),
        over("LLM (4096/1024 GLU, E 64, mean k 6)", ("llm-4k",), 0.70, 0.80),
        Target("gate kernel, share of copy bandwidth (T D >= 8M)", 0.80, 0.90, *_worst(gate)),
        Target("index build at T <= 32k, E <= 64", 12, 8, *_worst(index, False), unit=" us", least=False),
        Target("saved for backward / (x + pre-activation + 8 A bytes)", 1.05, 1.0, *_worst(saved, False), least=False),
        Target("time affine in the assignments, R2", 0.99, None, fit.get("r2"), "vit-s"),
        Target(
            "one token with k = E, time over the time without",
            1.01,
            None,
            fit.get("one_token_with_every_expert"),
            "vit-s",
            least=False,
        ),
        Target("host synchronisations with a bounded or full capacity", 0, None, *_waits(layer), least=False),
    ]


def _waits(layer: Summary | None) -> tuple[float | None, str]:
    """0 where every step was captured as a CUDA graph, which a wait for the device would have ended."""
    names = (OURS, "ours, full, graph")
    values = _layer_values(layer, TARGETS, lambda r: 0.0 if set(names) <= r["milliseconds"].keys() else None)
    return (0.0, "steps captured as CUDA graphs") if values else (None, "")


def table(found: Sequence[Target], card: str | None = None) -> str:
    """The lines of the table in docs/performance.md."""
    lines = [
        f"| target ({card or 'no GPU'}, bf16, forward+backward) | must | stretch | measured | met |",
        "|---" * 5 + "|",
    ]
    for t in found:
        measured = NOT_MEASURED
        if t.value is not None:
            measured = f"{t.value:.3g}{t.unit}" if t.unit or t.value == 0 else f"{t.value:.3f}"
            measured += f" ({t.of})" if t.of else ""
        lines.append(f"| {t.name} | {t.bounds} | {measured} | {t.met} |")
    return "\n".join(lines)


def read(path: Path) -> Summary | None:
    """A summary, or None where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def report(kernels: Path, layer: Path) -> str:
    """The table of what lies in two files, either of which may not be there."""
    summaries = read(kernels), read(layer)
    cards = [s["environment"].get("gpu") for s in summaries if s]
    return table(targets(*summaries), next(iter(cards), None))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=Path)
    parser.add_argument("layer", type=Path)
    parser.add_argument("--out", type=Path, help="Markdown file")
    args = parser.parse_args(argv)
    text = report(args.kernels, args.layer)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
