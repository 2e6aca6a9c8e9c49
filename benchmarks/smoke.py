"""The first seconds on a GPU: is a step of the layer right, and is it the same step every time?

    python -m benchmarks.smoke [--device cuda] [--repeats 50] [--out FILE.json]

It compiles what it launches on all processors (`benchmarks.warm`). Then, for ViT-S and a shape with gated experts:

* decisions: the gate's against cosines in float64; none may differ by more than the margin of fp32;
* output, loss and every gradient against the torch engine's;
* the same bits in further steps;
* a bounded capacity in which all fits gives the output's bits too.

FILE.json has every difference. The exit status is 1 if a check failed, 3 if the device was lost. Without a GPU the
experts run in Triton's interpreter on a tiny shape: this tests the program.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common.results import DEVICE_LOST, Progress, usable
from .common.shapes import GPU_SHAPES, Shape
from .common.tensors import difference, equal
from .common.timing import beside, check_outputs, duration, environment, unable, whole
from .launches.kernel_calls import TINY
from .layer_case import Case

SHAPES = ("vit-s", "llm-2k")
MARGIN = 2e-6  # of a cosine and its threshold: closer, fp32 may decide otherwise (the design)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def step(case: Case, layer: nn.Module) -> dict[str, Tensor]:
    """Output, auxiliary loss, and gradients by name."""
    names = ["x", *(name for name, _ in layer.named_parameters())]
    with torch.enable_grad():
        y_TD = layer(case.x_TD)
        inputs = [case.x_TD, *layer.parameters()]
        grads = torch.autograd.grad((y_TD, y_TD.l_aux), inputs, (case.d_y_TD, torch.ones_like(y_TD.l_aux)))
    return {"y": y_TD.detach(), "l_aux": y_TD.l_aux.detach()} | {
        f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True)
    }


def wrong_decisions(case: Case) -> int:
    """Assignments that the gate decides otherwise than float64, further from the threshold than the margin."""
    gate = case.layer.gates[0]
    with torch.no_grad():
        routing = case.layer.route(case.x_TD)
        unit_TD, unit_DE = F.normalize(case.x_TD.double(), dim=1), F.normalize(gate.sim_matrix.double(), dim=0)
        margin_TE = unit_TD @ unit_DE - gate.gates.double()
        wrong_TE = (routing.assigned != (margin_TE > 0)) & (margin_TE.abs() > MARGIN)
    return int(wrong_TE.sum())


def checks(case: Case, repeats: int, engine: str = "auto") -> Iterator[tuple[str, float, float]]:
    """Each check's name, what it found, and the most that is allowed."""
    yield "decisions off", wrong_decisions(case), 0
    ours = case.make("exact", engine)
    first, reference = step(case, ours), step(case, case.make("exact", "torch"))
    for name, tensor in first.items():
        yield f"{name} off", difference(tensor, reference[name]), TOLERANCE[case.dtype]
    del reference
    unequal = set()
    for _ in range(repeats):
        again = step(case, ours)
        unequal |= {name for name, tensor in again.items() if not equal(tensor, first[name])}
        del again
    yield f"unequal in {repeats} repeats: {', '.join(sorted(unequal)) or 'none'}", len(unequal), 0
    with torch.no_grad():
        bounded = case.make(1.25 * case.shape.k, engine)(case.x_TD)
    yield "bounded output unequal", 0 if equal(bounded, first["y"]) else 1, 0


def table(summary: dict[str, Any]) -> str:
    """A line for each shape: the worst difference and what else was found."""
    lines = []
    for r in summary["results"]:
        off = {name: found for name, found, _ in r["checks"] if name.endswith(" off") and name != "decisions off"}
        worst = max(off, key=lambda name: off[name], default="nothing off")
        others = [f"{name} {found:g}" for name, found, _ in r["checks"] if name not in off]
        lines.append(f"{Shape(**r['shape'])}: {worst} {off.get(worst, 0):.1e}; {'; '.join(others)}")
    return "\n".join([*lines, *(f"Failed: {f['where']}: {f['why']}" for f in summary["failures"])])


def run(
    progress: Progress, shapes: dict[str, Shape], dtype: torch.dtype, device: torch.device, repeats: int, engine: str
) -> int:
    """Check the shapes; return the exit status."""
    for name, shape in shapes.items():
        progress.begin(name)
        result: dict[str, Any] = {"shape": asdict(shape), "checks": []}
        progress.results.append(result)
        try:
            for what, found, most in checks(Case(shape, dtype, device), repeats, engine):
                result["checks"].append((what, found, most))
                if not found <= most:
                    progress.fail(f"{name}: {what}", f"{found:.2g}, allowed {most:g}")
            progress.finish(name)
        except Exception as error:  # the other shape may still work
            progress.finish(name, error)
            if not usable(device):
                return DEVICE_LOST
    return progress.conclude(math.inf)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=whole(1), default=50)
    parser.add_argument("--seconds", type=duration(), default=math.inf, help="compile ahead for half of this time")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    why = unable(args.device)
    if why is not None:
        parser.error(f"argument --device: came {args.device!r}: {why}")
    if args.out:
        check_outputs(parser, "--out", beside(args.out))
    device, started = torch.device(args.device), time.monotonic()
    shapes, dtype, engine = {name: GPU_SHAPES[name] for name in SHAPES}, torch.bfloat16, "auto"
    if device.type == "cuda":
        from . import warm  # takes the place of Triton's launches

        warm.compile_all(list(shapes.values()), os.cpu_count() or 1, args.seconds / 2)
    else:
        shapes, dtype, engine = {"tiny": TINY}, torch.float32, "triton"
    progress = Progress(args.out, {"environment": environment(device)}, table, page=False)
    status = run(progress, shapes, dtype, device, args.repeats, engine)
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
