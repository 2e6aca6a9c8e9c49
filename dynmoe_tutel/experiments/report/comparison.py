"""The table of an experiment: rows compared by part of the data, with what they activate and cost, from metrics alone.

Spread is the standard deviation over the seeds; where a task leaves out one part after the other, a seed's value is the
mean over these runs. A part is one domain's data of one kind: held out in domain, or out of domain.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dynmoe_tutel.experiments.report import table
from dynmoe_tutel.experiments.report.table import NONE, RowSummary, Spread, markdown_lines, per_layer, rich_lines
from dynmoe_tutel.experiments.task import RunKey

if TYPE_CHECKING:
    from rich.table import Table

HEADER = (table.HEADER[0], "seeds", *table.HEADER[1:], "x\ndense")

WIDE = 160
NOT_ON_NARROW = ("seeds", "experts\nstart", "ms a\nstep")

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison(RowSummary):
    """One row. `parts` and `k` are by name of the part; `k` has one mean a MoE layer; `step_ratio` is the time of a
    step over the dense row's with the same seed, None without one; `runs` are (seed, part left out)."""

    parts: dict[str, Spread] = field(default_factory=dict)
    k: dict[str, list[float]] = field(default_factory=dict)
    step_ratio: Spread | None = None
    runs: tuple[tuple[int, str], ...] = ()

    @classmethod
    def header(cls) -> tuple[str, ...]:
        return HEADER

    def cells(self) -> list[str]:
        row, *cells = super().cells()
        ratio = NONE if self.step_ratio is None else f"{self.step_ratio.mean:.2f}"
        return [row, str(len(self.seeds)), *cells, ratio]

    def part_cells(self) -> list[str]:
        """The row's texts in the table by part: accuracy, then mean k of every layer."""
        accuracy = [spread.text(100) for spread in self.parts.values()]
        return [self.row, *accuracy, *[f"{per_layer(k, 2)}" for k in self.k.values()]]


def summarise(metrics: Iterable[Line], rows: Sequence[str], steps: int, selection: str = "last") -> list[Comparison]:
    """The rows that have a finished run, in the order of `rows`.

    `selection`: "last" takes the evaluation after the last step, "validation" that of the highest validation accuracy,
    the first of equals.
    """
    evaluations: dict[RunKey, list[Line]] = {}
    times: dict[RunKey, list[float]] = {}
    for line in metrics:
        key = RunKey(line["row"], line["seed"], line.get("test", ""))
        if line["kind"] == "eval":
            evaluations.setdefault(key, []).append(line)
        elif line["step_ms"] is not None:
            times.setdefault(key, []).append(line["step_ms"])
    finished = {key: lines for key, lines in evaluations.items() if lines[-1]["step"] == steps}
    step_ms = {key: statistics.median(times[key]) for key in finished if key in times}
    runs = {row: {key: lines for key, lines in finished.items() if key.row == row} for row in rows}
    return [_summary(row, lines, step_ms, selection) for row, lines in runs.items() if lines]


def selected(lines: Sequence[Line], selection: str) -> Line:
    """The evaluation of a run that counts."""
    if selection == "last":
        return lines[-1]
    return max(lines[1:], key=lambda line: (line["validation_accuracy"], -line["step"]))


def _summary(
    row: str, runs: Mapping[RunKey, list[Line]], step_ms: Mapping[RunKey, float], selection: str
) -> Comparison:
    keys = sorted(runs, key=lambda key: (key.seed, key.test))
    seeds = sorted({key.seed for key in keys})
    chosen = {key: selected(runs[key], selection) for key in keys}
    first = [runs[key][0] for key in keys]
    layers = list(chosen[keys[0]]["layers"])

    def over_seeds(value: Mapping[RunKey, float]) -> Spread:
        return Spread.of([statistics.fmean(value[key] for key in keys if key.seed == seed) for seed in seeds])

    def mean_k(line: Line) -> float:
        return statistics.fmean(line["layers"][name]["k"] for name in layers)

    def experts(lines: Iterable[Line]) -> list[float]:
        lines = list(lines)
        return [statistics.fmean(line["layers"][name]["experts"] for line in lines) for name in layers]

    names = list(dict.fromkeys(name for line in chosen.values() for name in line["parts"]))
    parts, k = {}, {}
    for name in names:
        having = {key: line["parts"][name] for key, line in chosen.items() if name in line["parts"]}
        by_seed = [[part["accuracy"] for key, part in having.items() if key.seed == seed] for seed in seeds]
        parts[name] = Spread.of([statistics.fmean(values) for values in by_seed if values])
        if layers:
            k[name] = [statistics.fmean(part["k"][layer] for part in having.values()) for layer in layers]
    dense = {key: RunKey("dense", key.seed, key.test) for key in keys}
    ratio = {key: step_ms[key] / step_ms[dense[key]] for key in keys if dense[key] in step_ms and key in step_ms}
    return Comparison(
        row=row,
        seeds=tuple(seeds),
        in_accuracy=over_seeds({key: line["in_accuracy"] for key, line in chosen.items()}),
        out_accuracy=over_seeds({key: line["out_accuracy"] for key, line in chosen.items()}),
        mean_k=over_seeds({key: mean_k(line) for key, line in chosen.items()}) if layers else None,
        experts_start=experts(first),
        experts_end=experts(chosen.values()),
        activated_parameters=statistics.fmean(line["activated_parameters"] for line in chosen.values()),
        total_parameters=statistics.fmean(line["total_parameters"] for line in chosen.values()),
        step_ms=over_seeds({key: step_ms[key] for key in keys}),
        parts=parts,
        k=k,
        step_ratio=over_seeds(ratio) if len(ratio) == len(keys) else None,
        runs=tuple((key.seed, key.test) for key in keys),
    )


def verdict(rows: Sequence[Comparison]) -> str:
    """`table.verdict`, and whether the rows are means of the same runs."""
    sentence = table.verdict(rows)
    if len({row.runs for row in rows}) > 1:
        sentence += " The rows are not means over the same seeds and parts left out: do the runs that are missing."
    return sentence


def part_header(rows: Sequence[Comparison]) -> list[str]:
    """The titles of the table by part."""
    names = list(rows[0].parts)
    has_k = next((list(row.k) for row in rows if row.k), [])
    return ["row", *[f"{name}\n%" for name in names], *[f"k\n{name}" for name in has_k]]


def part_lines(rows: Sequence[Comparison]) -> list[list[str]]:
    """The cells of the table by part, filled up where a row has no k."""
    width = len(part_header(rows))
    return [row.part_cells() + [NONE] * (width - len(row.part_cells())) for row in rows]


def title(steps: int, selection: str) -> str:
    """What the numbers are."""
    after = f"after {steps} steps" if selection == "last" else f"at the best validation accuracy within {steps} steps"
    return f"Mean over the seeds {after}, ± standard deviation over the seeds"


def markdown(rows: Sequence[Comparison], steps: int, selection: str) -> str:
    """Both tables and the verdict as Markdown."""
    main = markdown_lines(HEADER, [row.cells() for row in rows])
    by_part = markdown_lines(part_header(rows), part_lines(rows))
    return f"{title(steps, selection)}.\n\n{main}\n\n{verdict(rows)}\n\nBy part; k of every MoE layer:\n\n{by_part}\n"


def as_json(rows: Sequence[Comparison], steps: int, selection: str) -> dict[str, Any]:
    """The table as plain values; accuracies are shares, not percent."""
    return {
        "steps": steps,
        "selection": selection,
        "rows": [asdict(row) for row in rows],
        "verdict": verdict(rows),
    }


def rich_tables(rows: Sequence[Comparison], steps: int, selection: str, width: int) -> list[Table]:
    """The tables for a terminal of so many columns: on a narrow one without what only the files need."""
    best = max(rows, key=lambda row: row.out_accuracy.mean)
    shown = [place for place, name in enumerate(HEADER) if width >= WIDE or name not in NOT_ON_NARROW]
    main = rich_lines(title(steps, selection), [HEADER[place] for place in shown])
    by_part = rich_lines("By part; k of every MoE layer", part_header(rows))
    for row, parts in zip(rows, part_lines(rows), strict=True):
        style = "bold" if row is best else None
        cells = row.cells()
        main.add_row(*[cells[place] for place in shown], style=style)
        by_part.add_row(*parts, style=style)
    return [main, by_part] if width >= WIDE else [main]
