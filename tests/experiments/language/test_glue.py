"""GLUE tasks with their partners, read by the datasets library from small saved copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynmoe_tutel.experiments.language.glue import TASKS, load_glue

datasets = pytest.importorskip("datasets")


def save(folder: Path, **splits: dict[str, list[Any]]) -> None:
    content = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    datasets.DatasetDict(content).save_to_disk(str(folder))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """sst2 and its partners; "text 0" occurs in training and in a test, and one label is hidden."""
    sentences = [f"text {n}" for n in range(40)]
    save(
        tmp_path / "sst2",
        train={"sentence": sentences, "label": [n % 2 for n in range(40)]},
        validation={"sentence": ["Text  0", "held out", "hidden"], "label": [0, 1, -1]},
    )
    for name, column in (("imdb", "text"), ("yelp", "text"), ("amazon", "content")):
        save(tmp_path / name, test={column: [f"{name} good", f"{name} bad"], "label": [1, 0]})
    return tmp_path


def test_a_task_and_its_partners_are_dealt_into_parts(saved: Path) -> None:
    corpus = load_glue("sst2", saved)
    assert [e.text for e in corpus.inside["sst2"]] == ["Text  0", "held out"]
    assert list(corpus.outside) == ["imdb", "yelp", "amazon"]
    assert [(e.text, e.label) for e in corpus.outside["amazon"]] == [("amazon good", 1), ("amazon bad", 0)]
    trained, validated = ({e.text for e in part["sst2"]} for part in (corpus.train, corpus.validation))
    assert len(trained) + len(validated) == 39
    assert not trained & validated
    assert "text 0" not in trained | validated, "the test keeps a text that training has too"
    assert corpus.classes == 2


def test_pairs_and_three_classes(tmp_path: Path) -> None:
    def pairs(name: str, number: int) -> dict[str, list[Any]]:
        return {
            "premise": [f"{name} {n}" for n in range(number)],
            "hypothesis": ["h"] * number,
            "label": [n % 4 - 1 for n in range(number)],
        }

    matched, mismatched = pairs("matched", 4), pairs("mismatched", 4)
    save(tmp_path / "mnli", train=pairs("p", 40), validation_matched=matched, validation_mismatched=mismatched)
    save(tmp_path / "mismatched", validation_mismatched=mismatched)
    save(tmp_path / "snli", test=pairs("s", 8))
    corpus = load_glue("mnli", tmp_path)
    assert corpus.classes == 3
    assert [(e.text, e.pair, e.label) for e in corpus.inside["mnli"]] == [
        (f"matched {n}", "h", n - 1) for n in (1, 2, 3)
    ]
    assert len(corpus.outside["snli"]) == 6


def test_what_is_missing_is_named(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"one of {', '.join(TASKS)}, got 'cola'"):
        load_glue("cola", saved)
    with pytest.raises(ValueError, match="has no folder rte"):
        load_glue("rte", saved)
    save(saved / "rte", train={"sentence1": ["a"], "label": [0]}, validation={"sentence1": ["a"], "label": [0]})
    with pytest.raises(ValueError, match=r"rte lacks the column 'sentence2', it has sentence1, label"):
        load_glue("rte", saved)
    save(saved / "mrpc", train={"sentence1": ["a"], "sentence2": ["b"], "label": [0]})
    with pytest.raises(ValueError, match="mrpc has no split 'validation', it has train"):
        load_glue("mrpc", saved)
    (saved / "qqp").mkdir()
    with pytest.raises(ValueError, match="qqp is not a DatasetDict"):
        load_glue("qqp", saved)

    def unreachable(path: str, config: str | None) -> Any:
        raise ConnectionError(f"no route to {path} {config}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"nyu-mll/glue cannot be loaded.*save_to_disk\('DATA/sst2'\).*--data DATA"):
        load_glue("sst2")
