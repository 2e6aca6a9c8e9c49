"""The experiment `questions` as a job: it can be stopped, resumed and extended, and its options are checked."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_job
import tiny_texts
import torch
from typer.testing import CliRunner

from dynmoe_tutel.cli import app
from dynmoe_tutel.experiments import experiment
from dynmoe_tutel.experiments.language.task import LanguageConfig, LanguageTask
from dynmoe_tutel.experiments.questions import page, pictures, task, timing
from dynmoe_tutel.experiments.questions.catalogue import OF_TEXTS
from dynmoe_tutel.experiments.questions.task import QuestionsConfig, QuestionsTask
from dynmoe_tutel.experiments.run_folder import METRICS, RUNS, read_log
from dynmoe_tutel.experiments.runner import Run
from dynmoe_tutel.experiments.task import RunKey
from dynmoe_tutel.experiments.vision import digits

CONFIG = QuestionsConfig(
    questions=(4, 6, 11), rows=("dynmoe", "dynmoe-fixed"), seeds=(0, 1), steps=4, update_every=2, log_every=2,
    eval_every=4, rounds=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RAGGED_SIZES", {timing.RAGGED: (8, 8, 40)})
    monkeypatch.setattr(timing, "SIZES", {timing.LAYER: (8, 8, 40)})
    monkeypatch.setattr(timing, "SETTLING", 1)


@pytest.fixture(scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"path": tmp_path_factory.mktemp("questions") / "job"}


@pytest.fixture
def whole(_whole: dict[str, Any]) -> Path:
    """The folder of a finished job."""
    if "text" not in _whole:
        console = tiny_job.quiet()
        assert experiment.start(QuestionsTask(CONFIG), _whole["path"], console) == 0
        _whole["text"] = console.file.getvalue()  # type: ignore[attr-defined]
        assert "4 runs of 4 steps: about" in _whole["text"]
    path: Path = _whole["path"]
    return path


def untimed(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The logs of all runs without their times."""
    return {
        folder.name: [{k: v for k, v in line.items() if k != "step_ms"} for line in read_log(folder, METRICS)]
        for folder in sorted((path / RUNS).iterdir())
    }


def test_a_job_writes_its_page(whole: Path) -> None:
    text = (whole / page.PAGE).read_text()
    assert [line[:5] for line in text.splitlines() if line.startswith("## ")] == ["## 4.", "## 6.", "## 11"]
    assert "4 steps; 2 seeds" in text
    assert not (whole / "table.md").exists()
    for name in ("question-6.png", "question-11.png", page.NUMBERS):
        assert (whole / name).stat().st_size > 500


def test_what_is_done_is_not_done_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor timed again; another command adds to the same folder."""
    before = {file: file.read_bytes() for file in whole.rglob("*.json*")}
    monkeypatch.setattr(Run, "train_step", lambda _run: pytest.fail("trained again"))
    console = tiny_job.quiet()
    assert experiment.resume(whole, QuestionsTask, console) == 0
    assert "about" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert {file: file.read_bytes() for file in whole.rglob("*.json*")} == before


def test_the_page_keeps_what_other_commands_asked(whole: Path, tmp_path: Path) -> None:
    """Questions, also of times alone, which train nothing, and further seeds."""
    shutil.copytree(whole, tmp_path / "job")
    changed = replace(CONFIG, questions=(1,), rows=(), seeds=(0,))
    assert experiment.start(QuestionsTask(changed), tmp_path / "job", tiny_job.quiet()) == 0
    text = (tmp_path / "job" / page.PAGE).read_text()
    assert [line[:5] for line in text.splitlines() if line.startswith("## ")] == ["## 1.", "## 4.", "## 6.", "## 11"]
    more = replace(CONFIG, questions=(6,), rows=("dynmoe",), seeds=(2,))
    assert experiment.start(QuestionsTask(more), tmp_path / "job", tiny_job.quiet()) == 0
    assert "2 to 3 seeds" in " ".join((tmp_path / "job" / page.PAGE).read_text().split())


def test_a_stopped_job_goes_on_as_if_it_had_not_been(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Run.train_step

    def stop_in_the_second_run(run: Run) -> None:
        step(run)
        if (run.name, run.step) == ("dynmoe-fixed-seed0", 3) and isinstance(run.folder.path, Path):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(experiment, "estimate", lambda *_: 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", stop_in_the_second_run)
        assert experiment.start(QuestionsTask(CONFIG), tmp_path / "job", tiny_job.quiet()) == 128 + signal.SIGTERM
    assert not (tmp_path / "job" / page.PAGE).exists()
    assert experiment.resume(tmp_path / "job", QuestionsTask, tiny_job.quiet()) == 0
    assert untimed(tmp_path / "job") == untimed(whole)


def test_a_signal_while_timing_keeps_whole_blocks_alone(tmp_path: Path) -> None:
    task = QuestionsTask(replace(CONFIG, rounds=3, seeds=(0, 1, 2)))
    files = [file for file, _, _ in timing._pending(task, tmp_path)]
    assert [file.name for file in files] == [f"11-ragged-seed{seed}.json" for seed in range(3)]
    asked = iter([None] * 6)  # of settling twice and of three rounds for the first seed, then once more
    timing.measure(task, tmp_path, lambda: next(asked, signal.SIGINT))
    assert sorted(file.name for file in (tmp_path / timing.FOLDER).iterdir()) == ["11-ragged-seed0.json"]
    (measured,) = timing.read(tmp_path, 11, timing.RAGGED)
    assert {len(ms) for ms in measured["ms"].values()} == {3}
    timing.measure(task, tmp_path, lambda: None)
    assert timing.seconds(task, tmp_path) == 0
    assert len(timing.read(tmp_path, 11, timing.RAGGED)) == 3


def test_steps_and_layers_are_timed_with_how_they_routed(tmp_path: Path) -> None:
    task = QuestionsTask(replace(CONFIG, questions=(1,), rows=(), seeds=(0,)))
    assert timing.seconds(task, tmp_path) > 0
    timing.measure(task, tmp_path, lambda: None)
    (steps,), (layers,) = timing.read(tmp_path, 1, timing.STEP), timing.read(tmp_path, 1, timing.LAYER)
    assert list(steps["ms"]) == ["dense", "plain-top-2", "top-2-of-8", "dynmoe-k2", "dynmoe"]
    assert steps["routed"]["top-2-of-8"] == [2.0, 8.0]
    assert steps["routed"]["plain-top-2"] == [2.0, 8.0]
    assert 0 < steps["routed"]["dynmoe"][0] <= 16
    assert "dense" not in steps["routed"]
    assert steps["clock"] == "processor time"
    assert layers["routed"]["top-any, k held at 2"][1] == 8
    page.write(task, tmp_path, tiny_job.quiet())
    assert "A whole step of `dynmoe-k2` at a mean k of" in " ".join((tmp_path / page.PAGE).read_text().split())
    assert all(ms > 0 for each in (steps, layers) for values in each["ms"].values() for ms in values)


def test_only_what_the_questions_need_is_trained() -> None:
    def names(**changes: Any) -> list[str]:
        return [variant.name for variant in QuestionsTask(replace(QuestionsConfig(), **changes)).variants]

    assert names(questions=(1, 11)) == []
    assert names(questions=(7,)) == ["dynmoe", "dynmoe-every-10", "dynmoe-every-50", "dynmoe-every-100"]
    assert names(questions=(6, 7), rows=("dynmoe-fixed",)) == ["dynmoe-fixed"]
    assert len(names()) == 28
    plan = QuestionsTask(QuestionsConfig(questions=(7,), seeds=(4, 5))).plan
    assert [key.seed for key in plan] == [4] * 4 + [5] * 4


def test_a_command_without_rows_asks_for_all(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: rows that another command had named were then all that --resume went on with."""
    shutil.copytree(whole, tmp_path / "job")
    monkeypatch.setattr(experiment, "estimate", lambda *_: 0.0)
    monkeypatch.setattr(Run, "finish", lambda *_: (_ for _ in ()).throw(experiment.Interrupted(signal.SIGTERM)))
    every = replace(CONFIG, questions=(6,), rows=(), seeds=(0,))
    assert experiment.start(QuestionsTask(every), tmp_path / "job", tiny_job.quiet()) == 128 + signal.SIGTERM
    assert experiment._asked_for(tmp_path / "job") == {"questions": [4, 6, 11], "rows": [], "seeds": [0, 1]}


def test_test_images_reach_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the dense model which is tuned, either."""
    task = QuestionsTask(CONFIG)
    data = task.inner._data(0)  # type: ignore[union-attr]
    held_out = [data.test.index, *[images.index for images in data.validation.values()]]
    seen = []
    original = torch.nn.Module.__call__

    def record(module: torch.nn.Module, *inputs: Any, **options: Any) -> Any:
        if type(module).__name__ == "ViT":
            seen.append(inputs[0])
        return original(module, *inputs, **options)

    monkeypatch.setattr(torch.nn.Module, "__call__", record)
    task.build(RunKey("dense-tuned", 0))
    assert len(seen) == CONFIG.steps
    upright = digits._all_images()[0]
    shown = torch.cat(seen).flatten(1)
    for angle in (-15, -30, -45, -60, -75):
        forbidden = digits.rotate(upright[torch.cat(held_out)], angle).flatten(1)
        assert torch.cdist(shown, forbidden).min() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--questions", "0"), "questions must be different ones of 1 to 11, got"),
        (("--questions", "3,3"), "questions must be different ones of 1 to 11, got"),
        (("--rows", "dense,nothing"), "rows must be different ones of dense, top-2-of-8"),
        (
            ("--questions", "4,11", "--rows", "dynmoe,dynmoe-fixed,dense"),
            "rows: dynmoe-fixed, dense is in none of the questions 4, 11: leave it out, or ask one of 2, 6",
        ),
        (("--questions", "1", "--rows", "plain-top-2"), "is in none of the questions 1: leave it out"),
        (("--language", "--rows", "dense-tuned"), "of --language: leave it out"),
        (("--language", "--questions", "3,4,11"), "questions 3, 11 are not answered by texts"),
        (("--data", "x"), "data is about the texts of --language"),
        (("--steps", "0"), "steps must be an integer of at least 1"),
    ],
)
def test_bad_options_are_refused(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["experiment", "questions", "--out", str(tmp_path / "job"), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "job").exists()


def test_language_has_its_own_defaults() -> None:
    config = QuestionsConfig.of_options({"language": True}, quick=False)
    assert (config.steps, config.seeds, config.learning_rate, config.experts) == (100, (0, 1, 2), 2e-4, 8)
    assert config.questions == (1, 2, 4, 5, 6, 7, 8, 9, 10)
    assert QuestionsConfig.of_options({"language": True, "steps": 3}, quick=True).steps == 3
    assert json.loads(json.dumps(config.to_dict()))["language"] is True


def test_texts_are_answered_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question that is asked of them, on a tiny BERT and few rows; nothing on the page speaks of images."""
    pytest.importorskip("transformers")
    texts, model = tiny_texts.write_texts(tmp_path / "texts"), tiny_texts.write_model(tmp_path / "model")
    sizes = {"layers": (1, 2), "batch": 6, "test_limit": 8, "early_limit": 4}

    def small(config: QuestionsConfig) -> LanguageTask:
        shared = {name: getattr(config, name) for name in task.SHARED}
        return LanguageTask(LanguageConfig(data=str(texts), model=str(model), **sizes, **shared))

    monkeypatch.setattr(task, "_language", small)
    monkeypatch.setattr(experiment, "estimate", lambda *_: 0.0)
    monkeypatch.setattr(pictures, "draw", lambda _: b"picture")
    given = {"language": True, "steps": 2, "rounds": 1, "update_every": 1, "eval_every": 2, "seeds": (0,)}
    every = QuestionsConfig.of_options(given, quick=True)
    assert len(QuestionsTask(every).variants) == 25
    job = QuestionsTask(replace(every, rows=("dense", "dynmoe", "dynmoe-k2", "dynmoe-score-weighted")))
    assert experiment.start(job, tmp_path / "job", tiny_job.quiet()) == 0
    text = (tmp_path / "job" / page.PAGE).read_text()
    assert [line.split(".")[0] for line in text.splitlines() if line.startswith("## ")] == [
        f"## {number}" for number in OF_TEXTS
    ]
    assert "`dynmoe-tutel experiment questions --language`" in " ".join(text.split())
    for word in ("image", "angle", "Nothing has", "None of the runs", "-tuned", "nan"):
        assert word not in text, word
    assert {file.name for file in (tmp_path / "job").glob("*.png")} <= {f"question-{n}.png" for n in OF_TEXTS}
