"""A benchmark's results are on disk after every step, and a resumed run goes on after the step that failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.results import Progress, reason, usable


def table(summary: dict[str, Any]) -> str:
    return f"{len(summary['results'])} results"


def on_disk(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text())


def test_every_step_is_on_disk(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    progress = Progress(out, {"bounds": 1}, table)
    assert progress.begin("a")
    assert on_disk(out) == {"bounds": 1, "results": [], "failures": [], "begun": ["a"], "finished": []}
    progress.results.append({"n": 1})
    progress.save()
    assert on_disk(out)["results"] == [{"n": 1}]
    assert out.with_suffix(".md").read_text() == "1 results\n"
    progress.finish("a")
    assert on_disk(out)["finished"] == ["a"]


def test_a_failure_is_printed_in_a_line_and_has_its_traceback_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(tmp_path / "x.json", {}, table)
    progress.begin("a")
    try:
        raise RuntimeError("\nCUDA error: an illegal memory access\nCompile with ...")
    except RuntimeError as error:
        progress.finish("a", error)
    assert capsys.readouterr().out == "FAILED a: RuntimeError: CUDA error: an illegal memory access\n"
    (failure,) = on_disk(tmp_path / "x.json")["failures"]
    assert failure["where"] == "a"
    assert "test_benchmarks_results.py" in failure["traceback"]


def test_a_run_that_goes_on_begins_nothing_twice(tmp_path: Path) -> None:
    """The first run died in b without noting it; the environment is the second run's."""
    out = tmp_path / "x.json"
    first = Progress(out, {"bounds": 1}, table)
    for step in ("a", "b"):
        first.begin(step)
        first.results.append({"step": step})
        if step == "a":
            first.finish(step)
        first.save()
    second = Progress(out, {"bounds": 2}, table, resume=True)
    assert [second.begin(step) for step in ("a", "b", "c")] == [False, False, True]
    found = on_disk(out)
    assert found["bounds"] == 2
    assert found["results"] == [{"step": "a"}, {"step": "b"}]
    assert found["begun"] == ["a", "b", "c"]
    assert found["failures"] == [{"where": "b", "why": "the process ended before the end of it"}]
    fresh = Progress(out, {"bounds": 3}, table)
    assert fresh.begin("a")
    assert on_disk(out)["results"] == []


def test_nothing_is_written_without_a_file() -> None:
    progress = Progress(None, {}, table, resume=True)
    assert progress.begin("a")
    progress.finish("a", "why")
    assert progress.summary["failures"] == [{"where": "a", "why": "why"}]


def test_reason() -> None:
    assert reason(ValueError("one\ntwo")) == "ValueError: one"
    assert reason(KeyError()) == "KeyError: "
    assert len(reason(ValueError("x" * 1000))) == 300


def test_a_device_that_raises_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable(torch.device("cpu"))

    def raises(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch, "ones", raises)
    assert not usable(torch.device("cpu"))
