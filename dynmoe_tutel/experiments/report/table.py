"""The table of a job: rows compared by part of the data, with what they activate and cost, from metrics alone.

Spread is the standard deviation over the seeds; where a task leaves out one part after the other, a seed's value is the
mean over these runs. A part is one domain's data of one kind: held out in domain, or out of domain. The sentence under
the table compares the best row with the others by accuracy out of domain, whoever wins; the claims follow (claims.py).
Rich is imported when a table is drawn.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dynmoe_tutel.experiments.report import claims
from dynmoe_tutel.experiments.task import RunKey

if TYPE_CHECKING:
    from rich.table import Table

NONE = "-"
# The line breaks keep the table narrow.
HEADER = (
    "row",
    "seeds",
    "in domain\n%",
    "out of\ndomain %",
    "mean\nk",
    "experts\nstart",
    "experts\nend",
    "active\nparams",
    "total\nparams",
    "ms a\nstep",
    "x\ndense",
)
WIDE = 160  # columns of a terminal that shows the table by part too
IN_FILES_ALONE = ("seeds", "ms a\nstep", "experts\nstart")  # dropped in this order on a narrow terminal

COMPARED = ("in_accuracy", "out_accuracy", "activated_parameters")

Line = Mapping[str, Any]


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
class RunNumbers:
    """One run: its seed, the part left out (`test`), and what the claims compare of the evaluation that counts."""

    seed: int
    test: str
    in_accuracy: float
    out_accuracy: float
    activated_parameters: float


@dataclass(frozen=True)
class RowSummary:
    """One row of the table. Lists have one entry a MoE layer; a dense row has empty ones and no k.

    `parts` and `k` are by name of the part; `k` has one mean a MoE layer; `step_ratio` is the time of a step over the
    dense row's with the same seed, None without one.
    """

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
    parts: dict[str, Spread] = field(default_factory=dict)
    k: dict[str, list[float]] = field(default_factory=dict)
    step_ratio: Spread | None = None
    by_run: tuple[RunNumbers, ...] = ()

    @property
    def runs(self) -> tuple[tuple[int, str], ...]:
        """The seed and the part left out of each run."""
        return tuple((run.seed, run.test) for run in self.by_run)

    def cells(self) -> list[str]:
        """The row's texts, in the order of HEADER."""
        return [
            self.row,
            str(len(self.seeds)),
            self.in_accuracy.text(100),
            self.out_accuracy.text(100),
            NONE if self.mean_k is None else f"{self.mean_k.mean:.2f}",
            per_layer(self.experts_start),
            per_layer(self.experts_end),
            parameters(self.activated_parameters),
            parameters(self.total_parameters),
            f"{self.step_ms.mean:.{1 if self.step_ms.mean < 100 else 0}f}",
            NONE if self.step_ratio is None else f"{self.step_ratio.mean:.2f}",
        ]

    def part_cells(self) -> list[str]:
        """The row's texts in the table by part: accuracy, then mean k of every layer."""
        accuracy = [spread.text(100) for spread in self.parts.values()]
        return [self.row, *accuracy, *[per_layer(k, 2) for k in self.k.values()]]


def summarise(metrics: Iterable[Line], rows: Sequence[str], steps: int, selection: str = "last") -> list[RowSummary]:
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
) -> RowSummary:
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
    return RowSummary(
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
        by_run=tuple(
            RunNumbers(key.seed, key.test, *[line[name] for name in COMPARED]) for key, line in chosen.items()
        ),
    )


def verdict(rows: Sequence[RowSummary]) -> str:
    """A sentence: which row is best out of domain, by how much, whether that exceeds the spread; another
    where the rows are not means of the same runs."""
    ranked = sorted(rows, key=lambda row: row.out_accuracy.mean, reverse=True)
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
    if len({row.runs for row in rows}) > 1:
        sentence += " The rows are not means over the same seeds and parts left out: do the runs that are missing."
    return sentence


def part_header(rows: Sequence[RowSummary]) -> list[str]:
    """The titles of the table by part."""
    names = list(rows[0].parts)
    has_k = next((list(row.k) for row in rows if row.k), [])
    return ["row", *[f"{name}\n%" for name in names], *[f"k\n{name}" for name in has_k]]


def part_lines(rows: Sequence[RowSummary]) -> list[list[str]]:
    """The cells of the table by part, filled up where a row has no k."""
    width = len(part_header(rows))
    return [row.part_cells() + [NONE] * (width - len(row.part_cells())) for row in rows]


def title(rows: Sequence[RowSummary], steps: int, selection: str) -> str:
    """What the numbers are."""
    after = f"after {steps} steps" if selection == "last" else f"at the best validation accuracy within {steps} steps"
    counts = {len(row.seeds) for row in rows}
    if counts == {1}:
        return f"One seed, {after}"
    seeds = f"{min(counts)} seeds" if len(counts) == 1 else "the seeds"
    return f"Mean over {seeds} {after}, ± standard deviation over the seeds"


def markdown(rows: Sequence[RowSummary], steps: int, selection: str) -> str:
    """Both tables, the verdict and the claims as Markdown."""
    main = markdown_lines(HEADER, [row.cells() for row in rows])
    by_part = markdown_lines(part_header(rows), part_lines(rows))
    said = [verdict(rows), "\n".join(f"* {sentence}" for sentence in claims.sentences(rows))]
    head = "\n\n".join([f"{title(rows, steps, selection)}.", main, *filter(None, said)])
    return f"{head}\n\nBy part; k of every MoE layer:\n\n{by_part}\n"


def as_json(rows: Sequence[RowSummary], steps: int, selection: str) -> dict[str, Any]:
    """The table as plain values; accuracies are shares, not percent."""
    return {
        "steps": steps,
        "selection": selection,
        "rows": [asdict(row) for row in rows],
        "verdict": verdict(rows),
        "claims": [asdict(claim) for claim in claims.claims(rows)],
        "sentences": claims.sentences(rows),
    }


def markdown_lines(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column left and the others right."""
    titles = [name.replace("\n", " ") for name in header]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rich_tables(rows: Sequence[RowSummary], steps: int, selection: str, width: int) -> list[Table]:
    """The tables for a terminal of so many columns: on a narrow one without what only the files need."""
    from rich.console import Console

    best = max(rows, key=lambda row: row.out_accuracy.mean)
    styles = ["bold" if row is best else None for row in rows]
    for dropped in range(len(IN_FILES_ALONE) + 1):
        shown = [place for place, name in enumerate(HEADER) if name not in IN_FILES_ALONE[:dropped]]
        cells = [[row.cells()[place] for place in shown] for row in rows]
        main = _rich_table(title(rows, steps, selection), [HEADER[place] for place in shown], cells, styles)
        if Console(width=10 * WIDE).measure(main).maximum <= width:
            break
    by_part = _rich_table("By part; k of every MoE layer", part_header(rows), part_lines(rows), styles)
    return [main, by_part] if width >= WIDE else [main]


def _rich_table(
    title: str, header: Sequence[str], lines: Iterable[Sequence[str]], styles: Iterable[str | None]
) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right", vertical="bottom")
    for line, style in zip(lines, styles, strict=True):
        table.add_row(*line, style=style)
    return table


def parameters(number: float) -> str:
    """For example "203k" or "22.7M"."""
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"


def per_layer(values: Sequence[float], digits: int = 1) -> str:
    """For example "4 6.3": one number a layer, without decimals where it has none."""
    return " ".join(f"{value:.0f}" if value == round(value) else f"{value:.{digits}f}" for value in values) or NONE
