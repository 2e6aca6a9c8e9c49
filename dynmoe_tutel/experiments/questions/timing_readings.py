"""Answers that are read from what was timed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dynmoe_tutel.experiments.questions import timing
from dynmoe_tutel.experiments.questions.answer import Answer, Panel
from dynmoe_tutel.experiments.questions.results import NONE, Results
from dynmoe_tutel.experiments.questions.variants import BUDGET, PLAIN

QUARTILES_NOTE = "mark: median of the ratios in one round, bar: their quartiles"
TABLES = {
    timing.STEP: ("A whole step: batch, forward, backward, optimizer, controller", PLAIN),
    timing.LAYER: ("The layer alone, forward and backward, as large as in the digits' model", timing.UNMODIFIED),
    timing.WIDE: ("A wider layer, forward and backward", timing.UNMODIFIED),
}

Measured = Sequence[Mapping[str, Any]]


def step_times(results: Results) -> Answer:
    """Against dense and against an unmodified top-k."""
    tables, panels, sentences = [], [], []
    for name, (title, plain) in TABLES.items():
        measured = timing.read(results.path, 1, name)
        if not measured:
            continue
        subjects = list(measured[0]["ms"])
        others = [other for other in (timing.DENSE, plain) if other in subjects]
        header = ["", "ms", *[f"x `{other}`, median and quartiles" for other in others], "seeds' medians", "mean k"]
        rows = [
            [f"`{subject}`", _ms(measured, subject), *[_ratio(measured, subject, other) for other in others],
             _range(measured, subject, others[-1]), _k(measured, subject)]
            for subject in subjects
        ]  # fmt: skip
        if name in timing.SIZES:
            title += " (D = {}, H = {}, T = {}, 8 experts)".format(*timing.SIZES[name])
        tables.append((f"{title}; the seeds' medians are those over `{others[-1]}`:", header, rows))
        panels.append(_panel(measured, subjects, timing.DENSE, f"{name}: time over dense"))
        held = BUDGET if name == timing.STEP else timing.HELD
        compared = " and ".join(f"{_median(measured, held, other):.2f} times `{other}`" for other in others)
        sentences.append(f"`{held}` at a mean k of {_k(measured, held)} takes {compared} ({name}).")
    if not tables:
        return Answer([], "Nothing has been timed.")
    return Answer(tables, " ".join(sentences), panels, QUARTILES_NOTE)


def raggedness(results: Results) -> Answer:
    """Of layers with equally many assignments, dealt to tokens and experts in different ways."""
    tables, panels, sentences = [], [], []
    header = ["routing", "assignments", "variance of k", "ms", "x equal k, median and quartiles", "seeds' medians",
              "rows of a padded layout, x needed"]  # fmt: skip
    for name, size in timing.RAGGED_SIZES.items():
        measured = timing.read(results.path, 11, name)
        if not measured:
            continue
        subjects = list(measured[0]["ms"])
        equal, facts = subjects[0], measured[0]["facts"]
        rows = [
            [subject, str(facts[subject]["assignments"]), f"{facts[subject]['variance']:.1f}", _ms(measured, subject),
             _ratio(measured, subject, equal), _range(measured, subject, equal), f"{facts[subject]['padded']:.2f}"]
            for subject in subjects
        ]  # fmt: skip
        tables.append(("D = {}, H = {}, T = {}, 8 experts:".format(*size), header, rows))
        panels.append(_panel(measured, subjects, equal, "D = {}: time over equal k".format(*size)))
        *uneven_k, uneven_load = subjects[1:]
        medians = [_median(measured, subject, equal) for subject in uneven_k]
        sentences.append(
            f"At D = {size[0]}, unequal k takes {min(medians):.2f} to {max(medians):.2f} times equal k, and an uneven load "
            f"{_median(measured, uneven_load, equal):.2f} times; rows padded to the fullest expert would be "
            f"{facts[uneven_load]['padded']:.2f} times as many."
        )
    if not tables:
        return Answer([], "Nothing has been timed.")
    return Answer(tables, " ".join(sentences), panels, QUARTILES_NOTE)


def _ms(measured: Measured, subject: str) -> str:
    return f"{statistics.median(ms for each in measured for ms in each['ms'][subject]):.2f}"


def _median(measured: Measured, subject: str, over: str) -> float:
    return statistics.median(timing.ratios(measured, subject, over))


def _quartiles(measured: Measured, subject: str, over: str) -> tuple[float, float, float]:
    """(median, first, third)."""
    ratios = timing.ratios(measured, subject, over)
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def _ratio(measured: Measured, subject: str, over: str) -> str:
    if subject == over:
        return "1"
    middle, low, high = _quartiles(measured, subject, over)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _range(measured: Measured, subject: str, over: str) -> str:
    if subject == over:
        return NONE
    return "{:.2f} to {:.2f}".format(*timing.seeds_range(measured, subject, over))


def _k(measured: Measured, subject: str) -> str:
    values = [each["k"].get(subject) for each in measured]
    if subject in (PLAIN, timing.UNMODIFIED):
        return "2"
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2f}" if known else NONE


def _panel(measured: Measured, subjects: Sequence[str], over: str, title: str) -> Panel:
    return Panel(title, {subject: _quartiles(measured, subject, over) for subject in subjects if subject != over}, 1.0)
