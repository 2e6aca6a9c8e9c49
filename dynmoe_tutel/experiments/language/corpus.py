"""Labelled texts of several domains, dealt into training, validation and test: what the language tasks train on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

T = TypeVar("T")

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
# Which document belongs to which part is a property of the benchmark, not of a run's seed.
SPLIT_SEED = 20240523


@dataclass(frozen=True)
class Example:
    """One text, or pair of texts, with its class. Examples of one `document` are never in different parts."""

    text: str
    label: int
    pair: str | None = None
    document: str = ""


@dataclass(frozen=True)
class Corpus:
    """Examples by domain. `train`, `validation` and `inside` are of the domains trained on, `outside` of the others."""

    train: dict[str, list[Example]]
    validation: dict[str, list[Example]]
    inside: dict[str, list[Example]]
    outside: dict[str, list[Example]]
    classes: int = 2
    about: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """By part and domain: number of examples, the share of the commonest class, a fingerprint. For config.json."""
        parts = {"train": self.train, "validation": self.validation, "in": self.inside, "out": self.outside}
        return {
            **self.about,
            **{part: {name: _summary(each) for name, each in domains.items()} for part, domains in parts.items()},
        }


def without_repeats(domains: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """Every text once, over all domains: the first of those that differ in case and spaces alone is kept."""
    seen: set[tuple[str, str]] = set()
    result: dict[str, list[Example]] = {}
    for name, examples in domains.items():
        result[name] = []
        for example in examples:
            words = (" ".join(example.text.casefold().split()), " ".join((example.pair or "").casefold().split()))
            if words not in seen:
                seen.add(words)
                result[name].append(example)
    return result


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example], list[Example]]:
    """Training, validation and test examples: whole documents, dealt in an order that is always the same.

    ValueError where there are too few documents for three parts.
    """
    documents = list(dict.fromkeys(example.document or example.text for example in examples))
    held_out = [max(1, round(share * len(documents))) for share in (TEST_SHARE, VALIDATION_SHARE)]
    if sum(held_out) >= len(documents):
        raise ValueError(f"{len(documents)} documents are too few for training, validation and test")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    place = {documents[position]: rank for rank, position in enumerate(order)}
    parts: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for example in examples:
        rank = place[example.document or example.text]
        parts[2 if rank < held_out[0] else 1 if rank < sum(held_out) else 0].append(example)
    return parts


def sample(examples: Sequence[T], limit: int) -> list[T]:
    """At most `limit` examples, chosen at random but always the same, in their order."""
    if len(examples) <= limit:
        return list(examples)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SPLIT_SEED + 1))
    return [examples[position] for position in sorted(order[:limit].tolist())]


def _summary(examples: Sequence[Example]) -> dict[str, Any]:
    labels = [example.label for example in examples]
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.text, example.pair, example.label)).encode())
    commonest = max((labels.count(label) for label in set(labels)), default=0)
    return {
        "examples": len(labels),
        "commonest_class": round(commonest / max(1, len(labels)), 4),
        "sha256": digest.hexdigest()[:16],
    }
