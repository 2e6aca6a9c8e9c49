"""The whole layer against the bare expert GEMMs and against a plain torch loop, interleaved in one process.

    python -m benchmarks.layer [--dtype float32 bfloat16] [--shape 0 1 2 3] [--repeats 15] [--out FILE.json]
    python -m benchmarks.layer --peers [--shape 0 1 2 3] [--repeats 15] [--out FILE.json]

* ours:  `MoELayer` with a top-any gate: gate, index, dispatch, experts, combine, auxiliary loss; with the backward, the
         gradients of the tokens, the router and every expert.
* bare:  only the GEMMs of the experts (2 forward, 4 backward) on contiguous rows, gathered beforehand; no bias, no
         activation. For bf16, native or fp32 GEMMs on the same bf16 operands, whichever is faster on this machine.
* loop:  the same gate in torch operations, then `nonzero`, a dense FFN and `index_add` for each expert, by autograd;
         not timed in a half precision that the processor cannot multiply.

With `--peers`, ours against the experts of other packages instead, in fp32: see `benchmarks.layer_peers`.

Router columns are orthonormal, and each threshold is the quantile of its cosines that gives the stated mean k.
Ratios are medians of the repeats' ratios: contestants run in turn, so machine drift cancels.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe_tutel import MoELayer

from . import layer_gpu, layer_peers
from .common.shapes import CPU_SHAPES, Shape
from .common.tensors import difference
from .common.timing import beside, check_outputs, duration, in_turn, ratio, unable, whole, write

SHAPES = CPU_SHAPES


class Case:
    """One shape and dtype: a layer, tokens, and an upstream gradient, all seeded."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0, biases: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.dtype = shape, dtype
        self.layer = MoELayer(
            gate_type={"type": "top_any"},
            experts={
                "num_experts_per_device": shape.E,
                "hidden_size_per_expert": shape.H,
                "activation_fn": F.gelu,
                "has_fc1_bias": biases,
                "has_fc2_bias": biases,
            },
            model_dim=shape.D,
            seeds=(seed, seed),
        )
        self.x_TD = torch.randn(shape.T, shape.D, generator=generator).to(dtype).requires_grad_()
        self.d_y_TD = torch.randn(shape.T, shape.D, generator=generator).to(dtype)
        self.layer.to(dtype)
        gate = self.layer.gates[0]
        with torch.no_grad():
            w_DE = gate.sim_matrix.float()
            cos_TE = F.normalize(self.x_TD.float(), dim=1) @ F.normalize(w_DE, dim=0)
            gate.gates.copy_(cos_TE.quantile(1 - shape.k / shape.E, dim=0))
            self.routing = self.layer.route(self.x_TD)

    def parameters(self) -> list[Tensor]:
        """The tensors that get gradients."""
        return [self.x_TD, *self.layer.parameters()]

    def ours(self, backward: bool) -> None:
        """The layer as a user calls it."""
        if not backward:
            with torch.no_grad():
                self.layer(self.x_TD)
            return
        y_TD = self.layer(self.x_TD)
        torch.autograd.grad((y_TD, y_TD.l_aux), self.parameters(), (self.d_y_TD, torch.tensor(0.01)))

    def margins(self) -> Tensor:
        """Score minus threshold [T, E] by torch operations in fp32."""
        gate = self.layer.gates[0]
        score_TE = torch.sigmoid(F.normalize(self.x_TD.float(), dim=1) @ F.normalize(gate.sim_matrix.float(), dim=0))
        return score_TE - torch.sigmoid(gate.gates.float())

    @staticmethod
    def weights(margin_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Which token takes which expert, and weights 1 / k or 0 with the straight-through gradient; both [T, E]."""
        passed_TE = margin_TE > 0
        weight_TE = (1 + (margin_TE - margin_TE.detach())) * passed_TE
        return passed_TE, weight_TE / passed_TE.sum(dim=1, keepdim=True).clamp(min=1)

    def loop_forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """A hand-written mixture of experts that computes the layer's function; experts in `dtype`, if given."""
        experts, dtype = self.layer.experts, dtype or self.dtype
        w1, w2 = experts.batched_fc1_w.to(dtype), experts.batched_fc2_w.to(dtype)
        b1, b2 = (None if b is None else b.to(dtype) for b in (experts.batched_fc1_bias, experts.batched_fc2_bias))
        x_TD = self.x_TD.to(dtype)
        passed_TE, weight_TE = self.weights(self.margins())
        y_TD = torch.zeros_like(x_TD)
        for e in range(self.shape.E):
            token_N = passed_TE[:, e].nonzero().squeeze(1)
            h = F.linear(x_TD[token_N], w1[e], None if b1 is None else b1[e])
            row = F.gelu(h) @ w2[e]
            row = row if b2 is None else row + b2[e]
            y_TD = y_TD.index_add(0, token_N, row * weight_TE[token_N, e].unsqueeze(1).to(dtype))
        return y_TD

    def loop(self, backward: bool) -> None:
        """The loop, with autograd's backward."""
        if not backward:
            with torch.no_grad():
                self.loop_forward()
            return
        torch.autograd.grad(self.loop_forward(), self.parameters(), self.d_y_TD)

    def prepare_bare(self) -> None:
        """Contiguous rows for the bare GEMMs, and the faster GEMM for the dtype."""
        rows_AD = self.routing.dispatch(self.x_TD.detach())
        d_rows_AD = self.routing.dispatch(self.d_y_TD)
        offsets = self.routing.expert_offsets.tolist()
        experts = self.layer.experts
        self.segments = [
            (rows_AD[a:b].clone(), d_rows_AD[a:b].clone(), w1.detach(), w2.detach())
            for (a, b), w1, w2 in zip(pairwise(offsets), experts.batched_fc1_w, experts.batched_fc2_w, strict=True)
        ]
        self.gemm: Callable[[Tensor, Tensor], Tensor] = torch.mm
        if self.dtype not in (torch.float32, torch.float64):
            x, _, w1, _ = self.segments[0]
            x = x[:128]  # without native instructions, all rows would take minutes
            runs = [[_seconds(partial(mm, x, w1.t())) for _ in range(3)] for mm in (torch.mm, _fp32_mm)]
            self.gemm = torch.mm if min(runs[0]) < min(runs[1]) else _fp32_mm

    def bare(self, backward: bool) -> None:
        """The experts' GEMMs on contiguous rows; keeps the tensors that a real pass would keep."""
        mm, kept = self.gemm, []
        for x, _, w1, w2 in self.segments:
            h = mm(x, w1.t())
            kept += [h, mm(h, w2)]
        if not backward:
            return
        for (x, d_row, w1, w2), h in zip(self.segments, kept[::2], strict=True):
            d_h = mm(d_row, w2.t())
            kept += [mm(h.t(), d_row), mm(d_h, w1), mm(d_h.t(), x)]


def _fp32_mm(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Check that ours and the loop agree, then time all three in turn; one result per pass."""
    with torch.no_grad():
        error = difference(case.layer(case.x_TD), case.loop_forward(torch.float32))
    limit = 1e-5 if case.dtype == torch.float32 else 1e-2
    if not error < limit:
        raise RuntimeError(f"{case.shape}: ours and the loop differ by {error:.1e}")
    case.prepare_bare()
    results = []
    for backward in (False, True):
        contestants = {"bare": case.bare, "ours": case.ours}
        if case.gemm is torch.mm:  # without native half precision the loop takes minutes
            contestants["loop"] = case.loop
        times = in_turn({name: partial(run, backward) for name, run in contestants.items()}, repeats)
        loop = times.get("loop")
        results.append(
            {
                "shape": asdict(case.shape),
                "dtype": str(case.dtype).removeprefix("torch."),
                "pass": "forward+backward" if backward else "forward",
                "mean_k": float(case.routing.k_per_token.float().mean()),
                "bare_gemm": "fp32 on bf16 operands" if case.gemm is _fp32_mm else "native",
                "milliseconds": {n: 1e3 * statistics.median(t) for n, t in times.items()},
                "ours_over_bare": ratio(times["ours"], times["bare"]),
                "loop_over_bare": ratio(loop, times["bare"]) if loop else None,
                "loop_over_ours": ratio(loop, times["ours"]) if loop else None,
                "relative_rms_to_loop": error,
            }
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Results as a Markdown table of ratios."""
    head = "| shape | dtype | pass | mean k | ours / bare | quartiles | loop / bare | loop / ours |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for r in results:
        ours = r["ours_over_bare"]
        loop = [f"{r[n]['median']:.2f}" if r[n] else "-" for n in ("loop_over_bare", "loop_over_ours")]
        lines.append(
            f"| {Shape(**r['shape'])} | {r['dtype']} | {r['pass']} | {r['mean_k']:.2f} | **{ours['median']:.2f}** "
            f"| {ours['quartile_1']:.2f} to {ours['quartile_3']:.2f} | {loop[0]} | {loop[1]} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32 bfloat16, on cuda bfloat16",
    )
    parser.add_argument(
        "--shape", nargs="+", type=whole(0, len(SHAPES) - 1), help="on cpu: indices of SHAPES, default: all"
    )
    parser.add_argument("--repeats", type=whole(1), default=15)
    parser.add_argument("--threads", type=whole(1, os.cpu_count()), help="on cpu")
    parser.add_argument("--peers", action="store_true", help="on cpu: time other packages' experts, in float32")
    parser.add_argument("--out", type=Path, help="JSON file for the results and the environment")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="on cuda: see benchmarks.layer_gpu")
    parser.add_argument("--seconds", type=duration(), help="on cuda: start no shape after this time")
    parser.add_argument("--resume", action="store_true", help="on cuda: go on with --out where a run before broke off")
    args = parser.parse_args(argv)
    only = {"shape": "cpu", "threads": "cpu", "peers": "cpu", "seconds": "cuda", "resume": "cuda"}
    for name, device in only.items():
        if getattr(args, name) not in (None, False) and args.device != device:
            parser.error(f"argument --{name}: came with --device {args.device}, allowed: with --device {device}")
    if args.peers and args.dtype not in (None, ["float32"]):
        parser.error(f"argument --dtype: came {args.dtype} with --peers, allowed: float32")
    cuda = args.device == "cuda"
    why = unable("cuda", triton=False) if cuda else None
    if why is not None:
        parser.error(f"argument --device: came 'cuda': {why}, allowed here: cpu")
    if args.out:
        check_outputs(parser, "--out", beside(args.out, ".md") if cuda else [args.out])
    if cuda:
        limit = math.inf if args.seconds is None else args.seconds
        return layer_gpu.run(
            torch.device("cuda"), args.dtype or ["bfloat16"], limit, args.repeats, args.out, args.resume
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        **(layer_peers.versions() if args.peers else {}),
    }
    show = layer_peers.table if args.peers else table
    results = []
    for name in ["float32"] if args.peers else args.dtype or ["float32", "bfloat16"]:
        for index in range(len(SHAPES)) if args.shape is None else args.shape:
            case = Case(SHAPES[index], getattr(torch, name), biases=not args.peers)
            found = (layer_peers.measure if args.peers else measure)(case, args.repeats)
            print(show(found).split("\n", 2)[2], flush=True)
            results += found
            if args.out:
                write(args.out, {"environment": environment, "results": results})
    print("\n" + show(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
