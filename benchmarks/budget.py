"""A budget for k: how well a law holds the mean, and what the gate with a budget costs.

    python -m benchmarks.budget [--part laws gate] [--steps 400] [--repeats 300] [--threads N] [--out FILE.json]

* laws: a layer learns a linear map while its experts grow and are pruned. Tokens are random or lie around a common
        mean; training starts at a mean k of 8 or 0.5, the target is 2. Each law moves the shift once a step. The number
        is the worst relative error of the mean k over 100 steps in a row, after the first 200 steps.
  - integral: the gain times log(mean k / target) of the step's tokens is added to the shift;
  - sign:     steps of a length that grows by 1.2 while the error keeps its sign and halves where it turns (Rprop's);
  - quantile: this package's, `dynmoe_tutel.adaptive.Budgets`.
* gate: the time of the operation `threshold_gate` over that without a budget, on a CPU. The mean k is 2; with a cap of
        4 few tokens are over it, with one of 2 a quarter. Contestants run in turn, each round in random order. A ratio
        is the median over the rounds of the time over that of the gate without in the same round, with its quartiles.
        The gate without runs twice a round: the second shows what the machine's other work does to a ratio. One thread
        is timed by its own clock, which stands still while another process has the processor.

It prints the tables, and writes FILE.json and FILE.md.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe_tutel import ExpertController, MoELayer
from dynmoe_tutel.adaptive import Budgets
from dynmoe_tutel.kernels import threshold_gate

from .common.timing import beside, check_outputs, environment, spread, whole, write

TARGET, EXPERTS, SLOTS, TOKENS, HIDDEN = 2.0, 8, 16, 256, 16
WINDOW, SETTLED = 100, 200
SIZES, CENTRES, STARTS = (64, 384), ("random", "around a mean"), (8.0, 0.5)
GATES = ((4096, 384, 8), (4096, 768, 16), (8192, 256, 32), (2048, 1024, 16))  # T, D, E

Law = Callable[[Tensor, float], None]  # (shift [1], mean k of the step), moves the shift


def integral(gain: float) -> Callable[[MoELayer], Law]:
    """Adds gain * log(mean k / target)."""

    def move(shift: Tensor, mean_k: float) -> None:
        shift += gain * torch.tensor(max(mean_k, 0.01) / TARGET).log()

    return lambda _: move


def sign(_: MoELayer) -> Law:
    """A step in the direction of the error; its length adapts."""
    length, last = 0.01, 0.0

    def move(shift: Tensor, mean_k: float) -> None:
        nonlocal length, last
        way = float(mean_k > TARGET) - float(mean_k < TARGET)
        length = min(0.1, max(1e-4, length * (1.2 if way == last else 0.5)))
        last = way
        shift += way * length

    return move


def quantile(layer: MoELayer) -> Law:
    """This package's law."""
    budgets = Budgets(layer)
    return lambda *_: budgets.step()


LAWS: dict[str, Callable[[MoELayer], Law]] = {
    "integral, 0.01": integral(0.01),
    "integral, 0.003": integral(0.003),
    "sign": sign,
    "quantile": quantile,
}


def worst_error(make_law: Callable[[MoELayer], Law], D: int, centre: str, start: float, steps: int) -> float:
    """The worst relative error of a window in one seeded training; see the head of this file."""
    generator = torch.Generator().manual_seed(0)
    experts = {"num_experts_per_device": EXPERTS, "hidden_size_per_expert": HIDDEN}
    gate_type = {"type": "top_any", "max_expert_num": SLOTS, "budget": {"target_k": TARGET}}
    layer = MoELayer(gate_type, D, experts, seeds=(1, 2))
    gate, map_DD = layer.gates[0], torch.randn(D, D, generator=generator) / D**0.5
    centre_D = 3 * torch.randn(D, generator=generator) if centre == "around a mean" else torch.zeros(D)
    x_TD = torch.randn(TOKENS, D, generator=generator) + centre_D
    with torch.no_grad():  # so that the first tokens have `start` experts
        cos = gate.margins(x_TD)[:, :EXPERTS].flatten().sort(descending=True).values
        gate.gates.fill_(float(cos[int(start * TOKENS) - 1]) - 1e-6)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    controller = ExpertController(layer, optimizer, schedule=100)
    controller._budgets = Budgets(torch.nn.Module())  # the law moves the shift instead
    law, means = make_law(layer), []
    handle = gate.register_forward_hook(lambda *call: means.append(float(call[2].num_assignments) / TOKENS))
    for _ in range(steps):
        optimizer.zero_grad()
        y_TD = layer(x_TD)
        ((y_TD - x_TD @ map_DD).square().mean() + 0.1 * y_TD.l_aux).backward()
        optimizer.step()
        with torch.no_grad():
            law(gate.budget_shift, means[-1])
        controller.step()
        x_TD = torch.randn(TOKENS, D, generator=generator) + centre_D
    handle.remove()
    windows = torch.tensor(means[min(SETTLED, steps - WINDOW) :]).unfold(0, WINDOW, 1).mean(dim=1)
    return float((windows / TARGET - 1).abs().max())


def compare_laws(steps: int) -> list[dict[str, Any]]:
    """The worst error of each law in each setting."""
    settings = [(D, centre, start) for D in SIZES for centre in CENTRES for start in STARTS]
    results = []
    for D, centre, start in settings:
        errors = {name: worst_error(law, D, centre, start, steps) for name, law in LAWS.items()}
        results.append({"D": D, "tokens": centre, "start_k": start, "worst_error": errors})
    return results


def time_gate(T: int, D: int, E: int, repeats: int) -> dict[str, Any]:
    """The times of the gate with each budget over those without, and without one the microseconds; with quartiles."""
    generator = torch.Generator().manual_seed(0)
    x_TD, w_DE = torch.randn(T, D, generator=generator), torch.randn(D, E, generator=generator)
    cos = (F.normalize(x_TD, dim=1) @ F.normalize(w_DE, dim=0)).flatten()
    G = float(cos.kthvalue(int(T * E * (1 - TARGET / E))).values)
    shift, fixed = torch.tensor([0.02]), (torch.ones(E, dtype=torch.bool), torch.ones(()), False)

    def gate(G: float, *budget: Any) -> Callable[[], Any]:
        threshold_E = torch.full((E,), G)
        return lambda: threshold_gate(x_TD, w_DE, threshold_E, *fixed, *budget)

    calls = {
        "none": gate(G),
        "none again": gate(G),
        "target": gate(G - 0.02, None, shift),
        "target, cap of 4": gate(G - 0.02, None, shift, 4),
        "cap of 2": gate(G, None, None, 2),
    }
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(calls), len(calls)):
            started = clock()
            calls[name]()
            times[name].append(clock() - started)
    none = times.pop("none")
    ratios = {name: [t / n for t, n in zip(found, none, strict=True)] for name, found in times.items()}
    microseconds = spread([1e6 * t for t in none])
    return {
        "T": T, "D": D, "E": E, "microseconds": microseconds, "over_none": {n: spread(r) for n, r in ratios.items()},
    }  # fmt: skip


def table(summary: dict[str, Any]) -> str:
    """The results as Markdown, below the command."""
    lines = [f"`{summary['command']}`"]
    if summary["laws"]:
        lines += ["", f"| D | tokens | k at start | {' | '.join(LAWS)} |", "|---" * (3 + len(LAWS)) + "|"]
    for r in summary["laws"]:
        errors = " | ".join(f"{error:.3f}" for error in r["worst_error"].values())
        lines.append(f"| {r['D']} | {r['tokens']} | {r['start_k']:g} | {errors} |")
    if summary["gate"]:
        names = list(summary["gate"][0]["over_none"])
        lines += ["", f"| T, D, E | us without | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for r in summary["gate"]:
        ratios = " | ".join(
            f"{ratio['median']:.2f} ({ratio['quartile_1']:.2f} to {ratio['quartile_3']:.2f})"
            for ratio in r["over_none"].values()
        )
        lines.append(f"| {r['T']}, {r['D']}, {r['E']} | {r['microseconds']['median']:.0f} | {ratios} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=["laws", "gate"], default=["laws", "gate"])
    parser.add_argument("--steps", type=whole(WINDOW), default=400, help="of each training")
    parser.add_argument("--repeats", type=whole(1), default=300, help="of each gate")
    parser.add_argument("--threads", type=whole(1, os.cpu_count()))
    parser.add_argument("--out", type=Path, help="JSON file; the tables go beside it")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.out:
        check_outputs(parser, "--out", beside(args.out, ".md"))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    summary: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.budget", *argv]),
        "environment": environment(torch.device("cpu")) | {"load": os.getloadavg()[0], "processors": os.cpu_count()},
        "laws": compare_laws(args.steps) if "laws" in args.part else [],
        "gate": [time_gate(*shape, args.repeats) for shape in GATES] if "gate" in args.part else [],
    }
    print(table(summary))
    if args.out:
        write(args.out, summary, table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
