"""The picture of an answer as PNG bytes. Needs matplotlib; figures are made without pyplot, as those of all reports."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from dynmoe_tutel.experiments.questions.answer import Answer, Curves, Panel
from dynmoe_tutel.experiments.report.plots import COLOURS, STYLES, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
LINE, MARGIN = 0.27, 1.25  # inches that a name takes, and the title with the axis
WIDTH, CURVES_HEIGHT = 4.4, 3.6


def draw(answer: Answer) -> bytes:
    """One panel beside the other, in rows of three."""
    panels = answer.panels
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    names = max(len(panel.values) if isinstance(panel, Panel) else 0 for panel in panels)
    height = max(LINE * names + MARGIN, CURVES_HEIGHT * any(isinstance(panel, Curves) for panel in panels))
    figure, axes = new_figure(rows, columns, size=(WIDTH, height))
    for panel, own in zip(panels, axes, strict=False):
        if isinstance(panel, Panel):
            _dots(own, panel)
        else:
            _curves(own, panel)
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    labelled = next((own for panel, own in zip(panels, axes, strict=False) if isinstance(panel, Curves)), None)
    note = "\n".join(textwrap.wrap(answer.note, 55 * columns))
    if labelled is None:
        figure.supxlabel(note, fontsize=9)
    else:
        handles, labels = labelled.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, title=note)
    return png(figure)


def _dots(axes: Axes, panel: Panel) -> None:
    for place, (middle, low, high) in enumerate(panel.values.values()):
        bar = [[max(middle - low, 0)], [max(high - middle, 0)]]
        axes.errorbar(middle, place, xerr=bar, color=COLOURS[0], marker="o", capsize=3, ls="")
    if panel.line is not None:
        axes.axvline(panel.line, color="0.45", lw=1, ls=(0, (4, 3)))
    axes.set_yticks(range(len(panel.values)), list(panel.values), fontsize=8)
    axes.set_ylim(len(panel.values) - 0.5, -0.5)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(axis="x", color="0.9", lw=0.8)


def _curves(axes: Axes, panel: Curves) -> None:
    for position, (label, points) in enumerate(panel.curves.items()):
        x = [at for at, _ in points]
        middle, low, high = zip(*[value for _, value in points], strict=True)
        colour = COLOURS[position // 2 % len(COLOURS)]  # a layer has one colour, in domain and out
        axes.plot(x, middle, color=colour, ls=STYLES[position % 2], lw=2, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.12)
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axes.set_ylim(bottom=0)
