"""GLUE tasks with data sets of the same question from elsewhere, as GLUE-X pairs them, read by `datasets`.

From the hub, or from a folder of saved copies: DATA/<name>, each a `DatasetDict` written by `save_to_disk`. GLUE's own
test labels are not public: its validation split is what is tested in domain, and validation is dealt from training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dynmoe_tutel.experiments.language.corpus import Corpus, Example, sample, split, without_repeats

MOST = 20_000  # examples read of a split, chosen always the same


@dataclass(frozen=True)
class Source:
    """A data set: where it is, its columns, and what its labels are called here (others are left out)."""

    path: str
    config: str | None
    columns: tuple[str, ...]
    split: str
    labels: Mapping[Any, int]
    label: str = "label"


BINARY: dict[Any, int] = {0: 0, 1: 1}
ENTAILMENT: dict[Any, int] = {0: 0, 1: 1, 2: 2}
GLUE, PAIR = "nyu-mll/glue", ("sentence1", "sentence2")
PREMISE = ("premise", "hypothesis")

# (training split, held-out split) of the task, then its partners by name.
TASKS: dict[str, tuple[Source, str, dict[str, Source]]] = {
    "sst2": (
        Source(GLUE, "sst2", ("sentence",), "train", BINARY),
        "validation",
        {
            "imdb": Source("stanfordnlp/imdb", None, ("text",), "test", BINARY),
            "yelp": Source("fancyzhx/yelp_polarity", None, ("text",), "test", BINARY),
            "amazon": Source("fancyzhx/amazon_polarity", None, ("content",), "test", BINARY),
        },
    ),
    "mnli": (
        Source(GLUE, "mnli", PREMISE, "train", ENTAILMENT),
        "validation_matched",
        {
            "mismatched": Source(GLUE, "mnli", PREMISE, "validation_mismatched", ENTAILMENT),
            "snli": Source("stanfordnlp/snli", None, PREMISE, "test", ENTAILMENT),
        },
    ),
    "rte": (
        Source(GLUE, "rte", PAIR, "train", BINARY),
        "validation",
        {"hans": Source("jhu-cogsci/hans", None, PREMISE, "validation", BINARY)},
    ),
    "mrpc": (
        Source(GLUE, "mrpc", PAIR, "train", BINARY),
        "validation",
        {"qqp": Source(GLUE, "qqp", ("question1", "question2"), "validation", BINARY)},
    ),
    "qqp": (
        Source(GLUE, "qqp", ("question1", "question2"), "train", BINARY),
        "validation",
        {"mrpc": Source(GLUE, "mrpc", PAIR, "validation", BINARY)},
    ),
}


def load_glue(task: str, data: Path | None = None) -> Corpus:
    """The task as the only domain trained on, its partners out of domain.

    ValueError for an unknown task and where a data set cannot be had or read.
    """
    if task not in TASKS:
        raise ValueError(f"task must be sentiment or one of {', '.join(TASKS)}, got {task!r}")
    training, held_out, partners = TASKS[task]
    inside = Source(training.path, training.config, training.columns, held_out, training.labels)
    found = {"inside": _read(task, inside, data)}
    found |= {name: _read(name, source, data) for name, source in partners.items()}
    found["train"] = _read(task, training, data)  # last: of a text in several, the test keeps it
    found = without_repeats(found)
    examples = found.pop("train")
    # GLUE has no test labels here, so all of training is training or validation.
    train, validation, rest = split(examples)
    return Corpus(
        train={task: [*train, *rest]},
        validation={task: validation},
        inside={task: found.pop("inside")},
        outside=found,
        classes=1 + max(training.labels.values()),
    )


def _read(name: str, source: Source, data: Path | None) -> list[Example]:
    rows = _split_of(name, source, data)
    missing = [column for column in (*source.columns, source.label) if column not in rows.column_names]
    if missing:
        raise ValueError(f"data set {name} lacks the column {missing[0]!r}, it has {', '.join(rows.column_names)}")
    result = []
    for row in sample(range(len(rows)), MOST):
        fields = rows[row]
        label = source.labels.get(fields[source.label])
        if label is not None:
            texts = [fields[column] for column in source.columns]
            result.append(Example(texts[0], label, texts[1] if len(texts) > 1 else None))
    if not result:
        raise ValueError(f"data set {name} has no labelled example in its split {source.split!r}")
    return result


def _split_of(name: str, source: Source, data: Path | None) -> Any:
    datasets = _datasets()
    if data is not None:
        folder = data / name
        if not folder.is_dir():
            raise ValueError(f"--data {data} has no folder {name}, a DatasetDict saved by save_to_disk")
        try:
            content = datasets.load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is not a DatasetDict saved by save_to_disk: {error}") from error
    else:
        try:
            content = datasets.load_dataset(source.path, source.config)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"data set {source.path} cannot be loaded ({error}). On a machine with network, save it with "
                f"datasets.load_dataset({source.path!r}, {source.config!r}).save_to_disk('DATA/{name}'), "
                "then give --data DATA"
            ) from error
    if source.split not in content:
        raise ValueError(f"data set {name} has no split {source.split!r}, it has {', '.join(content)}")
    return content[source.split]


def _datasets() -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise ImportError(
            "GLUE tasks need datasets, which is not installed: pip install 'dynmoe_tutel[language]'"
        ) from error
