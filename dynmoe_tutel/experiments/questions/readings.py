"""Answers that are read from the runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from dynmoe_tutel.experiments.questions.answer import Answer, Curves, Panel
from dynmoe_tutel.experiments.questions.results import (
    CONFIDENCE,
    EXPERTS,
    IN,
    MEAN_K,
    OUT,
    Quantity,
    Results,
    comparison,
    comparison_header,
    differing,
    text,
)
from dynmoe_tutel.experiments.questions.variants import FIXED, VARIANTS

ABOUT = {name: variant.about for name, variant in VARIANTS.items()}
INTERVALS_NOTE = f"mark: mean of the paired differences over the seeds, bar: their {CONFIDENCE} interval"
RANGES_NOTE = "mark: mean of the seeds, bar: their range"


def against(
    reference: str, names: Sequence[str], quantities: Sequence[Quantity] = (OUT, IN, MEAN_K, EXPERTS)
) -> Callable[[Results], Answer]:
    """The answer that compares variants with a reference; `quantities` get a sentence each."""

    def answer(results: Results) -> Answer:
        found = [differing(results, names, reference, quantity) for quantity in quantities]
        return Answer(
            [("", comparison_header(reference), comparison(results, names, reference, ABOUT))],
            _joined(found),
            differences(results, names, reference) + ranges(results, [reference, *names]),
            f"differences: {INTERVALS_NOTE}; mean k and experts: {RANGES_NOTE}",
        )

    return answer


def spreads(results: Results) -> Answer:
    """Of every variant that was run."""
    names = results.have(VARIANTS)
    rows = [
        [f"`{name}`", str(len(results.evaluations[name]))]
        + [text(results.spread(name, quantity), quantity.digits) for quantity in (IN, OUT, MEAN_K, EXPERTS)]
        for name in names
    ]
    header = ["variant", "seeds", *[quantity.title for quantity in (IN, OUT, MEAN_K, EXPERTS)]]
    of_out = [results.spread(name, OUT) for name in names]
    found = [each.deviation for each in of_out if each is not None and each.deviation is not None]
    if not found:
        sentence = "One seed has no spread."
    else:
        middle = statistics.median(found)
        needed = max(2, round(2 * (1.96 * middle) ** 2))
        means = [each.mean for each in of_out if each is not None]
        sentence = (
            f"Out of domain the standard deviation over the seeds is {min(found):.1f} to {max(found):.1f} points, in "
            f"the median {middle:.1f}; the means of the {len(names)} variants lie within "
            f"{max(means) - min(means):.1f} points. At the median, an unpaired difference of one point "
            f"needs about {needed} seeds a variant."
        )
    panels = [
        Panel(quantity.title, {name: _mean_range(list(results.values(name, quantity).values())) for name in names})
        for quantity in (IN, OUT)
    ]
    return Answer([("Mean ± standard deviation over the seeds:", header, rows)], sentence, panels, RANGES_NOTE)


def starts(results: Results) -> Answer:
    """DynMoE against dense and fixed k, from random weights and from a trained dense model."""
    rows = []
    for names in (("dense", FIXED, "dynmoe"), ("dense-tuned", f"{FIXED}-tuned", "dynmoe-tuned")):
        rows += comparison(results, [name for name in names if name != names[-1]], names[-1], ABOUT)
    header = comparison_header("dynmoe")
    header[4:6] = ["in domain, minus DynMoE of the same start", "out of domain, minus the same"]
    tuned = ("dense-tuned", f"{FIXED}-tuned")
    sentences = [
        differing(results, ("dense", FIXED), "dynmoe", OUT),
        differing(results, tuned, "dynmoe-tuned", OUT),
        differing(results, ("dynmoe-tuned",), "dynmoe", OUT),
        differing(results, ("dynmoe-tuned",), "dynmoe", MEAN_K),
    ]
    panels = differences(results, ("dense", FIXED), "dynmoe") + differences(results, tuned, "dynmoe-tuned")
    return Answer([("", header, rows)], _joined(sentences), panels, INTERVALS_NOTE)


def fallback(names: Sequence[str]) -> Callable[[Results], Answer]:
    """The answer of how many tokens pass no threshold in evaluation, by layer and step."""

    def answer(results: Results) -> Answer:
        header = ["variant", "layer", "in domain %", "out of domain %", "highest of any evaluation, out of domain %"]
        rows, panels, ends = [], [], []
        for name in results.have(names):
            by_seed = results.evaluations[name]
            layers = list(next(iter(by_seed.values()))[-1]["layers"])
            curves: dict[str, list[tuple[float, tuple[float, float, float]]]] = {}
            for layer in layers:
                inside, outside = (
                    _unrouted(results, name, "layers", layer),
                    _unrouted(results, name, "layers_out", layer),
                )
                curves |= {f"{layer}, in domain": inside, f"{layer}, out of domain": outside}
                last = [each[-1][1] for each in (inside, outside)]
                highest = max(value[2] for _, value in outside)
                ends.append((last[1][0], name, layer))
                rows.append([f"`{name}`", f"`{layer}`", *[_with_range(each) for each in last], f"{highest:.1f}"])
            panels.append(Curves(name, "training step", "tokens that fall back, %", curves))
        if not ends:
            return Answer([("", header, rows)], "None of the runs has been done.")
        least, most = min(ends), max(ends)
        sentence = (
            f"After the last step the share of tokens that fall back out of domain is from {least[0]:.1f} % "
            f"(`{least[1]}`, `{least[2]}`) to {most[0]:.1f} % (`{most[1]}`, `{most[2]}`), mean over the seeds."
        )
        caption = "After the last step, mean over the seeds and their range:"
        return Answer([(caption, header, rows)], sentence, panels, "line: mean of the seeds, band: their range")

    return answer


def _joined(sentences: Sequence[str]) -> str:
    """Each once."""
    return " ".join(dict.fromkeys(filter(None, sentences))) or "Nothing to compare has been run."


def differences(results: Results, names: Sequence[str], reference: str) -> list[Panel]:
    """The panel of paired differences out of domain."""
    values = {}
    for name in results.have(names) if results.have([reference]) else ():
        difference = None if name == reference else results.difference(name, reference, OUT)
        if difference is not None:
            half = difference.half or 0.0
            values[name] = (difference.mean, difference.mean - half, difference.mean + half)
    return [Panel(f"points out of domain, minus {reference}", values, 0.0)] if values else []


def ranges(results: Results, names: Sequence[str]) -> list[Panel]:
    """The panels of mean k and of the experts."""
    panels = []
    for quantity in (MEAN_K, EXPERTS):
        values = {name: list(results.values(name, quantity).values()) for name in results.have(dict.fromkeys(names))}
        having = {name: _mean_range(of_seeds) for name, of_seeds in values.items() if of_seeds}
        panels += [Panel(quantity.title, having)] if having else []
    return panels


def _unrouted(results: Results, name: str, part: str, layer: str) -> list[tuple[float, tuple[float, float, float]]]:
    """By step: the share of tokens that pass no threshold, percent, as (mean, low, high) over the seeds."""
    by_step: dict[int, list[float]] = {}
    for lines in results.evaluations[name].values():
        for line in lines:
            by_step.setdefault(line["step"], []).append(100 * line[part][layer]["unrouted"])
    return [(step, _mean_range(values)) for step, values in sorted(by_step.items())]


def _mean_range(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.fmean(values), min(values), max(values)


def _with_range(value: tuple[float, float, float]) -> str:
    mean, low, high = value
    return f"{mean:.1f} ({low:.1f} to {high:.1f})" if low != high else f"{mean:.1f}"
