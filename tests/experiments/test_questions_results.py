"""What the numbers of the questions say: paired differences, their intervals, the sentences, and the page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_job
from scipy import stats

from dynmoe_tutel.experiments.questions import page
from dynmoe_tutel.experiments.questions.catalogue import NUMBERS, QUESTIONS
from dynmoe_tutel.experiments.questions.results import (
    EXPERTS,
    IN,
    MEAN_K,
    OUT,
    Difference,
    Results,
    differing,
)
from dynmoe_tutel.experiments.questions.task import QuestionsConfig, QuestionsTask
from dynmoe_tutel.experiments.questions.variants import VARIANTS
from dynmoe_tutel.experiments.report.claims import student
from dynmoe_tutel.experiments.run_folder import METRICS, RUNS

STEPS = 200


def evaluation(row: str, seed: int, out: float, k: float = 2.0, step: int = STEPS) -> dict[str, Any]:
    """A line of the log."""
    layers = {f"blocks.{n}.mlp": {"k": k, "experts": 4 + n, "unrouted": 0.01 * n} for n in (1, 3)}
    layers = layers if not row.startswith("dense") else {}
    accuracies = {"in_accuracy": 0.9, "out_accuracy": out}
    return {
        "kind": "eval",
        "row": row,
        "seed": seed,
        "step": step,
        **accuracies,
        "layers": layers,
        "layers_out": layers,
    }


def results_of(outs: Mapping[str, list[float]]) -> Results:
    """By variant: accuracies out of domain, percent, by seed."""
    lines = [evaluation(row, seed, value / 100) for row, values in outs.items() for seed, value in enumerate(values)]
    return Results.of(Path(), lines, STEPS)


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 10, 12, 20, 60, 999])
def test_the_quantile_is_students(freedom: int) -> None:
    assert student(freedom + 1) == pytest.approx(stats.t.ppf(0.975, freedom), abs=2e-3)


def test_a_difference_is_paired_by_seed() -> None:
    """Seeds that lie far apart, a difference that is the same in each: the interval is small. Others are left out."""
    difference = Difference.of({0: 51.0, 1: 71.5, 2: 92.0, 7: 0.0}, {2: 91.0, 1: 70.0, 0: 50.0, 8: 0.0})
    pairs = [1.0, 1.5, 1.0]
    half = stats.t.ppf(0.975, 2) * statistics.stdev(pairs) / 3**0.5
    assert (difference.mean, difference.pairs) == (pytest.approx(statistics.fmean(pairs)), 3)
    assert difference.half == pytest.approx(half, rel=1e-3)
    assert difference.is_clear
    assert difference.text() == f"+1.2 [+{1.1667 - half:.1f}, +{1.1667 + half:.1f}]"
    assert Difference.of({0: 1.0}, {0: 3.0}).text() == "-2.0"
    with pytest.raises(ValueError, match="needs a seed that both have"):
        Difference.of({0: 1.0}, {1: 1.0})


def test_the_numbers_decide_the_sentence() -> None:
    results = results_of({"dynmoe": [70, 75, 80], "dynmoe-fixed": [68, 73.1, 78], "dynmoe-growth": [71, 74, 80.5]})
    names = ("dynmoe-fixed", "dynmoe-growth", "dynmoe-pruning")
    sentence = differing(results, names, "dynmoe", OUT)
    assert sentence.startswith("Out of domain these differ from `dynmoe` beyond the 95 % interval: `dynmoe-fixed` -2.0")
    assert sentence.endswith("points. The other does not.")
    unclear = differing(results, names[1:], "dynmoe", OUT)
    assert unclear.startswith(
        "Out of domain `dynmoe-growth` does not differ from `dynmoe` beyond the interval; the widest"
    )
    assert differing(results, names[2:], "dynmoe", OUT) == ""
    one = results_of({"dynmoe": [70], "dynmoe-fixed": [60]})
    assert differing(one, names, "dynmoe", OUT) == "One seed says nothing about differences from `dynmoe`."
    assert differing(results, names, "dynmoe-k2", OUT) == ""


def test_quantities_are_those_after_the_last_step_of_finished_runs() -> None:
    lines = [evaluation("dynmoe", 0, 0.1, step=100), evaluation("dynmoe", 0, 0.7, 3.0), evaluation("dense", 0, 0.6)]
    lines.append(evaluation("dynmoe", 1, 0.2, step=100))
    results = Results.of(Path(), lines, STEPS)
    assert results.values("dynmoe", OUT) == {0: pytest.approx(70)}
    assert results.values("dynmoe", IN) == {0: pytest.approx(90)}
    assert results.values("dynmoe", MEAN_K) == {0: 3.0}
    assert results.values("dynmoe", EXPERTS) == {0: 6.0}
    assert results.values("dense", MEAN_K) == {}
    assert results.have(["dense", "dynmoe-k2", "dynmoe"]) == ["dense", "dynmoe"]


def test_the_page_answers_every_question(tmp_path: Path) -> None:
    for place, name in enumerate(name for name, variant in VARIANTS.items() if variant.row != "plain"):
        for seed in range(3):
            folder = tmp_path / RUNS / f"{name}-seed{seed}"
            folder.mkdir(parents=True)
            lines = [evaluation(name, seed, (70 + place + seed + (seed * place) % 3) / 100, step=s) for s in (0, STEPS)]
            (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = QuestionsTask(QuestionsConfig(seeds=(0, 1, 2)))
    console = tiny_job.quiet()
    page.write(task, tmp_path, console)
    text = (tmp_path / page.PAGE).read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {each.number}. {each.title}" for each in QUESTIONS
    ]
    assert text.count("**Answer.**") == text.count("**What it cannot show.**") == len(NUMBERS)
    untimed = {1, 11}  # nothing was timed here, and the page says so
    assert text.count("Nothing has been timed.") == len(untimed)
    for each in QUESTIONS:
        assert (tmp_path / page.picture_of(each)).exists() == (each.number not in untimed)
        assert f"({page.picture_of(each)})" in text or each.number in untimed
    content = json.loads((tmp_path / page.NUMBERS).read_text())
    assert [each["number"] for each in content] == list(NUMBERS)
    (table,) = content[5]["tables"]
    fixed = next(row for row in table["rows"] if row[0].startswith("`dynmoe-fixed`"))
    runs = Results.of(tmp_path, [json.loads(line) for file in tmp_path.glob(f"{RUNS}/*/{METRICS}")
                                 for line in file.read_text().splitlines()], STEPS)  # fmt: skip
    difference = runs.difference("dynmoe-fixed", "dynmoe", OUT)
    assert difference is not None
    assert difference.text() in fixed
    assert content[5]["answer"] in " ".join(text.split())
