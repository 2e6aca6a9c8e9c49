"""The numbers of a job by variant and seed, paired differences with their interval, and sentences that these decide."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynmoe_tutel.experiments.report.claims import half_width
from dynmoe_tutel.experiments.report.table import Spread

Line = Mapping[str, Any]
Seeds = Mapping[int, float]  # a number by seed
NONE = "-"
CONFIDENCE = "95 %"


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of a difference within each seed; `half` is half of its 95 % interval, None with one seed."""

    mean: float
    half: float | None
    pairs: int

    @classmethod
    def of(cls, values: Seeds, others: Seeds) -> Difference:
        """Over the seeds that both have. ValueError where there is none."""
        pairs = [values[seed] - others[seed] for seed in values if seed in others]
        if not pairs:
            raise ValueError("a paired difference needs a seed that both have")
        if len(pairs) == 1:
            return cls(pairs[0], None, 1)
        return cls(statistics.fmean(pairs), half_width(pairs), len(pairs))

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half

    def text(self, digits: int = 1) -> str:
        """For example "+0.8 [-1.1, +2.7]"."""
        if self.half is None:
            return f"{self.mean:+.{digits}f}"
        low, high = self.mean - self.half, self.mean + self.half
        return f"{self.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


@dataclass(frozen=True)
class Quantity:
    """A number of a run: its title in tables, how a sentence about it begins, its unit there, its decimals."""

    key: str
    title: str
    by: str
    unit: str = ""
    digits: int = 1


IN = Quantity("in", "in domain %", "In domain", " points")
OUT = Quantity("out", "out of domain %", "Out of domain", " points")
MEAN_K = Quantity("k", "mean k", "In mean k", digits=2)
EXPERTS = Quantity("experts", "experts", "In the number of experts")


@dataclass(frozen=True)
class Results:
    """The finished runs of a job: their evaluations by variant and seed. `path` is the job's folder."""

    path: Path
    evaluations: Mapping[str, Mapping[int, Sequence[Line]]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, metrics: Iterable[Line], steps: int) -> Results:
        """From the logs of all runs."""
        found: dict[str, dict[int, list[Line]]] = {}
        for line in metrics:
            if line["kind"] == "eval":
                found.setdefault(line["row"], {}).setdefault(line["seed"], []).append(line)
        whole = {
            row: {seed: lines for seed, lines in sorted(by_seed.items()) if lines[-1]["step"] == steps}
            for row, by_seed in found.items()
        }
        return cls(path, {row: by_seed for row, by_seed in whole.items() if by_seed})

    def have(self, names: Iterable[str]) -> list[str]:
        """Those of the variants that have a finished run."""
        return [name for name in names if name in self.evaluations]

    def values(self, variant: str, quantity: Quantity) -> dict[int, float]:
        """By seed, after the last step; empty where the variant has no such number."""
        lines = {seed: lines[-1] for seed, lines in self.evaluations.get(variant, {}).items()}
        if quantity in (IN, OUT):
            return {seed: 100 * line[f"{quantity.key}_accuracy"] for seed, line in lines.items()}
        if not all(line["layers"] for line in lines.values()):
            return {}
        return {
            seed: statistics.fmean(layer[quantity.key] for layer in line["layers"].values())
            for seed, line in lines.items()
        }

    def spread(self, variant: str, quantity: Quantity) -> Spread | None:
        """Mean and standard deviation over the seeds."""
        values = list(self.values(variant, quantity).values())
        return Spread.of(values) if values else None

    def difference(self, variant: str, reference: str, quantity: Quantity) -> Difference | None:
        """Paired over the seeds that both have; None where there is none."""
        values, others = self.values(variant, quantity), self.values(reference, quantity)
        return Difference.of(values, others) if set(values) & set(others) else None


def text(spread: Spread | None, digits: int = 1) -> str:
    return NONE if spread is None else spread.text(digits=digits)


def comparison(results: Results, names: Sequence[str], reference: str, about: Mapping[str, str]) -> list[list[str]]:
    """Rows of a table, of the columns `comparison_header`; the first is the reference's."""
    rows = []
    for name in results.have(dict.fromkeys([reference, *names])):
        differences = [
            None if name == reference else results.difference(name, reference, quantity) for quantity in (IN, OUT)
        ]
        rows.append(
            [
                f"`{name}`: {about[name]}",
                str(len(results.evaluations[name])),
                *[text(results.spread(name, quantity)) for quantity in (IN, OUT)],
                *[NONE if each is None else each.text() for each in differences],
                text(results.spread(name, MEAN_K), 2),
                text(results.spread(name, EXPERTS)),
            ]
        )
    return rows


def comparison_header(reference: str) -> list[str]:
    return [
        "variant",
        "seeds",
        IN.title,
        OUT.title,
        f"in domain, minus `{reference}`",
        f"out of domain, minus `{reference}`",
        MEAN_K.title,
        EXPERTS.title,
    ]


def differing(results: Results, names: Sequence[str], reference: str, quantity: Quantity) -> str:
    """A sentence: which of the variants differ from the reference in a quantity beyond the paired interval. Empty
    where there is nothing to compare."""
    found: dict[str, Difference] = {}
    for name in results.have(names) if results.have([reference]) else ():
        difference = None if name == reference else results.difference(name, reference, quantity)
        if difference is not None:
            found[name] = difference
    if not found:
        return ""
    halves = [each.half for each in found.values() if each.half is not None]
    if not halves:
        return f"One seed says nothing about differences from `{reference}`."
    clear = {name: each for name, each in found.items() if each.is_clear}
    width = f"the widest {CONFIDENCE} interval is ± {max(halves):.{quantity.digits}f}{quantity.unit}"
    if not clear:
        names = f"`{next(iter(found))}` does not differ" if len(found) == 1 else f"none of the {len(found)} differs"
        return f"{quantity.by} {names} from `{reference}` beyond the interval; {width}."
    listed = "; ".join(f"`{name}` {each.text(quantity.digits)}{quantity.unit}" for name, each in clear.items())
    others = len(found) - len(clear)
    rest = {0: "", 1: " The other does not."}.get(others, f" The other {others} do not.")
    return f"{quantity.by} these differ from `{reference}` beyond the {CONFIDENCE} interval: {listed}.{rest}"
