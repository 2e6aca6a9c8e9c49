"""Experiment folders: runs merge in any order, stop and resume change nothing, other protocols are refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_job
from matplotlib import image

from dynmoe_tutel.checkpoint import read_checkpoint
from dynmoe_tutel.experiments import experiment
from dynmoe_tutel.experiments.experiment import RUNS
from dynmoe_tutel.experiments.report import plots, table
from dynmoe_tutel.experiments.report.table import RowSummary, Spread
from dynmoe_tutel.experiments.run_folder import EVENTS, METRICS, checkpoints_of, read_log
from dynmoe_tutel.experiments.runner import Run
from dynmoe_tutel.experiments.vision.digits_task import DigitsTask

CONFIG = replace(tiny_job.CONFIG, rows=("dense", "dynmoe"), seeds=(0, 1), steps=8)


class TinyTask(DigitsTask):
    """The digits as an experiment."""

    command = "experiment tiny"
    keep_weights = False
    checkpoints = False

    def protocol(self) -> dict[str, Any]:
        content = super().protocol()
        del content["model"]  # the same in all tests
        return content

    @classmethod
    def of(cls, content: Mapping[str, Any], **moved: Any) -> TinyTask:
        return super().of({**content, "model": CONFIG.to_dict()["model"]}, **moved)


def task(**changes: Any) -> TinyTask:
    return TinyTask(replace(CONFIG, **changes))


def start(path: Path, **changes: Any) -> str:
    console = tiny_job.quiet()
    assert experiment.start(task(**changes), path, console) == 0
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "job"
    text = start(path)
    assert "4 runs of 8 steps: about 0 min on 1 threads, measured" in text
    assert "Best out of domain" in text
    return path


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "whole" not in request.fixturenames:
        return
    request.getfixturevalue("whole")
    monkeypatch.setattr(plots, "draw", lambda *_: {})


def assert_same_runs(actual: Path, expected: Path) -> None:
    names = sorted(folder.name for folder in (expected / RUNS).iterdir())
    assert sorted(folder.name for folder in (actual / RUNS).iterdir()) == names
    for name in names:
        folders = [path / RUNS / name for path in (actual, expected)]
        assert tiny_job.untimed(folders[0], METRICS) == tiny_job.untimed(folders[1], METRICS), name
        assert read_log(folders[0], EVENTS) == read_log(folders[1], EVENTS), name
        gates = [read_checkpoint(checkpoints_of(folder, name)[-1])["model"] for folder in folders]
        assert gates[0].keys() == gates[1].keys()
        assert all(gates[0][key].equal(gates[1][key]) for key in gates[0]), name
    tables = [json.loads((path / "table.json").read_text()) for path in (actual, expected)]
    for content in tables:
        for row in content["rows"]:
            del row["step_ms"], row["step_ratio"]
    assert tables[0] == tables[1]


def test_rows_and_seeds_in_any_order_merge_into_the_whole_job(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "job"
    start(path, rows=("dynmoe",), seeds=(1,))
    assert [row["row"] for row in json.loads((path / "table.json").read_text())["rows"]] == ["dynmoe"]
    start(path, rows=("dense",), seeds=(1, 0))
    assert "dynmoe-seed1: done before" in start(path)
    assert_same_runs(path, whole)


def test_ctrl_c_and_resume_are_bitwise_the_uninterrupted_job(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside a record window of the second run; --resume knows the later runs."""
    path, train_step = tmp_path / "job", Run.train_step
    handler, handlers = signal.getsignal(signal.SIGINT), []

    def interrupted(run: Run) -> None:
        train_step(run)
        if (run.name, run.step) == ("dynmoe-seed0", 3) and run.folder.path != Path():
            os.kill(os.getpid(), signal.SIGINT)
            handlers.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(Run, "train_step", interrupted)
    console = tiny_job.quiet()
    estimate = experiment.estimate
    monkeypatch.setattr(experiment, "estimate", lambda *_: 0.0)
    assert experiment.start(task(), path, console) == 130
    assert handlers == [handler], "a second Ctrl-C stops at once"
    assert f"dynmoe-tutel experiment tiny --resume {path}" in console.file.getvalue()  # type: ignore[attr-defined]
    assert not (path / "table.json").exists()
    monkeypatch.setattr(Run, "train_step", train_step)
    monkeypatch.setattr(experiment, "estimate", estimate)
    assert experiment.resume(path, TinyTask, console) == 0
    assert_same_runs(path, whole)


def test_other_protocols_and_other_folders_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another protocol.*learning_rate: 0.002 there, 0.1 now"):
        start(whole, learning_rate=0.1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no experiment"):
        start(tmp_path)
    with pytest.raises(ValueError, match="is not a run folder"):
        experiment.resume(tmp_path, TinyTask, tiny_job.quiet())
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**about, "experiment": "vision"}))
    with pytest.raises(ValueError, match="holds a job of 'vision', not of 'tiny'"):
        start(other)
    (other / "config.json").write_text(json.dumps({"experiment": "tiny"}))
    with pytest.raises(ValueError, match="has no protocol: it is damaged or of another version"):
        start(other)
    (other / "config.json").write_text(json.dumps(about))
    (other / RUNS / "dense-seed0" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no axes: it is damaged or of another version"):
        experiment.resume(other, TinyTask, tiny_job.quiet())
    (other / "config.json").unlink()
    (other / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read: Is a directory"):
        experiment.resume(other, TinyTask, tiny_job.quiet())


def test_options_that_no_model_can_be_built_with_leave_the_folder_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the folder kept the mistaken protocol, it would refuse the corrected command."""

    def build(*_: Any) -> Any:
        raise ValueError("layers: FFN 99 of 6")

    with monkeypatch.context() as patched:
        patched.setattr(TinyTask, "build", build)
        with pytest.raises(ValueError, match="FFN 99"):
            start(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_finished_is_in_no_plot(whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If parts are left out in turn, a row may be finished for one part and not for another."""
    metrics, events = experiment.read_runs(whole)
    lines = [{**line, "test": "b"} for line in metrics]
    lines += [{**line, "test": "a"} for line in metrics if line["row"] == "dense" or line["step"] == 0]
    monkeypatch.undo()  # plots are looked at here
    monkeypatch.setattr(experiment, "read_runs", lambda _: (lines, [{**event, "test": "b"} for event in events]))
    drawn: list[Any] = []
    draw = plots.draw
    monkeypatch.setattr(plots, "draw", lambda *given: drawn.append(given) or draw(*given))
    monkeypatch.setattr(plots, "accuracy", lambda *given: drawn.append(given) or b"")
    monkeypatch.setattr(plots, "trade_off", lambda *_: b"")
    console = tiny_job.quiet()
    experiment._report(task(), tmp_path, console)
    (metrics, events, summaries, _), (_, rows) = drawn
    assert ({line["row"] for line in metrics}, list(rows), events) == ({"dense"}, ["dense"], [])
    assert [row.row for row in summaries] == ["dense", "dynmoe"], "the table has both"
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "trade_off.png"}
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "The rows are not means over the same seeds and parts left out: do the runs that are missing." in text


def test_a_finished_run_keeps_its_gates_alone_and_can_be_inspected(whole: Path) -> None:
    from dynmoe_tutel.cli.inspection import inspect

    state = read_checkpoint(checkpoints_of(whole / RUNS / "dynmoe-seed0", "dynmoe-seed0")[-1])
    assert "optimizer" not in state
    assert state["model"]
    assert all(".gates." in name for name in state["model"])
    console = tiny_job.quiet()
    inspect(whole / RUNS / "dynmoe-seed0", console)
    assert "blocks.3.mlp" in console.file.getvalue()  # type: ignore[attr-defined]
    inspect(whole, console)  # all runs of the experiment
    assert all(f"dynmoe-seed{seed}, step 8" in console.file.getvalue() for seed in (0, 1))  # type: ignore[attr-defined]


def test_every_picture_is_drawn(whole: Path) -> None:
    for name in ("accuracy", "experts", "k_histogram", "load", "trade_off"):
        picture = image.imread(io.BytesIO((whole / f"{name}.png").read_bytes()), format="png")[..., :3]
        assert 0.005 < float((picture.min(-1) < 0.9).mean()) < 0.95, name


def evaluation(
    row: str, seed: int, step: int, inside: float, out: float, test: str = "", **more: Any
) -> dict[str, Any]:
    layers = {} if row == "dense" else {"a": {"k": 2.0 + seed, "experts": 4 + step}, "b": {"k": 1.0, "experts": 3}}
    k = {name: layer["k"] for name, layer in layers.items()}
    parts = {"p": {"kind": "in", "accuracy": inside, "k": k}, f"q{test}": {"kind": "out", "accuracy": out, "k": k}}
    line = {"kind": "eval", "row": row, "seed": seed, "step": step, "in_accuracy": inside, "out_accuracy": out}
    return {**line, "activated_parameters": 2e6, "total_parameters": 4e6, "parts": parts, "layers": layers,
            **({"test": test} if test else {}), **more}  # fmt: skip


def timed(row: str, seed: int, ms: float, test: str = "") -> dict[str, Any]:
    return {"kind": "train", "row": row, "seed": seed, "step_ms": ms, **({"test": test} if test else {})}


def test_table_has_means_spreads_and_ratios_to_dense_of_the_same_seed() -> None:
    lines = []
    for seed in (0, 1):
        lines += [evaluation("dense", seed, 0, 0.5, 0.5), timed("dense", seed, 100.0 * (1 + seed))]
        lines += [evaluation("dense", seed, 8, 0.8, 0.6 + 0.2 * seed)]
        lines += [evaluation("dynmoe", seed, 0, 0.5, 0.5), timed("dynmoe", seed, 300.0 * (1 + seed))]
        lines += [evaluation("dynmoe", seed, 8, 0.9, 0.7)]
    lines += [evaluation("dense", 2, 0, 0.1, 0.1), evaluation("dense", 2, 4, 0.1, 0.1)]  # not finished
    dense, dynmoe = table.summarise(lines, ("dense", "dynmoe"), 8)
    assert (dense.seeds, dynmoe.seeds) == ((0, 1), (0, 1))
    assert dense.out_accuracy.mean == pytest.approx(0.7)
    assert dense.out_accuracy.deviation == pytest.approx(0.2 / 2**0.5)
    assert dynmoe.step_ratio is not None
    assert dynmoe.step_ratio.mean == pytest.approx(3)
    assert dynmoe.k == {"p": [2.5, 1], "q": [2.5, 1]}
    assert dynmoe.mean_k is not None
    assert dynmoe.mean_k.mean == pytest.approx(1.75)
    assert (dynmoe.experts_start, dynmoe.experts_end) == ([4, 3], [12, 3])
    text = table.markdown([dense, dynmoe], 8, "last")
    assert "| dynmoe | 2 | 90.0 ± 0.0 | 70.0 ± 0.0 | 1.75 | 4 3 | 12 3 | 2.0M | 4.0M | 450 | 3.00 |" in text
    assert "| dynmoe | 90.0 ± 0.0 | 70.0 ± 0.0 | 2.50 1 | 2.50 1 |" in text
    assert "| dense | 80.0 ± 0.0 | 70.0 ± 14.1 | - | - |" in text


def test_table_fits_a_terminal_of_80_columns() -> None:
    spread = Spread(0.8251, 0.0123)
    k, experts = Spread(4.0, 0.0), [16.0, 16.0]
    row = RowSummary(
        "top-4-of-16", (0, 1), spread, spread, k, experts, experts, 33.7e6, 42.8e6, spread, step_ratio=spread
    )
    for width, tables in ((80, 1), (200, 2)):
        console = tiny_job.quiet()
        console.width = width
        made = table.rich_tables([row], 100, "last", width)
        assert len(made) == tables
        console.print(made[0])
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in text
        assert all(cell in text for cell in ("top-4-of-16", "82.5 ± 1.2", "33.7M", "42.8M", "0.83"))


def test_a_seed_counts_once_whatever_number_of_parts_is_left_out_and_selection_is_by_validation() -> None:
    lines = []
    for test, outs in (("x", (0.2, 0.9, 0.4)), ("y", (0.6, 0.1, 0.8))):
        lines.append(timed("dense", 0, 1.0, test))
        for step, (out, valid) in enumerate(zip(outs, (0.99, 0.7, 0.7), strict=True)):
            lines.append(evaluation("dense", 0, 4 * step, 0.5, out, test, validation_accuracy=valid))
    (row,) = table.summarise(lines, ("dense",), 8, "validation")
    assert row.out_accuracy == Spread(pytest.approx(0.5), None)  # 0.9 and 0.1: the first of equals, never step 0
    assert list(row.parts) == ["p", "qx", "qy"]
    assert table.summarise(lines, ("dense",), 8)[0].out_accuracy.mean == pytest.approx(0.6)


def test_trade_off_marks_every_row() -> None:
    def row(name: str, out: float, parameters: float) -> RowSummary:
        spread = Spread(out, 0.01)
        return RowSummary(name, (0, 1), spread, spread, None, [], [], parameters, parameters, spread)

    rows = [row("dense", 0.7, 2e6), row("top-1-of-8", 0.72, 3e6), row("dynmoe", 0.74, 4e6)]
    pictures = [image.imread(io.BytesIO(plots.trade_off(rows[:n])), format="png")[..., :3] for n in (1, 3)]
    for position, expected in enumerate(([True, True], [False, True], [False, True])):
        colour = np.array([int(plots.COLOURS[position][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert [bool((np.abs(each - colour).max(-1) < 0.02).sum() > 50) for each in pictures] == expected


def test_names_in_the_trade_off_do_not_cover_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points as in a real run: pairs lie almost on top of each other."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    places = [(0.20, 0.78), (0.21, 0.78), (0.212, 0.779), (0.44, 0.73), (0.44, 0.73), (0.47, 0.731)]
    names = ("dense", "top-1-of-8", "top-1-of-16", "top-4-of-8", "top-4-of-16", "dynmoe")
    points = dict(zip(names, places, strict=True))
    rows = [
        RowSummary(name, (0,), Spread(y, 0.01), Spread(y, None), None, [], [], 1e6 * x, 1e6 * x, Spread(1.0, None))
        for name, (x, y) in points.items()
    ]
    plots.trade_off(rows)
    (figure,) = figures
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
        assert boxes.keys() == points.keys()
        assert not [(a, b) for a in boxes for b in boxes if a < b and boxes[a].overlaps(boxes[b])]
