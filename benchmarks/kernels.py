"""Each Triton kernel against what bounds it: the copy bandwidth or the matrix rate that the same run measures.

    python -m benchmarks.kernels [--device cuda] [--shape vit-s ...] [--dtype bfloat16] [--seconds N] [--out FILE.json]

Bytes count every input and output of a kernel once, FLOPs those of its products. A kernel is first compared with torch
on the same device; a difference ends the run. Times are of CUDA-graph replays over several sets of
inputs, so that they come from memory. Writes FILE.json, FILE.md and the roofline FILE.png. Without a GPU the kernels
run in Triton's interpreter on a tiny shape: that shows that this program works, and no time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .shapes import GPU_SHAPES, Shape
from .timing import beside, bounds, check_outputs, duration, environment, seconds, spread, unable, whole, write

TINY = Shape(40, 32, 48, 4, 1.5)
L2_BYTES = 128 << 20  # more than any cache on a GPU holds


@dataclass
class Kernel:
    """A kernel on one set of inputs: how to run it, what it moves and multiplies, and what it must equal."""

    name: str
    run: Callable[[], Any]
    bytes: int
    flops: int
    expected: Callable[[], Any] | None = None


class Inputs:
    """Tensors of one layer, routed with the mean k of its shape."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        from dynmoe_tutel import kernels

        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

        T, D, H, E = shape.T, shape.D, shape.H, shape.E
        self.shape, self.dtype = shape, dtype
        self.x_TD, self.d_y_TD = draw(T, D), draw(T, D)
        self.w_DE = draw(D, E)
        self.scale = torch.ones((), device=device)
        self.active_E = torch.ones(E, dtype=torch.bool, device=device)
        unit_DE = torch.nn.functional.normalize(self.w_DE.float(), dim=0)
        cos_TE = torch.nn.functional.normalize(self.x_TD[:4096].float(), dim=1) @ unit_DE
        self.thresholds_E = cos_TE.quantile(1 - shape.k / E, dim=0)
        self.score_TE, self.bits_TW, self.unrouted_T, self.inv_norm_T, self.counts = kernels.threshold_gate(
            self.x_TD, self.w_DE, self.thresholds_E, self.active_E, self.scale, False
        )
        exact = kernels.ragged_index(self.bits_TW, E)
        self.A = exact[2].shape[0]
        self.index = exact
        self.w1 = draw(E, D, H, scale=D**-0.5) if shape.gated else draw(E, H, D, scale=D**-0.5).transpose(1, 2)
        self.w3 = draw(E, D, H, scale=D**-0.5) if shape.gated else None
        self.b1, self.b2 = (None, None) if shape.gated else (draw(E, H), draw(E, D))
        self.w2 = draw(E, H, D, scale=H**-0.5)
        self.activation = "silu" if shape.gated else "gelu"
        self.rows_AD = draw(self.A, D)


class Loop:
    """The experts' products in torch, expert by expert, with sums in fp32."""

    def __init__(self, inputs: Inputs) -> None:
        offsets = inputs.index[0].tolist()
        self.segments = list(enumerate(map(slice, offsets[:-1], offsets[1:])))
        self.token_A = inputs.index[2].long()
        self.inputs = inputs

    def linear(self, rows_AK: Tensor, w_EKN: Tensor, bias_EN: Tensor | None = None) -> Tensor:
        """Rows [A, N] in fp32."""
        out = rows_AK.new_empty((rows_AK.shape[0], w_EKN.shape[2]), dtype=torch.float32)
        for e, rows in self.segments:
            out[rows] = rows_AK[rows].float() @ w_EKN[e].float()
            if bias_EN is not None:
                out[rows] += bias_EN[e].float()
        return out

    def up(self) -> tuple[Tensor, Tensor, Tensor]:
        """h, u and a, those before rounded to the dtype of the tokens."""
        from dynmoe_tutel.kernels import ACTIVATIONS

        i = self.inputs
        x = i.x_TD[self.token_A]
        h = self.linear(x, i.w1, i.b1).to(i.dtype)
        u = h[:0] if i.w3 is None else self.linear(x, i.w3).to(i.dtype)
        a = ACTIVATIONS[i.activation].value(h.float())
        return h, u, a if i.w3 is None else a * u.float()

    def activation_gradient(self, h: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of h and u, and a over k, as `activation_gradient` gives them."""
        from dynmoe_tutel.kernels import ACTIVATIONS

        i, act = self.inputs, ACTIVATIONS[self.inputs.activation]
        k_A1 = i.index[1].diff()[self.token_A].unsqueeze(1).float()
        d_a = self.linear(i.d_y_TD[self.token_A], i.w2.transpose(1, 2)) / k_A1
        act_h = act.value(h.float())
        if i.w3 is None:
            return act.gradient(d_a, h.float()), u, act_h / k_A1
        return act.gradient(d_a * u.float(), h.float()), d_a * act_h, act_h * u.float() / k_A1

    def weight_gradient(self, a_AM: Tensor, b_AN: Tensor) -> Tensor:
        """[E, M, N] in fp32."""
        return torch.stack([a_AM[rows].t().float() @ b_AN[rows].float() for _, rows in self.segments])


def kernels_of(inputs: Inputs) -> Iterator[Kernel]:
    """The kernels in forward, then backward order."""
    from dynmoe_tutel.kernels.gpu import grouped_ffn, ragged_index, router_gradient, rows, threshold_gate
    from dynmoe_tutel.kernels.rows import combine_backward

    from dynmoe_tutel import kernels

    i, s = inputs, inputs.shape
    T, D, H, E, A = s.T, s.D, s.H, s.E, inputs.A
    n, W, g = i.x_TD.element_size(), i.bits_TW.shape[1], 2 if s.gated else 1
    tokens, index_bytes, weight = n * T * D, 8 * A + 4 * (T + E), n * E * D * H
    index = grouped_ffn.Index(*i.index)
    gate = (i.x_TD, i.w_DE, i.thresholds_E, i.active_E, i.scale, False)
    yield Kernel(
        "gate",
        lambda: threshold_gate.threshold_gate(*gate)[:4],
        tokens + n * D * E + 4 * T * E + 8 * T * W + 5 * T,
        2 * T * D * E,
        lambda: kernels.threshold_gate._init_fn(*gate)[:4],
    )
    yield Kernel(
        "index (bounded)",
        lambda: ragged_index.ragged_index(i.bits_TW, E, A, i.counts),
        8 * T * W + index_bytes,
        0,
        lambda: kernels.ragged_index._init_fn(i.bits_TW, E, A),
    )
    yield Kernel(
        "bound (nothing to drop)",
        lambda: ragged_index.bound_assignments(i.bits_TW, i.score_TE, A),
        16 * T * W + 4 * A,
        0,
        lambda: kernels.bound_assignments._init_fn(i.bits_TW, i.score_TE, A),
    )
    fewer = A - A // 10
    yield Kernel(
        "bound (a tenth dropped)",
        lambda: ragged_index.bound_assignments(i.bits_TW, i.score_TE, fewer),
        16 * T * W + 4 * A,
        0,
        lambda: kernels.bound_assignments._init_fn(i.bits_TW, i.score_TE, fewer),
    )
    yield Kernel(
        "dispatch",
        lambda: rows.dispatch(i.x_TD, *i.index[1:]),
        tokens + n * A * D + 4 * A,
        0,
        lambda: kernels.dispatch._init_fn(i.x_TD, *i.index[1:]),
    )
    up = (i.x_TD, index, i.w1, i.b1, i.w3, None, i.activation, True, True)
    h, u, a = grouped_ffn.up(*up)
    u_or_none = u if s.gated else None
    loop = Loop(inputs)
    yield Kernel(
        "up",
        lambda: grouped_ffn.up(*up),
        tokens + g * weight + n * (g + 1) * A * H,
        2 * g * A * D * H,
        loop.up,
    )
    down = {"bias_EN": i.b2}
    yield Kernel(
        "down",
        lambda: grouped_ffn.linear(a, i.w2, i.index[0], **down),
        n * A * (H + D) + weight,
        2 * A * D * H,
        lambda: kernels.grouped_linear._init_fn(a, i.index[0], i.w2, i.b2, "torch"),
    )
    yield Kernel(
        "combine",
        lambda: rows.combine(i.rows_AD, *i.index[1:], True),
        n * A * D + tokens + 4 * A,
        0,
        lambda: kernels.combine._init_fn(i.rows_AD, *i.index[1:], True),
    )
    yield Kernel(
        "combine backward",
        lambda: rows.combine_backward(i.d_y_TD, *i.index[1:3], True),
        tokens + n * A * D + 4 * A,
        0,
        lambda: combine_backward._init_fn(i.d_y_TD, *i.index[1:3], True),
    )

    def through() -> grouped_ffn.ActivationGradient:
        return grouped_ffn.activation_gradient(
            i.d_y_TD,
            index,
            i.w2,
            h,
            u_or_none,
            None,
            i.activation,
            from_tokens=True,
            weights=True,
            biases=(i.b1 is not None, False),
        )

    kept = through()
    yield Kernel(
        "activation gradient",
        lambda: (lambda r: (r.d_h_AH, r.d_u_AH, r.a_AH))(through()),
        tokens + weight + n * (2 * g + 1) * A * H,
        2 * A * D * H,
        lambda: loop.activation_gradient(h, u),
    )
    yield Kernel(
        "weight gradient, first",
        lambda: grouped_ffn.weight_gradient(i.x_TD, kept.d_h_AH, index, i.w1, a_from_tokens=True),
        tokens + n * A * H + weight,
        2 * A * D * H,
        lambda: loop.weight_gradient(i.x_TD[loop.token_A], kept.d_h_AH),
    )
    yield Kernel(
        "weight gradient, second",
        lambda: grouped_ffn.weight_gradient(kept.a_AH, i.d_y_TD, index, i.w2, b_from_tokens=True),
        tokens + n * A * H + weight,
        2 * A * D * H,
        lambda: loop.weight_gradient(kept.a_AH, i.d_y_TD[loop.token_A]),
    )
    yield Kernel(
        "rows of the tokens' gradient",
        lambda: grouped_ffn.token_rows(kept, i.w1, i.w3, i.index[0]),
        g * (n * A * H + weight) + n * A * D,
        2 * g * A * D * H,
        lambda: (
            loop.linear(kept.d_h_AH, i.w1.transpose(1, 2))
            + (0 if i.w3 is None else loop.linear(kept.d_u_AH, i.w3.transpose(1, 2)))
        ),
    )
    d_rows = grouped_ffn.token_rows(kept, i.w1, i.w3, i.index[0])
    unit_ED, _ = router_gradient.unit_vectors(i.w_DE)
    parts = kept.d_gate_parts_AN
    router = (parts, i.score_TE, i.inv_norm_T, i.unrouted_T, i.bits_TW, unit_ED, i.scale, i.index[1], i.index[3], False)
    yield Kernel(
        "token gradient",
        lambda: router_gradient.token_gradient(d_rows, i.x_TD, i.d_y_TD, i.b2, *router),
        n * A * D + (2 + (i.b2 is not None)) * tokens + parts.numel() * 4 + 12 * T * E,
        0,
    )
    d_cos = torch.randn_like(i.score_TE)
    yield Kernel(
        "routing vectors' gradient",
        lambda: threshold_gate.unit_gradient(d_cos, i.x_TD),
        tokens + 4 * T * E + 4 * D * E,
        2 * T * D * E,
        lambda: d_cos.t() @ i.x_TD.float(),
    )


def difference(found: Any, expected: Any) -> float:
    """The largest relative RMS difference; of integers, the share that differs."""
    if not isinstance(found, Tensor):
        return max(difference(f, e) for f, e in zip(found, expected, strict=True))
    if not found.numel():
        return 0.0
    if not found.is_floating_point():
        return float((found != expected).double().mean())
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def measure(
    shape: Shape, dtype: torch.dtype, device: torch.device, rates: dict[str, float], repeats: int
) -> list[dict]:
    """One result a kernel."""
    bytes_of_inputs = shape.T * shape.D * torch.empty(0, dtype=dtype).element_size()
    sets = max(1, min(4, L2_BYTES // max(bytes_of_inputs, 1) + 1)) if device.type == "cuda" else 1
    batches = [list(kernels_of(Inputs(shape, dtype, device, seed))) for seed in range(sets)]
    results = []
    for same in zip(*batches, strict=True):
        first = same[0]
        error = difference(first.run(), first.expected()) if first.expected else None
        limit = 1e-2 if dtype != torch.float32 else 1e-4
        if error is not None and not error < limit:
            raise RuntimeError(f"{first.name} at {shape}: differs from the torch operation by {error:.1e}")
        times = seconds([kernel.run for kernel in same], device, repeats)
        by_bytes = first.bytes / rates["bytes_per_second"]
        by_flops = first.flops / rates["flops_per_second"]
        bound = max(by_bytes, by_flops)
        results.append(
            {
                "shape": asdict(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "kernel": first.name,
                "bytes": first.bytes,
                "flops": first.flops,
                "microseconds": spread([1e6 * t for t in times]),
                "bound_microseconds": 1e6 * bound,
                "bound_by": "bytes" if by_bytes >= by_flops else "flops",
                "share_of_bound": bound / statistics.median(times),
                "difference": error,
            }
        )
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as Markdown."""
    lines = [
        "| shape | dtype | kernel | us | quartiles | bound us | by | share of bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        us = r["microseconds"]
        lines.append(
            f"| {Shape(**r['shape'])} | {r['dtype']} | {r['kernel']} | {us['median']:.1f} "
            f"| {us['quartile_1']:.1f} to {us['quartile_3']:.1f} | {r['bound_microseconds']:.1f} | {r['bound_by']} "
            f"| **{r['share_of_bound']:.2f}** |"
        )
    return "\n".join(lines)


def roofline(results: Sequence[dict[str, Any]], rates: dict[str, float], path: Path, title: str) -> None:
    """Achieved rate against arithmetic intensity of the kernels with products, and the two measured bounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    bandwidth, rate = rates["bytes_per_second"], rates["flops_per_second"]
    ridge = rate / bandwidth
    xs = [ridge / 300, ridge, ridge * 30]
    axes.plot(xs, [min(rate, bandwidth * x) / 1e12 for x in xs], color="black", label="measured bounds")
    names = list(dict.fromkeys(r["kernel"] for r in results if r["flops"]))
    colours = plt.get_cmap("tab20").colors
    for colour, name in zip(colours, names, strict=False):
        own = [r for r in results if r["kernel"] == name]
        x = [r["flops"] / r["bytes"] for r in own]
        y = [r["flops"] / r["microseconds"]["median"] / 1e6 for r in own]
        axes.scatter(x, y, color=colour, label=name, s=36, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte of inputs and outputs", ylabel="TFLOP/s", title=title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
    args = parser.parse_args(argv)
    why = unable(args.device)
    if why is not None:
        on_cpu = "" if args.device == "cpu" or default == "cuda" else ", allowed here: cpu with TRITON_INTERPRET=1"
        parser.error(f"argument --device: came {args.device!r}: {why}{on_cpu}")
    if args.out:
        check_outputs(parser, "--out", beside(args.out, ".md", ".png"))
    started, device, dtype = time.monotonic(), torch.device(args.device), getattr(torch, args.dtype)
    shapes = [GPU_SHAPES[name] for name in args.shape]
    if device.type != "cuda":
        shapes, dtype, args.repeats = [TINY], torch.float32, 2
    rates = bounds(device, dtype)
    results: list[dict[str, Any]] = []
    for shape in shapes:
        if time.monotonic() - started > args.seconds:
            print(f"skipped, no time is left: {shape}")
            continue
        found = measure(shape, dtype, device, rates, args.repeats)
        print(table(found).split("\n", 2)[2], flush=True)
        results += found
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not results:
        print(f"nothing is measured: --seconds {args.seconds:g} went by before the first shape", file=sys.stderr)
        return 1
    summary = {"environment": environment(device), "bounds": rates, "results": results}
    name = summary["environment"].get("gpu", "CPU, interpreter: no times are meant")
    copy, product = rates["bytes_per_second"] / 1e12, rates["flops_per_second"] / 1e12
    head = f"Copy {copy:.2f} TB/s, {dtype} product {product:.0f} TFLOP/s, {name}.\n\n"
    print("\n" + head + table(results))
    if args.out:
        write(args.out, summary, head + table(results))
        if find_spec("matplotlib") is None:
            print("no plot is drawn: matplotlib is not installed", file=sys.stderr)
            return 0
        roofline(results, rates, args.out.with_suffix(".png"), summary["environment"].get("gpu", "interpreter"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
