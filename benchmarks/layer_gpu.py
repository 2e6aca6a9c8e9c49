"""The whole layer on a GPU against the bare products and other ways to compute the same; run by `benchmarks.layer`.

* ours:        `MoELayer` forward and backward: exact, bounded (1.25 of the mean k) and full capacity; the last two also
               as a CUDA graph. Engine "grouped_mm" is ours with torch's grouped product.
* bare:        the products of the experts alone by cuBLAS on contiguous rows, all experts' rows at once.
* dense:       a dense MLP on A rows, as many FLOPs as the layer: what an eager Linear, activation, Linear costs.
* loop:        the layer on the torch engine, a loop over the experts that asks the device for their sizes.
* peers:       every one that is installed, and ours beside them, on a fixed-k routing of the same rows that is given
               to them; eager, since some wait for the device. See `benchmarks.peers`.

Ratios are bare / contestant, from the same run; times are medians in milliseconds and are of the GPU that is named.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe_tutel import MoELayer

from . import peers
from .shapes import GPU_SHAPES, Shape
from .timing import bounds, environment, seconds, spread, write


class Case:
    """A layer of one shape with the mean k that the shape names, tokens, and an output gradient."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        generator = torch.Generator().manual_seed(0)
        self.x_TD = torch.randn(shape.T, shape.D, generator=generator).to(device, dtype).requires_grad_()
        self.d_y_TD = torch.randn(shape.T, shape.D, generator=generator).to(device, dtype)
        self.layer = self.make("exact", "auto")
        gate = self.layer.gates[0]
        with torch.no_grad():
            x = self.x_TD[:4096].float()
            cos_TE = F.normalize(x, dim=1) @ F.normalize(gate.sim_matrix.float(), dim=0)
            gate.gates.copy_(cos_TE.quantile(1 - shape.k / shape.E, dim=0))
            self.rows = int(self.layer.route(self.x_TD).num_assignments)

    def make(self, capacity: Any, engine: str) -> MoELayer:
        """A layer with the weights of the first."""
        s = self.shape
        experts = {"num_experts_per_device": s.E, "hidden_size_per_expert": s.H, "engine": engine}
        kind = {"type": "llama_ffn", "activation_fn": F.silu} if s.gated else {"type": "ffn", "activation_fn": F.gelu}
        layer = MoELayer({"type": "top_any"}, s.D, experts | kind, seeds=(0, 0), capacity=capacity)
        layer.to(self.device, self.dtype)
        if hasattr(self, "layer"):
            layer.load_state_dict(self.layer.state_dict())
        return layer

    def step(self, layer: nn.Module) -> Callable[[], Any]:
        """Forward and backward with gradients of tokens and all parameters."""
        parameters = [self.x_TD, *layer.parameters()]
        one = torch.ones((), device=self.device)

        def run() -> Any:
            y_TD = layer(self.x_TD)
            return torch.autograd.grad((y_TD, y_TD.l_aux), parameters, (self.d_y_TD, one))

        return run

    def bare(self) -> Callable[[], Any]:
        """The forward and backward products on contiguous rows of one large matrix."""
        s, g = self.shape, 2 if self.shape.gated else 1

        def draw(*size: int) -> Tensor:
            return torch.randn(size, device=self.device).to(self.dtype)

        x, h, a, d_row = draw(self.rows, s.D), draw(self.rows, g * s.H), draw(self.rows, s.H), draw(self.rows, s.D)
        w1, w2 = draw(s.D, g * s.H), draw(s.H, s.D)

        def run() -> None:
            torch.mm(x, w1)
            torch.mm(a, w2)
            torch.mm(d_row, w2.t())
            torch.mm(a.t(), d_row)
            torch.mm(h, w1.t())
            torch.mm(x.t(), h)

        return run

    def dense(self) -> Callable[[], Any]:
        """A dense MLP on A rows."""
        s = self.shape
        x = torch.randn(self.rows, s.D, device=self.device).to(self.dtype).requires_grad_()
        d_y = torch.randn(self.rows, s.D, device=self.device).to(self.dtype)
        up, down = (nn.Linear(*size, device=self.device, dtype=self.dtype) for size in ((s.D, s.H), (s.H, s.D)))
        gate = nn.Linear(s.D, s.H, device=self.device, dtype=self.dtype) if s.gated else None
        parameters = [x, *up.parameters(), *down.parameters(), *(gate.parameters() if gate else ())]

        def run() -> Any:
            hidden = F.silu(up(x)) * gate(x) if gate else F.gelu(up(x))
            return torch.autograd.grad(down(hidden), parameters, d_y)

        return run

    def saved_share(self) -> float:
        """Bytes kept for the backward over those of x, the pre-activations and 8 A of index."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y_TD = self.layer(self.x_TD)
        for parameter in self.layer.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        del y_TD
        n, s = self.x_TD.element_size(), self.shape
        pre = n * self.rows * s.H * (2 if s.gated else 1)
        return sum(kept.values()) / (n * s.T * s.D + pre + 8 * self.rows)


def contestants(case: Case) -> dict[str, tuple[Callable[[], Any], bool]]:
    """By name: what is timed, and whether as a CUDA graph."""
    bounded = case.make(1.25 * case.shape.k, "auto")
    full = case.make("full", "auto")
    found: dict[str, tuple[Callable[[], Any], bool]] = {
        "bare": (case.bare(), True),
        "ours, exact": (case.step(case.layer), False),
        "ours, bounded": (case.step(bounded), False),
        "ours, bounded, graph": (case.step(bounded), True),
        "ours, full": (case.step(full), False),
        "ours, full, graph": (case.step(full), True),
        "grouped_mm": (case.step(case.make("exact", "grouped_mm")), False),
        "loop": (case.step(case.make("exact", "torch")), False),
        "dense": (case.dense(), True),
    }
    return found


def check(case: Case) -> float:
    """Relative RMS of our output to the torch engine's; RuntimeError where it is large."""
    with torch.no_grad():
        ours, loop = case.layer(case.x_TD).double(), case.make("exact", "torch")(case.x_TD).double()
    error = float((ours - loop).norm() / loop.norm())
    if not error < (1e-2 if case.dtype != torch.float32 else 1e-5):
        raise RuntimeError(f"{case.shape}: ours and the loop differ by {error:.1e}")
    return error


def measure(shape: Shape, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, Any]:
    """All contestants on one shape; one that cannot run is named with its reason."""
    case = Case(shape, dtype, device)
    result: dict[str, Any] = {"shape": asdict(shape), "dtype": str(dtype).removeprefix("torch."), "rows": case.rows}
    result["relative_rms_to_loop"] = check(case)
    result["saved_over_bound"] = case.saved_share()
    times, skipped, memory = {}, {}, {}
    for name, (run, graph) in contestants(case).items():
        try:
            before = _fresh_peak(device)
            times[name] = seconds([run], device, repeats, graph)
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated(device) - before
        except (RuntimeError, ValueError) as error:  # out of memory, or an engine that does not take this type
            skipped[name] = str(error).splitlines()[0]
    result["skipped"] = skipped
    result["milliseconds"] = {name: spread([1e3 * t for t in values]) for name, values in times.items()}
    result["peak_bytes"] = memory
    bare = statistics.median(times["bare"])
    result["bare_over"] = {name: bare / statistics.median(values) for name, values in times.items()}
    del case
    result["peers"] = measure_peers(shape, dtype, device, repeats)
    return result


def _fresh_peak(device: torch.device) -> int:
    """Bytes allocated now, from which on the peak is counted."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def measure_peers(shape: Shape, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, dict[str, Any]]:
    """By name: milliseconds, ours over it and peak bytes, or why it is not measured."""
    case = peers.PeerCase(shape, dtype, device)
    found: dict[str, dict[str, Any]] = {}
    for name in ("ours", *peers.ADAPTERS):
        why = None if name == "ours" else peers.unavailable(name, case)
        if why is not None:
            found[name] = {"skipped": why}
            continue
        try:
            peer = peers.ours(case) if name == "ours" else peers.build(name, case)
            error = peers.checked(peer, case)
            before = _fresh_peak(device)
            times = seconds([peers.step(peer, case)], device, repeats, False)
        except Exception as error:  # whatever another package throws is why it is not measured
            if name == "ours":
                raise
            found[name] = {"skipped": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
            continue
        peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
        found[name] = {"milliseconds": spread([1e3 * t for t in times]), "peak_bytes": peak, "note": peer.note}
        found[name] |= {"k": case.k, "relative_rms": error}
    ours = found["ours"]["milliseconds"]["median"]
    for entry in found.values():
        if "milliseconds" in entry:
            entry["it_over_ours"] = entry["milliseconds"]["median"] / ours
    return found


def _captured_step(case: Case, repeats: int) -> float:
    """Seconds of a step as a CUDA graph with room for every assignment, so that the host plays no part."""
    return statistics.median(seconds([case.step(case.make("full", "auto"))], case.device, repeats, True))


def affine(dtype: torch.dtype, device: torch.device, shape: Shape, repeats: int) -> dict[str, Any]:
    """Time against the number of assignments, and the fit's R2; and with one token that takes every expert."""
    rows, times = [], []
    for k in (0.5, 1, 2, 3, 4):
        case = Case(Shape(shape.T, shape.D, shape.H, shape.E, k, shape.gated), dtype, device)
        rows.append(case.rows)
        times.append(_captured_step(case, repeats))
    mean_r, mean_t = statistics.mean(rows), statistics.mean(times)
    slope = sum((r - mean_r) * (t - mean_t) for r, t in zip(rows, times, strict=True)) / sum(
        (r - mean_r) ** 2 for r in rows
    )
    residual = sum((t - mean_t - slope * (r - mean_r)) ** 2 for r, t in zip(rows, times, strict=True))
    r2 = 1 - residual / sum((t - mean_t) ** 2 for t in times)
    case = Case(shape, dtype, device)
    before = _captured_step(case, repeats)
    with torch.no_grad():  # along the sum of the routing vectors, which are orthonormal, and above every threshold
        case.x_TD[0] = case.layer.gates[0].sim_matrix.sum(dim=1)
    after = _captured_step(case, repeats)
    return {"rows": rows, "seconds": times, "r2": r2, "one_token_with_every_expert": after / before}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as Markdown."""
    lines = ["| shape | contestant | ms | quartiles | bare / it | peak MiB |", "|---" * 6 + "|"]
    for r in results:
        for name, ms in r["milliseconds"].items():
            peak = r["peak_bytes"].get(name)
            lines.append(
                f"| {Shape(**r['shape'])}, {r['dtype']} | {name} | {ms['median']:.3f} "
                f"| {ms['quartile_1']:.3f} to {ms['quartile_3']:.3f} | **{r['bare_over'][name]:.2f}** "
                f"| {'-' if peak is None else f'{peak / 2**20:.0f}'} |"
            )
        for name, why in r["skipped"].items():
            lines.append(f"| {Shape(**r['shape'])}, {r['dtype']} | {name} | skipped: {why} | | | |")
        lines.append(f"| {Shape(**r['shape'])} | saved / (x + h + 8 A) | {r['saved_over_bound']:.3f} | | | |")
    lines += ["", "Peers, all on the same fixed-k routing, eager, forward and backward:", ""]
    lines += ["| shape | peer | k | ms | quartiles | it / ours | peak MiB |", "|---" * 7 + "|"]
    for r in results:
        for name, entry in r["peers"].items():
            head = f"| {Shape(**r['shape'])}, {r['dtype']} | {name}"
            if "skipped" in entry:
                lines.append(f"{head} | | skipped: {entry['skipped']} | | | |")
                continue
            ms, peak = entry["milliseconds"], entry["peak_bytes"]
            lines.append(
                f"{head}{', ' + entry['note'] if entry['note'] else ''} | {entry['k']} | {ms['median']:.3f} "
                f"| {ms['quartile_1']:.3f} to {ms['quartile_3']:.3f} | **{entry['it_over_ours']:.2f}** "
                f"| {'-' if peak is None else f'{peak / 2**20:.0f}'} |"
            )
    return "\n".join(lines)


def run(device: torch.device, dtypes: Sequence[str], limit: float, repeats: int, out: Path | None) -> int:
    """Measure the shapes in order while time lasts, then the affine fit; print and write the table; exit status."""
    started, results = time.monotonic(), []
    rates = bounds(device, getattr(torch, dtypes[0]))
    for name in dtypes:
        for shape in GPU_SHAPES.values():
            if time.monotonic() - started > limit:
                print(f"skipped, no time is left: {shape}, {name}")
                continue
            results.append(measure(shape, getattr(torch, name), device, repeats))
            print(table(results[-1:]).split("\n", 2)[2], flush=True)
            torch.cuda.empty_cache()
    if not results:
        print(f"nothing is measured: --seconds {limit:g} went by before the first shape", file=sys.stderr)
        return 1
    fit = affine(getattr(torch, dtypes[0]), device, GPU_SHAPES["vit-s"], repeats)
    summary = {"environment": environment(device), "bounds": rates, "results": results, "affine": fit}
    text = table(results) + (
        f"\n\nTime against assignments (ViT-S): R2 {fit['r2']:.4f}; one token with every expert: "
        f"{fit['one_token_with_every_expert']:.3f} of the time without."
    )
    print("\n" + text)
    if out:
        write(out, summary, text)
    return 0
