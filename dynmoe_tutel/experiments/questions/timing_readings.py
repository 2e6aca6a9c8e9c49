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
STEP_TITLE = "A whole step: batch, forward, backward, optimizer, controller"
LAYER_TITLE = "The layer alone, forward and backward, D = {}, H = {}, T = {}"

Measured = Sequence[Mapping[str, Any]]


def step_times(results: Results) -> Answer:
    """Against dense and against an unmodified top-k."""
    tables, panels, sentences = [], [], []
    for name in (timing.STEP, *timing.SIZES):
        measured = timing.read(results.path, 1, name)
        if not measured:
            continue
        is_step = name == timing.STEP
        subjects = list(measured[0]["ms"])
        others = [other for other in (timing.DENSE, PLAIN if is_step else timing.UNMODIFIED) if other in subjects]
        title = STEP_TITLE if is_step else LAYER_TITLE.format(*timing.SIZES[name])
        header = ["", "ms", *[f"x `{other}`, median (quartiles)" for other in others],
                  f"seeds' medians, x `{others[-1]}`", "mean k", "experts"]  # fmt: skip
        rows = [
            [f"`{subject}`", _ms(measured, subject), *[_ratio(measured, subject, other) for other in others],
             _range(measured, subject, others[-1]), *_routed(measured, subject)]
            for subject in subjects
        ]  # fmt: skip
        tables.append((f"{title}; {measured[0]['clock']}:", header, rows))
        of_layer = "" if is_step else ", D = {}".format(*timing.SIZES[name])
        panels.append(_panel(measured, subjects, timing.DENSE, f"{'step' if is_step else 'layer'}{of_layer}: x dense"))
        held = BUDGET if is_step else timing.HELD
        compared = " and ".join(f"{_ratio(measured, held, other)} times `{other}`" for other in others)
        where = "A whole step of" if is_step else f"The layer alone{of_layer}, with"
        sentences.append(f"{where} `{held}` at a mean k of {_routed(measured, held)[0]} takes {compared}.")
    if not tables:
        return Answer([], "Nothing has been timed.")
    return Answer(tables, " ".join(sentences), panels, QUARTILES_NOTE)


def raggedness(results: Results) -> Answer:
    """Of layers with equally many assignments, dealt to tokens and experts in different ways."""
    tables, panels, sentences = [], [], []
    header = ["routing", "assignments", "variance of k", "ms", "x equal k, median (quartiles)", "seeds' medians",
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
        caption = "D = {}, H = {}, T = {}, 8 experts".format(*size)
        tables.append((f"{caption}; {measured[0]['clock']}:", header, rows))
        panels.append(_panel(measured, subjects, equal, "D = {}: time over equal k".format(*size)))
        *uneven_k, uneven_load = subjects[1:]
        medians = [_median(measured, subject, equal) for subject in uneven_k]
        sentences.append(
            f"At D = {size[0]}, unequal k takes {min(medians):.2f} to {max(medians):.2f} times equal k, and an uneven "
            f"load {_median(measured, uneven_load, equal):.2f} times; rows padded to the fullest expert would be "
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


def _routed(measured: Measured, subject: str) -> tuple[str, str]:
    """(mean k, experts), mean over the seeds."""
    found = [each["routed"][subject] for each in measured if subject in each["routed"]]
    if not found:
        return NONE, NONE
    k, experts = (statistics.fmean(values) for values in zip(*found, strict=True))
    return f"{k:.2f}", f"{experts:.1f}"


def _panel(measured: Measured, subjects: Sequence[str], over: str, title: str) -> Panel:
    return Panel(title, {subject: _quartiles(measured, subject, over) for subject in subjects if subject != over}, 1.0)
