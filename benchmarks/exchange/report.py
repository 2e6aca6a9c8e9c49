"""The report of `benchmarks.parallel`: limits, the model's expectation on more ranks, a table, a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..common.shapes import GPU_SHAPES, Shape
from .cost_model import EXCHANGES, Format, expected_demand, traffic
from .token_choices import Choice, fixed, skewed_loads

Results = Sequence[dict[str, Any]]
OURS, PER_EXPERT, PADDED = EXCHANGES
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00")
LAYOUTS = ((8, 64), (64, 64), (64, 512), (512, 512), (512, 4096))  # ranks, experts
BOTH = "forward+backward"


def expected(
    choice: Choice, T: int, ranks: int, f: Format, backward: bool = True, load: float | None = None
) -> dict[str, float]:
    """Expected bytes of each exchange over all ranks; with `load`, C is `load` times the mean load."""
    d = expected_demand(choice, T, ranks)
    if load is not None:
        d = replace(d, capacity=load * T * float(choice.loads().mean()))
    return {exchange: float(traffic(exchange, d, f, backward).sum()) for exchange in EXCHANGES}


def limits(results: Results, shape: Shape) -> list[dict[str, Any]]:
    """The two limits at mean k 6 and 64 experts: in the model at 8 ranks, and as counted.

    Popular experts and chance both raise the largest load. For padded rows, the model uses the load that the limit
    states; the counts use the load of their batch.
    """
    found: list[dict[str, Any]] = []

    def add(what: str, over: str, most: float, bytes_: dict[str, float]) -> None:
        ratio = bytes_[OURS] / bytes_[over]
        found.append({"what": what, "over": over, "most": most, "ratio": ratio, "holds": ratio <= most})

    for skew, over, most in ((1.0, PER_EXPERT, 0.75), (2.0, PER_EXPERT, 0.75), (2.0, PADDED, 0.5)):
        choice = Choice.of_loads(skewed_loads(64, 6, skew))
        for T, f, kind in ((shape.T, Format(shape.D, 4), "fp32"), (GPU_SHAPES["llm-4k"].T, Format(4096, 2), "bf16")):
            for backward in (False, True):
                add(
                    f"model, 8 ranks, load {skew:g}, D {f.D} {kind}, {BOTH if backward else 'forward'}",
                    over,
                    most,
                    expected(choice, T, 8, f, backward, skew if over == PADDED else None),
                )
        for r in results:
            if (r["k"], r["skew"], r["fixed_k"]) == (6, skew, False) and r["processes"] in (4, 8):
                for name, bytes_ in r["bytes"].items():
                    load = r["max_over_mean_load"]
                    add(
                        f"counted, {r['processes']} ranks, load {load:.2f}, D {shape.D} fp32, {name}",
                        over,
                        most,
                        bytes_,
                    )
    return found


def extrapolate(shape: Shape = GPU_SHAPES["llm-4k"], layouts: Any = LAYOUTS) -> list[dict[str, Any]]:
    """Expected bytes a rank of a forward and a backward of `shape` in bf16; T/8 tokens a rank."""
    f, T = Format(shape.D, 2), shape.T // 8
    found = []
    for ranks, experts in layouts:
        for skew, pmf in ((1.0, None), (2.0, None), (1.0, fixed(6))):
            choice = Choice.of_loads(skewed_loads(experts, 6, skew), pmf)
            d = expected_demand(choice, T, ranks)
            row: dict[str, Any] = {"ranks": ranks, "experts": experts, "skew": skew, "fixed_k": pmf is not None}
            for exchange in EXCHANGES:
                row[exchange] = {"bytes_a_rank": float(traffic(exchange, d, f, True).sum()) / ranks}
            found.append(row)
    return found


def table(results: Results, model: Results, found: Results) -> str:
    """The report as Markdown."""
    lines = ["Once per rank over the others, forward+backward: bytes, and times (median and quartiles):\n"]
    lines.append("| processes | k | max / mean load | bytes: per expert | padded | time: per expert | padded |")
    lines.append("|---|---|---|---|---|---|---|")
    for r in results:
        bytes_ = r["bytes"][BOTH]
        times = [_quartiles(r["ours_over"].get(BOTH, {}).get(other)) for other in (PER_EXPERT, PADDED)]
        k = f"exactly {r['k']}" if r["fixed_k"] else f"mean {r['mean_k']:.2f}"
        load = f"{r['max_over_mean_load']:.2f}"
        ratios = [f"{bytes_[OURS] / bytes_[other]:.3f}" for other in (PER_EXPERT, PADDED)]
        lines.append(f"| {' | '.join([str(r['processes']), k, load, *ratios, *times])} |")
    lines += ["", "Expected by the model, D 4096, bf16, 4096 tokens a rank, k 6, forward+backward.", ""]
    lines.append("| ranks | experts | k | max / mean load | MB a rank | bytes / per expert | bytes / padded |")
    lines.append("|---" * 7 + "|")
    for m in model:
        ours, one, pad = (m[exchange]["bytes_a_rank"] for exchange in EXCHANGES)
        lines.append(
            f"| {m['ranks']} | {m['experts']} | {'exactly 6' if m['fixed_k'] else 'mean 6'} | {m['skew']:g} "
            f"| {ours / 1e6:.0f} | {ours / one:.3f} | {ours / pad:.3f} |"
        )
    lines += [
        "",
        "Limits at mean k 6 and 64 experts:",
        "",
        "| what | over | ratio | at most | holds |",
        "|---|---|---|---|---|",
    ]
    for x in found:
        holds = "yes" if x["holds"] else "**no**"
        lines.append(f"| {x['what']} | {x['over']} | {x['ratio']:.3f} | {x['most']} | {holds} |")
    return "\n".join(lines)


def _quartiles(s: dict[str, float] | None) -> str:
    return "-" if s is None else f"{s['median']:.2f} ({s['quartile_1']:.2f} to {s['quartile_3']:.2f})"


def plot(results: Results) -> bytes:
    """PNG: our bytes over the others' against k, counted and expected; and the model against the number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.8), layout="constrained", dpi=150)
    panels = figure.subplots(1, 3, sharey=True)
    shape = results[0]["shape"]
    f, ks = Format(shape["D"], 4), range(1, 7)
    processes = sorted({r["processes"] for r in results})
    for axes, skew in zip(panels[:2], (1.0, 2.0), strict=True):
        for ranks, colour in zip(processes, COLOURS, strict=False):
            for other, style, marker in ((PER_EXPERT, "-", "o"), (PADDED, "--", "s")):
                law = {
                    k: expected(Choice.of_loads(skewed_loads(shape["E"], k, skew)), shape["T"], ranks, f) for k in ks
                }
                axes.plot(ks, [law[k][OURS] / law[k][other] for k in ks], ls=style, color=colour, lw=1.5)
                points = [r for r in results if (r["processes"], r["skew"], r["fixed_k"]) == (ranks, skew, False)]
                axes.plot(
                    [r["mean_k"] for r in points],
                    [r["bytes"][BOTH][OURS] / r["bytes"][BOTH][other] for r in points],
                    ls="", marker=marker, ms=6, mfc="white", color=colour, label=f"{ranks} ranks, over {other}",
                )  # fmt: skip
        axes.set(title=f"{shape['E']} experts, max / mean load {skew:g}", xlabel="mean k")
    panels[0].set_ylabel("bytes of once per rank / bytes of the other")
    for (slots, skew), colour in zip(((64, 1.0), (64, 2.0), (8, 1.0), (8, 2.0)), COLOURS, strict=True):
        layouts = [(r, 64) for r in (2, 4, 8, 16, 32, 64)] if slots == 64 else [(r, 8 * r) for r in (2, 4, 8, 64, 512)]
        choices = [Choice.of_loads(skewed_loads(experts, 6, skew)) for _, experts in layouts]
        sent = [
            expected(choice, 4096, ranks, Format(4096, 2)) for choice, (ranks, _) in zip(choices, layouts, strict=True)
        ]
        for other, style, marker in ((PER_EXPERT, "-", "o"), (PADDED, "--", "s")):
            if skew == 2.0 and other == PER_EXPERT:
                continue  # lies on the line of skew 1
            panels[2].plot(
                [ranks for ranks, _ in layouts],
                [b[OURS] / b[other] for b in sent],
                ls=style, marker=marker, ms=4, color=colour,
                label=f"{'64 experts' if slots == 64 else '8 experts a rank'}, load {skew:g}, over {other}",
            )  # fmt: skip
    panels[2].set(title="expected, mean k 6, D 4096 bf16", xlabel="ranks", xscale="log")
    panels[2].set_xticks([2, 4, 8, 16, 64, 512], ["2", "4", "8", "16", "64", "512"], minor=False)
    panels[2].minorticks_off()
    for axes in panels:
        axes.set_ylim(0, 1.1)
        axes.axhline(1, color="0.5", lw=0.8)
        axes.grid(axis="y", color="0.9", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            fontsize=8,
            frameon=False,
            ncols=2 if axes is not panels[2] else 1,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
        )
    figure.suptitle(
        "marks: counted in the collectives; lines: the model's expectation; loads are the law's, chance adds to them",
        fontsize=10,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
