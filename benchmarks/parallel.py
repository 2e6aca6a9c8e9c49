"""The cost of an exchange between experts on several processes: bytes on the wire, and ratios of time.

    python -m benchmarks.parallel [--processes 2 4] [--count 8] [--repeats 9] [--out FILE.json]

It runs three exchanges of the same routed tokens and checks them against the package's layer on one process (outputs,
gradients of tokens, router and experts). It counts their bytes in the calls of torch.distributed; these must equal the
cost model's whole numbers, or the command fails. Then it times them in turn; a time is the slowest rank's. `--count`
only counts, on as many processes. Last come the bytes that the model expects on 8, 64 and 512 ranks, and whether the
two limits on bytes hold. Processes talk over Gloo on one machine, so the ratios of times say nothing about a network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from dynmoe_tutel import MoELayer
from dynmoe_tutel.experts.ffn import FFNExperts

from .common.shapes import Shape
from .common.timing import beside, check_outputs, environment, spread, whole, write
from .exchange import report as parallel_report
from .exchange.cost_model import EXCHANGES, Format, demand, traffic
from .exchange.exchanges import RUN, WireCounter
from .exchange.token_choices import Choice, fixed, skewed_loads, tokens_of

SHAPE = Shape(512, 256, 128, 64, 6)  # T per rank
RESULTS = Path(__file__).parent / "results" / "parallel" / "cpu.json"
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Law:
    """Mean k, max over mean load, and whether every token takes exactly k experts."""

    k: int
    skew: float
    fixed_k: bool = False

    def choice(self, num_experts: int) -> Choice:
        load_E = skewed_loads(num_experts, self.k, self.skew)
        return Choice.of_loads(load_E, fixed(self.k) if self.fixed_k else None)


LAWS = [Law(k, skew) for skew in (1.0, 2.0) for k in range(1, 7)] + [Law(6, 1.0, True)]


class Case:
    """One rank's tokens of a law, and its block of a layer's experts; every rank draws the same layer."""

    def __init__(self, shape: Shape, law: Law, seed: int = 0) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.shape, self.law = shape, law
        config = {"num_experts_per_device": shape.E, "hidden_size_per_expert": shape.H, "activation_fn": F.gelu}
        self.layer = MoELayer(gate_type={"type": "top_any"}, experts=config, model_dim=shape.D, seeds=(seed, seed))
        self.gate = self.layer.gates[0]
        self.own = slice(self.rank * shape.E // self.ranks, (self.rank + 1) * shape.E // self.ranks)
        self.experts = FFNExperts(shape.D, shape.E // self.ranks, hidden_size_per_expert=shape.H, activation_fn=F.gelu)
        with torch.no_grad():
            for mine, all_slots in zip(self.experts.parameters(), self.layer.experts.parameters(), strict=True):
                mine.copy_(all_slots[self.own])
        # every rank draws the tokens of all ranks: the model needs every rank's routing
        generator = torch.Generator().manual_seed(seed + 1)
        choice = law.choice(shape.E)
        self.assigned = [choice.sample(shape.T, generator) for _ in range(self.ranks)]
        generator.manual_seed(seed + 2 + self.rank)
        x_TD = tokens_of(self.assigned[self.rank], self.gate.sim_matrix.detach(), generator)
        self.x_TD, self.d_y_TD = x_TD.requires_grad_(), torch.randn(x_TD.shape, generator=generator)

    def run(self, exchange: str, backward: bool) -> list[Tensor]:
        """The output, and with the backward the gradients of tokens, router and this rank's experts."""
        if not backward:
            with torch.no_grad():
                return [RUN[exchange](self.gate, self.experts, self.x_TD)]
        y_TD = RUN[exchange](self.gate, self.experts, self.x_TD)
        of = [self.x_TD, *self.gate.parameters(), *self.experts.parameters()]
        return [y_TD.detach(), *torch.autograd.grad(y_TD, of, self.d_y_TD)]

    def expected(self) -> list[Tensor]:
        """The same from the layer that holds all experts; its expert gradients sum over the ranks' tokens."""
        y_TD = self.layer(self.x_TD)
        experts = list(self.layer.experts.parameters())
        of = [self.x_TD, *self.gate.parameters(), *experts]
        found = list(torch.autograd.grad(y_TD, of, self.d_y_TD))
        for i in range(len(of) - len(experts), len(of)):
            dist.all_reduce(found[i])
            found[i] = found[i][self.own]
        return [y_TD.detach(), *found]

    def check(self, limit: float = 1e-5) -> float:
        """The largest relative error of an exchange; raises RuntimeError above `limit`."""
        expected, worst = self.expected(), 0.0
        if not torch.equal(self.layer.route(self.x_TD).assigned, self.assigned[self.rank]):
            raise RuntimeError(f"{self.law}: the gate routes otherwise than the law's sample")
        for exchange in EXCHANGES:
            for value, reference in zip(self.run(exchange, True), expected, strict=True):
                error = float((value - reference).norm() / reference.norm().clamp(min=1e-30))
                worst = max(worst, error)
                if not error < limit:
                    raise RuntimeError(f"{self.law}, {exchange}: {error:.1e} away from the layer on one process")
        return worst

    def counted(self, exchange: str, backward: bool) -> Tensor:
        """Bytes [R, R] that went from rank to rank."""
        with WireCounter() as counter:
            self.run(exchange, backward)
        all_RR = [torch.empty_like(counter.bytes_R) for _ in range(self.ranks)]
        dist.all_gather(all_RR, counter.bytes_R)
        return torch.stack(all_RR)

    def bytes(self) -> dict[str, dict[str, int]]:
        """Bytes of all ranks by pass and exchange; raises RuntimeError if count and model differ for any two ranks."""
        format_ = Format(self.shape.D, self.x_TD.element_size())
        found: dict[str, dict[str, int]] = {}
        for name, backward in zip(PASSES, (False, True), strict=True):
            found[name] = {}
            for exchange in EXCHANGES:
                counted_RR = self.counted(exchange, backward)
                model_RR = traffic(exchange, demand(self.assigned), format_, backward)
                if not torch.equal(counted_RR, model_RR):
                    raise RuntimeError(
                        f"{self.law}, {exchange}, {name}: counted {counted_RR.tolist()}, model {model_RR.tolist()}"
                    )
                found[name][exchange] = int(counted_RR.sum())
        return found

    def seconds(self, exchange: str, backward: bool) -> float:
        """Seconds of the slowest rank."""
        dist.barrier()
        start = time.perf_counter()
        self.run(exchange, backward)
        elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        return float(elapsed)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Errors, bytes, and each exchange's times over ours, repeat by repeat."""
    result: dict[str, Any] = {
        "processes": case.ranks,
        **asdict(case.law),
        "shape": asdict(case.shape),
        "mean_k": statistics.fmean(float(a.sum()) / len(a) for a in case.assigned),
        "max_over_mean_load": float(max(a.sum(0).max() for a in case.assigned))
        / statistics.fmean(float(a.sum()) / a.shape[1] for a in case.assigned),
        "worst_relative_error": case.check(),
        "bytes": case.bytes(),
        "ours_over": {},
    }
    for name, backward in zip(PASSES, (False, True), strict=True):
        times: dict[str, list[float]] = {exchange: [] for exchange in EXCHANGES}
        for repeat in range(repeats + 2 if repeats else 0):
            for exchange in EXCHANGES:
                elapsed = case.seconds(exchange, backward)
                if repeat >= 2:
                    times[exchange].append(elapsed)
        if repeats:
            ours, *others = EXCHANGES
            result["ours_over"][name] = {
                other: spread([a / b for a, b in zip(times[ours], times[other], strict=True)]) for other in others
            }
    return result


def _process(rank: int, ranks: int, folder: str, shape: Shape, laws: Sequence[Law], repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    results = [measure(Case(shape, law), repeats) for law in laws]
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def on_processes(ranks: int, shape: Shape, laws: Sequence[Law], repeats: int) -> list[dict[str, Any]]:
    """One result per law, from `ranks` new processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (ranks, folder, shape, laws, repeats), ranks)
        return json.loads((Path(folder) / "results.json").read_text())


def main(argv: Sequence[str] | None = None, shape: Shape = SHAPE, laws: Sequence[Law] = tuple(LAWS)) -> int:
    """Command line; returns 1 if a limit on the bytes does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number: Callable[[str], int] = whole(2, 64)
    parser.add_argument("--processes", nargs="*", type=number, default=[2, 4], help="counted and timed")
    parser.add_argument("--count", nargs="*", type=number, default=[8], help="counted only")
    parser.add_argument("--repeats", type=whole(1), default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON; a table .md and a plot .png beside it")
    args = parser.parse_args(argv)
    for ranks in (*args.processes, *args.count):
        if shape.E % ranks:
            parser.error(f"came {ranks} processes, allowed: a divisor of the {shape.E} experts")
    check_outputs(parser, "--out", beside(args.out, ".md", ".png"))
    results = []
    for ranks in args.processes:
        results += on_processes(ranks, shape, laws, args.repeats)
    for ranks in args.count:
        results += on_processes(ranks, shape, laws, 0)
    options = " ".join(sys.argv[1:] if argv is None else argv).replace(str(args.out), args.out.name)
    command = f"python -m benchmarks.parallel {options}".strip()
    machine = environment(torch.device("cpu")) | {"backend": "gloo", "threads": 1}
    return report(args.out, results, shape, {"command": command, "environment": machine})


def report(out: Path, results: list[dict[str, Any]], shape: Shape, run: dict[str, Any]) -> int:
    """Print and write the report; return 1 if a limit on the bytes does not hold."""
    model = parallel_report.extrapolate()
    limits = parallel_report.limits(results, shape)
    text = parallel_report.table(results, model, limits)
    print(text)
    found = {
        **run,
        "limits": limits,
        "results": results,
        "model": model,
    }
    write(out, found, text)
    out.with_suffix(".png").write_bytes(parallel_report.plot(results))
    return 0 if all(limit["holds"] for limit in limits) else 1


if __name__ == "__main__":
    sys.exit(main())
