"""The benchmark of budgets: its laws by hand, its tables, its options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import budget


def test_the_integral_law_by_hand() -> None:
    shift = torch.tensor([0.5])
    budget.integral(0.1)(None)(shift, 4.0)  # type: ignore[arg-type]
    assert shift.tolist() == pytest.approx([0.5 + 0.1 * 0.6931472])
    budget.integral(0.1)(None)(shift, 2.0)  # type: ignore[arg-type]
    assert shift.tolist() == pytest.approx([0.5 + 0.1 * 0.6931472])


def test_the_sign_law_by_hand() -> None:
    """The first error is a turn, the second of its sign lengthens the step, one of the other sign halves it."""
    shift, law = torch.zeros(1), budget.sign(None)  # type: ignore[arg-type]
    for mean_k, expected in ((3.0, 0.005), (3.0, 0.011), (1.0, 0.008)):
        law(shift, mean_k)
        assert shift.tolist() == pytest.approx([expected])


def test_a_law_moves_the_shift_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller's own budgets are out of the way: without a law the mean stays where it starts."""
    monkeypatch.setattr(budget, "WINDOW", 5)
    still = budget.worst_error(lambda _: lambda *_: None, 16, "random", 8.0, 8)
    assert still == pytest.approx(3.0, abs=0.01)
    assert budget.worst_error(budget.quantile, 16, "random", 8.0, 40) < 0.2


def test_the_start_is_the_mean_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "WINDOW", 1)
    for start in (8.0, 0.5):
        error = budget.worst_error(lambda _: lambda *_: None, 16, "around a mean", start, 1)
        assert error == pytest.approx(abs(start / 2 - 1), abs=0.01)


def test_writes_tables_under_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "GATES", ((40, 8, 4), (64, 8, 8)))
    monkeypatch.setattr(budget, "SIZES", (8,))
    monkeypatch.setattr(budget, "worst_error", lambda law, D, centre, start, steps: start / D)
    assert budget.main(["--repeats", "2", "--out", str(tmp_path / "b.json")]) == 0
    text = (tmp_path / "b.md").read_text()
    assert text.startswith("`python -m benchmarks.budget --repeats 2 --out ")
    assert "| 8 | around a mean | 0.5 | 0.062 | 0.062 | 0.062 | 0.062 |" in text
    results = json.loads((tmp_path / "b.json").read_text())
    assert len(results["laws"]) == 4
    assert [r["T"] for r in results["gate"]] == [40, 64]
    assert set(results["gate"][0]["over_none"]) == {"none again", "target", "target, cap of 4", "cap of 2"}


@pytest.mark.parametrize("argv", [["--steps", "99"], ["--repeats", "0"], ["--part", "layer"], ["--threads", "0"]])
def test_refuses(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        budget.main(argv)


def test_a_ratio_is_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is ten times slower in every other round, a gate of equal speed has a ratio of 1."""
    now, calls = [0.0], [0]

    def gate(*_: object) -> None:
        now[0] += 10.0 if calls[0] // 5 % 2 else 1.0
        calls[0] += 1

    monkeypatch.setattr(budget, "threshold_gate", gate)
    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(budget.time, clock, lambda: now[0])
    result = budget.time_gate(40, 8, 4, 8)
    for ratio in result["over_none"].values():
        assert ratio == {"median": 1.0, "quartile_1": 1.0, "quartile_3": 1.0}
    assert result["microseconds"]["quartile_1"] < result["microseconds"]["quartile_3"]
