"""The table of a job, computed from its metrics alone: every row's mean over the seeds, with its spread.

Spread is the standard deviation over the seeds. The sentence under the table compares the best row with the others
by accuracy out of domain, whoever wins. Rich is imported when a table is drawn.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

NONE = "-"
TITLE = "Mean over {seeds} after {steps} steps, ± standard deviation over the seeds"
ONE_SEED_TITLE = "One seed, {steps} steps"


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and its standard deviation, None with a single seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """For example "84.2 ± 0.9"."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {scale * self.deviation:.{digits}f}"


@dataclass(frozen=True)
class RowSummary:
    """One row of the table. Lists have one entry a MoE layer; a dense row has empty ones and no k."""

    row: str
    seeds: tuple[int, ...]
    in_accuracy: Spread
    out_accuracy: Spread
    mean_k: Spread | None
    experts_start: list[float]
    experts_end: list[float]
    activated_parameters: float
    total_parameters: float
    step_ms: Spread

    @classmethod
    def header(cls) -> tuple[str, ...]:
        """The titles of the columns."""
        return HEADER

    def cells(self) -> list[str]:
        """The row's texts, in the order of `header`."""
        return [
            self.row,
            self.in_accuracy.text(100),
            self.out_accuracy.text(100),
            NONE if self.mean_k is None else f"{self.mean_k.mean:.2f}",
            per_layer(self.experts_start),
            per_layer(self.experts_end),
            parameters(self.activated_parameters),
            parameters(self.total_parameters),
            f"{self.step_ms.mean:.{1 if self.step_ms.mean < 100 else 0}f}",
        ]


# The line breaks keep the table within 80 columns of a terminal.
HEADER = (
    "row",
    "in domain\n%",
    "out of\ndomain %",
    "mean\nk",
    "experts\nstart",
    "experts\nend",
    "active\nparams",
    "total\nparams",
    "ms a\nstep",
)


def summarise(metrics: Iterable[Mapping[str, Any]], rows: Sequence[str], seeds: Sequence[int]) -> list[RowSummary]:
    """The rows of the table. ValueError where a run has no evaluation at the last step of the job."""
    evaluations: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    step_ms: dict[tuple[str, int], list[float]] = {}
    for line in metrics:
        run = (line["row"], line["seed"])
        if line["kind"] == "eval":
            evaluations.setdefault(run, []).append(line)
        elif line["step_ms"] is not None:
            step_ms.setdefault(run, []).append(line["step_ms"])
    last = max((lines[-1]["step"] for lines in evaluations.values()), default=0)
    result = []
    for row in rows:
        runs = [(row, seed) for seed in seeds]
        unfinished = [run for run in runs if run not in evaluations or evaluations[run][-1]["step"] < last]
        if unfinished:
            raise ValueError(f"no final evaluation of row {unfinished[0][0]} with seed {unfinished[0][1]}")
        result.append(_summary(row, tuple(seeds), [evaluations[run] for run in runs], [step_ms[run] for run in runs]))
    return result


def _summary(
    row: str, seeds: tuple[int, ...], lines: list[list[Mapping[str, Any]]], step_ms: list[list[float]]
) -> RowSummary:
    first, last = [each[0] for each in lines], [each[-1] for each in lines]
    layers = list(last[0]["layers"])
    k = [statistics.fmean(line["layers"][name]["k"] for name in layers) for line in last] if layers else []
    return RowSummary(
        row=row,
        seeds=seeds,
        in_accuracy=Spread.of([line["in_accuracy"] for line in last]),
        out_accuracy=Spread.of([line["out_accuracy"] for line in last]),
        mean_k=Spread.of(k) if k else None,
        experts_start=[statistics.fmean(line["layers"][name]["experts"] for line in first) for name in layers],
        experts_end=[statistics.fmean(line["layers"][name]["experts"] for line in last) for name in layers],
        activated_parameters=statistics.fmean(line["activated_parameters"] for line in last),
        total_parameters=statistics.fmean(line["total_parameters"] for line in last),
        step_ms=Spread.of([statistics.median(each) for each in step_ms]),
    )


def verdict(summaries: Sequence[RowSummary]) -> str:
    """One sentence: which row is best out of domain, by how much, and whether that exceeds the spread."""
    ranked = sorted(summaries, key=lambda row: row.out_accuracy.mean, reverse=True)
    best = ranked[0]
    if len(ranked) == 1:
        return f"Out of domain {best.row} reaches {best.out_accuracy.text(100)} %."
    dynmoe = next((row for row in ranked if row.row == "dynmoe"), None)
    other = ranked[1] if dynmoe is None or dynmoe is best else dynmoe
    gap = 100 * (best.out_accuracy.mean - other.out_accuracy.mean)
    sentence = f"Best out of domain: {best.row} with {best.out_accuracy.text(100)} %"
    sentence += f", {gap:.1f} points ahead of {other.row}"
    deviations = [row.out_accuracy.deviation for row in (best, other)]
    known = [100 * deviation for deviation in deviations if deviation is not None]
    if not known:
        sentence += "; one seed says nothing about the spread."
    else:
        relation = "within" if gap <= max(known) else "more than"
        sentence += f": {relation} the spread over the seeds ({max(known):.1f})."
    if dynmoe is not None and dynmoe is not best:
        sentence += " DynMoE does not win here."
    return sentence


def markdown(summaries: Sequence[RowSummary], steps: int) -> str:
    """The table and the verdict as Markdown."""
    body = markdown_lines(summaries[0].header(), [row.cells() for row in summaries])
    return f"{_title(summaries, steps)}.\n\n{body}\n\n{verdict(summaries)}\n"


def markdown_lines(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column left and the others right."""
    titles = [title.replace("\n", " ") for title in header]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(summaries: Sequence[RowSummary], steps: int) -> dict[str, Any]:
    """The table as plain values; accuracies are shares, not percent."""
    return {"steps": steps, "rows": [asdict(row) for row in summaries], "verdict": verdict(summaries)}


def rich_table(summaries: Sequence[RowSummary], steps: int) -> Table:
    """The table for a terminal."""
    best = max(summaries, key=lambda row: row.out_accuracy.mean)
    table = rich_lines(_title(summaries, steps), summaries[0].header())
    for row in summaries:
        table.add_row(*row.cells(), style="bold" if row is best else None)
    return table


def rich_lines(title: str, header: Sequence[str]) -> Table:
    """A table for a terminal, without rows yet."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right", vertical="bottom")
    return table


def _title(summaries: Sequence[RowSummary], steps: int) -> str:
    seeds = len(summaries[0].seeds)
    return ONE_SEED_TITLE.format(steps=steps) if seeds == 1 else TITLE.format(seeds=f"{seeds} seeds", steps=steps)


def parameters(number: float) -> str:
    """For example "203k" or "22.7M"."""
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"


def per_layer(values: Sequence[float], digits: int = 1) -> str:
    """For example "4 6.3": one number a layer, without decimals where it has none."""
    return " ".join(f"{value:.0f}" if value == round(value) else f"{value:.{digits}f}" for value in values) or NONE
