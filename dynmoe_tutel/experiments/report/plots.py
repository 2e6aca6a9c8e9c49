"""The plots of a job as PNG bytes, drawn from its metrics and events alone.

Colours are Okabe and Ito's, which colour-blind people can tell apart; rows also differ in line style. Figures are made
without pyplot, so that no global state is touched and no display is needed. Needs matplotlib.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dynmoe_tutel.experiments.report.table import RowSummary, Spread

Lines = Sequence[Mapping[str, Any]]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
STYLES = ((0, ()), (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 150
PANEL = (4.6, 3.5)
MARK = 10  # half of a mark's side, in pixels
# Where a name may stand, in points from its mark, the best places first.
PLACES = tuple(
    (side * across, up, "left" if side > 0 else "right")
    for across, up in ((8, 7), (8, -8), (8, 16), (8, -17), (8, 25), (8, -26))
    for side in (1, -1)
)


def draw(metrics: Lines, events: Lines, rows: Sequence[RowSummary], slots: int) -> dict[str, bytes]:
    """Draw all plots of a table; returns PNG files by name. Rows without a line in `metrics` appear in the trade-off
    alone. Plots of experts show the DynMoE row, or else the last MoE row."""
    names = [row.row for row in rows if any(line["row"] == row.row for line in metrics)]
    made = {"accuracy.png": accuracy(metrics, names), "trade_off.png": trade_off(rows)}
    with_experts = [name for name in names if any(line["layers"] for line in metrics if line["row"] == name)]
    if with_experts:
        name = "dynmoe" if "dynmoe" in with_experts else with_experts[-1]
        made["experts.png"] = experts(metrics, events, name, slots)
        made["k_histogram.png"] = k_histogram(metrics, name)
        made["load.png"] = load(metrics, name)
    return made


def accuracy(metrics: Lines, rows: Sequence[str]) -> bytes:
    """Accuracy in and out of domain against the step: mean over the seeds, and the range between them."""
    figure, (inside, outside) = new_figure(1, 2)
    for axes, key, title in (
        (inside, "in_accuracy", "In domain (held out)"),
        (outside, "out_accuracy", "Out of domain (never trained on)"),
    ):
        for position, row in enumerate(rows):
            curves = _curves(metrics, row, key)
            steps = sorted({step for curve in curves.values() for step in curve})
            values = [[100 * curve[step] for curve in curves.values() if step in curve] for step in steps]
            turn, place = divmod(position, len(COLOURS))  # colours that come again have the next style
            colour, style = COLOURS[place], STYLES[(place + turn) % len(STYLES)]
            axes.plot(steps, [statistics.fmean(v) for v in values], color=colour, ls=style, lw=2, label=row)
            if len(curves) > 1:
                axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.13)
        axes.set(title=title, xlabel="training step", ylim=(0, 100))
    inside.set_ylabel("accuracy, %")
    note = "line: mean of the seeds, band: their range"
    figure.legend(*inside.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(rows), 5), title=note)
    return png(figure)


def experts(metrics: Lines, events: Lines, row: str, slots: int) -> bytes:
    """Active experts of every MoE layer against the step, a line a seed, with every birth and death."""
    layers, seeds = _layers(metrics, row), _seeds(metrics, row)
    figure, panels = new_figure(1, len(layers))
    for axes, layer in zip(panels, layers, strict=True):
        for position, seed in enumerate(seeds):
            # Lines of equal height would hide each other: seeds are shifted a little.
            shift = 0.16 * (position - (len(seeds) - 1) / 2)
            steps, alive, births, deaths = _life(metrics, events, row, layer, seed)
            axes.plot(
                steps,
                [n + shift for n in alive],
                drawstyle="steps-post",
                color=COLOURS[position % len(COLOURS)],
                ls=STYLES[position % len(STYLES)],
                lw=1.8,
                label=f"seed {seed}",
            )
            for marks, colour, marker, label in ((births, "black", "^", "grown"), (deaths, "white", "v", "pruned")):
                axes.scatter(
                    [step for step, _ in marks],
                    [n + shift for _, n in marks],
                    marker=marker,
                    s=36,
                    facecolor=colour,
                    edgecolor="black",
                    linewidth=1,
                    zorder=3,
                    label=label if position == len(seeds) - 1 else None,
                )
        axes.axhline(slots, color="0.45", lw=1, ls=(0, (2, 3)))
        axes.annotate(f"{slots} slots", (0.01, slots), (0, 3), xycoords=("axes fraction", "data"), color="0.35",
                      textcoords="offset points", fontsize=9)  # fmt: skip
        axes.set(title=f"{row}: {layer}", xlabel="training step", ylim=(0, slots + 0.9))
        if slots <= 16:
            axes.set_yticks(range(slots + 1))
    panels[0].set_ylabel("active experts")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return png(figure)


def k_histogram(metrics: Lines, row: str) -> bytes:
    """Share of tokens by the number of experts that they activated, after the last step, in and out of domain."""
    layers, seeds = _layers(metrics, row), _seeds(metrics, row)
    figure, panels = new_figure(1, len(layers), sharey=True)
    last = [_of(metrics, "eval", row, seed)[-1] for seed in seeds]
    for axes, layer in zip(panels, layers, strict=True):
        for position, (key, label) in enumerate((("layers", "in domain"), ("layers_out", "out of domain"))):
            shares = 100 * np.array([line[key][layer]["k_histogram"] for line in last])
            k = statistics.fmean(line[key][layer]["k"] for line in last)
            mean = shares.mean(0)
            axes.bar(
                np.arange(len(mean)) + 0.4 * (position - 0.5),
                mean,
                width=0.38,
                yerr=np.stack([mean - shares.min(0), shares.max(0) - mean]).clip(0) if len(seeds) > 1 else None,
                error_kw={"lw": 1, "ecolor": "0.25", "capsize": 2},
                color=COLOURS[position],
                hatch=("", "//")[position],
                edgecolor="white",
                linewidth=0,
                label=f"{label}, mean k {k:.2f}",
            )
        axes.set(title=f"{row}: {layer}", xlabel="k, experts that passed (0: the best one is used)")
        axes.set_xticks(range(len(mean)))
        axes.legend(loc="upper right")
    panels[0].set_ylabel("share of tokens, %" + "\n(mean and range of the seeds)" * (len(seeds) > 1))
    panels[0].set_ylim(0, 1.3 * panels[0].get_ylim()[1])  # room for the legend
    return png(figure)


def load(metrics: Lines, row: str) -> bytes:
    """Which share of the training tokens every slot got, against the step: a row of panels a layer, one a seed."""
    from matplotlib import colormaps

    layers, seeds = _layers(metrics, row), _seeds(metrics, row)[:4]
    figure, panels = new_figure(len(layers), len(seeds), sharex=True, size=(3.4, 2.5))
    colours = colormaps["viridis"].with_extremes(bad="white")
    for axes, (layer, seed) in zip(panels, [(layer, seed) for layer in layers for seed in seeds], strict=True):
        lines = [line for line in _of(metrics, "train", row, seed) if line["layers"][layer]["load"] is not None]
        share = np.full((len(lines[0]["layers"][layer]["load"]), len(lines)), np.nan)
        for column, line in enumerate(lines):
            active = line["layers"][layer]["active"]
            share[active, column] = 100 * np.array(line["layers"][layer]["load"])[active]
        steps = [0, *[line["step"] for line in lines]]
        edges = np.arange(len(share) + 1) - 0.5
        mesh = axes.pcolormesh(steps, edges, share, cmap=colours, vmin=0, vmax=100)
        axes.set(title=f"{row}: {layer}, seed {seed}", yticks=range(len(share)))
        axes.tick_params(length=2)
        axes.grid(False)
    for column in range(len(seeds)):
        panels[len(panels) - len(seeds) + column].set_xlabel("training step")
    for axes in panels[:: len(seeds)]:
        axes.set_ylabel("expert slot")
    figure.colorbar(mesh, ax=list(panels), label="share of tokens, % (white: not active)", pad=0.02)
    return png(figure)


def trade_off(rows: Sequence[RowSummary]) -> bytes:
    """Accuracy in and out of domain against the parameters that a token activates: a mark a row, with its spread."""
    figure, panels = new_figure(1, 2, sharex=True, size=(5.2, 4.2))
    families = list(dict.fromkeys(_family(row.row) for row in rows))
    for axes, key, title in zip(
        panels,
        ("in_accuracy", "out_accuracy"),
        ("In domain (held out)", "Out of domain (never trained on)"),
        strict=True,
    ):
        for row in rows:
            family = families.index(_family(row.row))
            spread = getattr(row, key)
            axes.errorbar(
                row.activated_parameters / 1e6,
                100 * spread.mean,
                yerr=None if spread.deviation is None else 100 * spread.deviation,
                color=COLOURS[family % len(COLOURS)],
                marker=MARKERS[family % len(MARKERS)],
                markersize=8,
                capsize=3,
                ls="",
                label=_family(row.row),
            )
        axes.set(title=title, xlabel="parameters that a token activates, millions")
        axes.margins(x=0.22, y=0.12)
    panels[0].set_ylabel("accuracy, %")
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    note = "mark: mean of the seeds, bar: their standard deviation"
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), title=note)
    figure.draw_without_rendering()  # where things are is known afterwards
    for axes, key in zip(panels, ("in_accuracy", "out_accuracy"), strict=True):
        _name(
            axes,
            {row.row: (row.activated_parameters / 1e6, getattr(row, key)) for row in rows},
            {row.row: COLOURS[families.index(_family(row.row)) % len(COLOURS)] for row in rows},
        )
    return png(figure)


def _name(axes: Axes, marks: Mapping[str, tuple[float, Spread]], colours: Mapping[str, str]) -> None:
    """Names beside their marks, each at the place around it where it covers least of names, marks and bars."""
    from matplotlib.colors import to_rgb
    from matplotlib.transforms import Bbox

    def box(x: float, low: float, high: float, radius: float) -> Bbox:
        (left, bottom), (right, top) = axes.transData.transform([(x, 100 * low), (x, 100 * high)])
        return Bbox.from_extents(left - radius, bottom - radius, right + radius, top + radius)

    symbols = [box(x, spread.mean, spread.mean, MARK) for x, spread in marks.values()]
    spreads = [(x, spread.mean, spread.deviation or 0.0) for x, spread in marks.values()]
    bars = [box(x, mean - deviation, mean + deviation, 2) for x, mean, deviation in spreads]
    names: list[Bbox] = []
    for name, (x, spread) in sorted(marks.items(), key=lambda mark: (mark[1][0], mark[1][1].mean)):
        tried = []
        for place, (across, up, align) in enumerate(PLACES):
            text = axes.annotate(
                name,
                (x, 100 * spread.mean),
                (across, up),
                textcoords="offset points",
                ha=align,
                va="center",
                fontsize=8,
                color=[0.65 * channel for channel in to_rgb(colours[name])],  # dark enough to be read
                in_layout=False,
            )
            extent = text.get_window_extent()
            covered = [sum(extent.overlaps(other) for other in others) for others in (names, symbols, bars)]
            outside = extent.x0 < axes.bbox.x0 or extent.x1 > axes.bbox.x1
            tried.append(((covered[0], covered[1] + outside, covered[2], place), text, extent))
        best = min(tried, key=lambda each: each[0])
        names.append(best[2])
        for _, text, _ in tried:
            if text is not best[1]:
                text.remove()


def _family(row: str) -> str:
    """Rows of one colour: those with as many experts."""
    return f"{row[: row.index('top-')]}top-k{row[row.index('-of-') :].replace('-', ' ')}" if "-of-" in row else row


def new_figure(
    rows: int, columns: int, sharex: bool = False, sharey: bool = False, size: tuple[float, float] = PANEL
) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install 'dynmoe_tutel[experiments]'"
        ) from error
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", dpi=DPI)
    panels = [
        axes for line in figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False) for axes in line
    ]
    for axes in panels:
        axes.grid(axis="y", color="0.9", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _of(metrics: Lines, kind: str, row: str, seed: int) -> list[Mapping[str, Any]]:
    return [line for line in metrics if (line["kind"], line["row"], line["seed"]) == (kind, row, seed)]


def _seeds(metrics: Lines, row: str) -> list[int]:
    return sorted({line["seed"] for line in metrics if line["row"] == row})


def _layers(metrics: Lines, row: str) -> list[str]:
    layers = list(next(line["layers"] for line in metrics if line["row"] == row))
    if not layers:
        raise ValueError(f"row {row!r} has no MoE layer to plot")
    return layers


def _curves(metrics: Lines, row: str, key: str) -> dict[int, dict[int, float]]:
    """By seed: value by step."""
    return {
        seed: {line["step"]: line[key] for line in _of(metrics, "eval", row, seed)} for seed in _seeds(metrics, row)
    }


def _life(
    metrics: Lines, events: Lines, row: str, layer: str, seed: int
) -> tuple[list[int], list[int], list[tuple[int, int]], list[tuple[int, int]]]:
    """Steps, active experts from each on, births and deaths as (step, active experts after)."""
    evaluations = _of(metrics, "eval", row, seed)
    steps, alive = [0], [int(evaluations[0]["layers"][layer]["experts"])]
    marks: dict[str, list[tuple[int, int]]] = {"grown": [], "pruned": []}
    for event in events:
        if (event["row"], event["layer"], event["seed"]) == (row, layer, seed):
            steps.append(event["step"])
            alive.append(event["experts"])
            marks[event["action"]].append((event["step"], event["experts"]))
    steps.append(evaluations[-1]["step"])
    alive.append(alive[-1])
    return steps, alive, marks["grown"], marks["pruned"]
