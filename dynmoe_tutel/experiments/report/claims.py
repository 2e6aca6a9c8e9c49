"""The claims of DynMoE's README as sentences that the numbers of a table decide, each by a paired interval.

A pair is a run of two rows with the same seed and the same part left out; its difference is one sample. The interval
is Student's at 95 %. Accuracy is that out of domain. The best fixed k is the row of highest accuracy in domain: chosen
out of domain, it would be the best by the noise of the very numbers that it is then compared by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynmoe_tutel.experiments.rows import held, is_fixed, routed

if TYPE_CHECKING:
    from dynmoe_tutel.experiments.report.table import RowSummary, RunNumbers

    ByRun = Mapping[tuple[int, str], RunNumbers]  # by seed and part left out

CONFIDENCE = 0.95
ABOVE_MEAN, NEAR_BEST, PARAMETERS = "above the mean of fixed k", "near the best fixed k", "fewer activated parameters"
ABOVE_ROUTER = "above a router that holds as many experts"
NO_LOSS = "near the row without a budget"
NARROW = 0.01  # "below one point" is said of half an interval


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences, half the width of its interval, and of how many pairs and seeds it is."""

    mean: float
    half: float
    pairs: int
    seeds: int

    @classmethod
    def of(cls, differences: Mapping[tuple[int, str], float]) -> Interval:
        """From the differences by seed and part left out, at least two."""
        values = list(differences.values())
        seeds = {seed for seed, _ in differences}
        return cls(statistics.fmean(values), half_width(values), len(values), len(seeds))

    def decides(self, above: float) -> str:
        """Whether the mean is above: "holds", "does not hold" or "not decided", by where the interval lies."""
        if self.mean - self.half > above:
            return "holds"
        return "does not hold" if self.mean + self.half <= above else "not decided"

    def seeds_for(self, half: float) -> int:
        """How many seeds would make half the interval so narrow, at this deviation and as many pairs a seed."""
        deviation = self.half / student(self.pairs) * math.sqrt(self.pairs)
        seeds = 2
        while student(n := round(seeds * self.pairs / self.seeds)) * deviation / math.sqrt(n) > half:
            seeds += 1
        return seeds

    def points(self) -> str:
        """For example "+0.3 points (-1.1 to +1.7, 6 pairs)"."""
        low, mean, high = (_signed(100 * value) for value in (self.mean - self.half, self.mean, self.mean + self.half))
        return f"{mean} points ({low} to {high}, {self.pairs} pairs)"


@dataclass(frozen=True)
class Claim:
    """What is claimed of a row, its state ("holds", "does not hold", "not decided"), by which interval, and in words.

    The interval is of accuracies as shares, or of numbers of parameters.
    """

    row: str
    claim: str
    state: str
    interval: Interval
    sentence: str


def claims(rows: Sequence[RowSummary]) -> list[Claim]:
    """What the finished runs decide: of each DynMoE row three claims against the fixed-k rows, if there are two of
    them, and one against each router of the field that holds as many experts, or takes as many (quantile rows); of one
    with a budget, whether it loses accuracy by it.

    Only runs that all rows of a claim have count, and only those of two seeds or more.
    """
    found = []
    fixed = [row for row in rows if is_fixed(row.row)]
    for row in rows:
        router, k = held(row.row) or (row.row, 0.0)
        if router != "dynmoe":
            continue
        if len(fixed) > 1 and (runs := _common([row, *fixed])):
            found += _against_fixed(row, fixed, runs)
        for other in rows:
            its_router, its_k = routed(other.row) or ("", 0.0)
            if its_router not in ("", "dynmoe") and its_k == k and (runs := _common([row, other])):
                found.append(_against_router(row, other, runs))
            if k and other.row == "dynmoe" and (runs := _common([row, other])):
                found.append(_against_no_budget(row, other, runs))
    return found


def sentences(rows: Sequence[RowSummary]) -> list[str]:
    """The claims in words, and how many seeds would make all intervals of accuracies narrow."""
    found = claims(rows)
    said = [each.sentence for each in found]
    intervals = [each.interval for each in found if each.claim != PARAMETERS]
    if intervals:
        widest = max(intervals, key=lambda each: each.half)
        width = f"The widest of these intervals is ± {100 * widest.half:.1f} points with {widest.seeds} seeds"
        seeds = widest.seeds_for(NARROW)
        more = f": about {seeds} seeds, {seeds - widest.seeds} more, would bring it to ± 1."
        said.append(width + (more if widest.half > NARROW else ", no more than ± 1."))
    return said


def _against_fixed(row: RowSummary, fixed: Sequence[RowSummary], runs: Sequence[tuple[int, str]]) -> list[Claim]:
    own, others = _by_run(row), [_by_run(other) for other in fixed]

    def mean_in_domain(other: RowSummary) -> float:
        return statistics.fmean(_by_run(other)[run].in_accuracy for run in runs)

    best = max(fixed, key=mean_in_domain)  # of equal ones the first
    its = _by_run(best)
    to_mean = Interval.of(
        {run: own[run].out_accuracy - statistics.fmean(each[run].out_accuracy for each in others) for run in runs}
    )
    to_best, spread, near = _near(row, best, runs)
    saved = Interval.of({run: its[run].activated_parameters - own[run].activated_parameters for run in runs})
    above, fewer = to_mean.decides(0), saved.decides(0)
    time = sum(other.step_ms.mean for other in fixed) / row.step_ms.mean
    return [
        Claim(row.row, ABOVE_MEAN, above, to_mean, (
            f"{row.row}, (a) above the mean of the {len(fixed)} fixed-k rows: {above}, {to_mean.points()}."
        )),
        Claim(row.row, NEAR_BEST, near, to_best, (
            f"{row.row}, (b) within the spread of the best fixed k in domain, {best.row} with ± {100 * spread:.1f}: "
            f"{near}, {to_best.points()}. To find that k took {len(fixed) * len(runs)} runs against {len(runs)}: "
            f"{len(fixed)} times the steps and {time:.1f} times the time."
        )),
        Claim(row.row, PARAMETERS, fewer, saved, (
            f"{row.row}, (c) fewer activated parameters than {best.row}: {fewer}, {_parameters(saved)}."
        )),
    ]  # fmt: skip


def _against_router(row: RowSummary, other: RowSummary, runs: Sequence[tuple[int, str]]) -> Claim:
    own, its = _by_run(row), _by_run(other)
    interval = Interval.of({run: own[run].out_accuracy - its[run].out_accuracy for run in runs})
    state = interval.decides(0)
    sentence = f"{row.row}, (d) above {other.row}: {state}, {interval.points()}."
    return Claim(row.row, ABOVE_ROUTER, state, interval, sentence)


def _against_no_budget(row: RowSummary, other: RowSummary, runs: Sequence[tuple[int, str]]) -> Claim:
    interval, spread, state = _near(row, other, runs)
    sentence = f"{row.row}, (e) within the spread of {other.row}, ± {100 * spread:.1f}: {state}, {interval.points()}."
    return Claim(row.row, NO_LOSS, state, interval, sentence)


def _near(row: RowSummary, other: RowSummary, runs: Sequence[tuple[int, str]]) -> tuple[Interval, float, str]:
    """The row's accuracy less the other's, the other's spread over the seeds, and whether it is as near or above."""
    own, its = _by_run(row), _by_run(other)
    interval = Interval.of({run: own[run].out_accuracy - its[run].out_accuracy for run in runs})
    spread = _spread({run: its[run].out_accuracy for run in runs})
    # Near is the spread below or less: nextafter makes "above" of that.
    return interval, spread, interval.decides(math.nextafter(-spread, -1))


def _by_run(row: RowSummary) -> ByRun:
    return {(run.seed, run.test): run for run in row.by_run}


def _common(rows: Sequence[RowSummary]) -> list[tuple[int, str]]:
    """The runs that all these rows have; none, if they are of one seed, which says nothing."""
    shared = sorted(set.intersection(*[set(row.runs) for row in rows]))
    return shared if len({seed for seed, _ in shared}) > 1 else []


def _spread(value: Mapping[tuple[int, str], float]) -> float:
    """The standard deviation over the seeds that the table shows: a seed's value is the mean over its parts."""
    seeds = {seed for seed, _ in value}
    return statistics.stdev(statistics.fmean(v for run, v in value.items() if run[0] == seed) for seed in seeds)


def half_width(values: Sequence[float]) -> float:
    """Half of Student's interval of the mean of these samples, at least two."""
    return student(len(values)) * statistics.stdev(values) / math.sqrt(len(values))


def student(samples: int) -> float:
    """The quantile of Student's t that bounds the mean of so many samples on both sides."""
    from scipy.special import stdtrit

    return float(stdtrit(samples - 1, (1 + CONFIDENCE) / 2))


def _signed(value: float, digits: int = 1) -> str:
    """With its sign, also that of zero: "+0.0"."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def _parameters(saved: Interval) -> str:
    """For example "+252k (+240k to +264k, 6 pairs)": the row's parameters less the other's."""
    unit, name = (1e6, "M") if abs(saved.mean) >= 1e6 else (1e3, "k")
    low, mean, high = (-saved.mean - saved.half, -saved.mean, -saved.mean + saved.half)
    shown = [_signed(value / unit, 1 if unit == 1e6 else 0) + name for value in (mean, low, high)]
    return f"{shown[0]} ({shown[1]} to {shown[2]}, {saved.pairs} pairs)"
