"""What an answer consists of: a table, sentences that its numbers decide, and a picture to be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynmoe_tutel.experiments.questions.results import Results


@dataclass(frozen=True)
class Panel:
    """Values by name, each with the ends of its bar; names are shown in this order from above. `line` is a value to
    compare with, such as no difference."""

    title: str
    values: Mapping[str, tuple[float, float, float]]
    line: float | None = None


@dataclass(frozen=True)
class Curves:
    """Curves by label, each as x and (mean, low, high)."""

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[tuple[float, tuple[float, float, float]]]]


@dataclass(frozen=True)
class Answer:
    """`tables`: a caption (may be empty), a header and rows; `panels` and `note` are the picture."""

    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]]
    sentence: str
    panels: Sequence[Panel | Curves] = ()
    note: str = ""


@dataclass(frozen=True)
class Question:
    """One question: the variants that it trains, how the answer is read from the results, what it cannot show.

    `of_texts` is what it cannot show on the text model of --language; None: texts do not answer it.
    """

    number: int
    title: str
    asked: str
    variants: tuple[str, ...]
    answer: Callable[[Results], Answer]
    cannot: str
    of_texts: str | None
