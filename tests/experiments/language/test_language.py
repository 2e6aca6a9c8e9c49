"""The language experiment end to end on a tiny BERT: stops change nothing, and only the tests see test texts."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_job
import tiny_texts
import torch
from typer.testing import CliRunner

from dynmoe_tutel.adaptive.controller import ExpertController
from dynmoe_tutel.checkpoint import read_checkpoint
from dynmoe_tutel.cli import app
from dynmoe_tutel.experiments import experiment
from dynmoe_tutel.experiments.experiment import RUNS
from dynmoe_tutel.experiments.language.corpus import Corpus, Example
from dynmoe_tutel.experiments.language.task import GROUP, LanguageConfig, LanguageTask
from dynmoe_tutel.experiments.report import plots
from dynmoe_tutel.experiments.run_folder import EVENTS, METRICS, checkpoints_of, read_log
from dynmoe_tutel.experiments.runner import Run
from dynmoe_tutel.experiments.task import RunKey
from dynmoe_tutel.metrics import moe_layers

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> LanguageConfig:
    folder = tmp_path_factory.mktemp("language")
    return LanguageConfig(
        rows=("dense", "top-2-of-4", "dynmoe"),
        seeds=(0,),
        steps=12,
        learning_rate=3e-3,
        update_every=4,
        log_every=2,
        eval_every=3,
        threads=1,
        data=str(tiny_texts.write_texts(folder / "texts")),
        model=str(tiny_texts.write_model(folder / "model")),
        layers=(1, 2),
        experts=2,
        slots=4,
        batch=8,
        test_limit=20,
        early_limit=6,
    )


@pytest.fixture(autouse=True)
def _global_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skip plots, which take longer than these jobs, and restore torch's random state."""
    monkeypatch.setattr(plots, "draw", lambda *_: {})
    random = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), random)


def run(config: LanguageConfig, path: Path) -> Path:
    assert experiment.start(LanguageTask(config), path, tiny_job.quiet()) == 0
    return path


@pytest.fixture(scope="module")
def whole(config: LanguageConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda *_: {})
        return run(config, tmp_path_factory.mktemp("whole") / "job")


def training(path: Path, name: str) -> tuple[Any, Any, Any]:
    """The log lines, events and gates of a run's training."""
    folder = path / RUNS / name
    gates = read_checkpoint(checkpoints_of(folder, name)[-1])["model"]
    lines = [line for line in tiny_job.untimed(folder, METRICS) if line["kind"] == "train"]
    return lines, read_log(folder, EVENTS), {key: tensor.tolist() for key, tensor in gates.items()}


def test_test_texts_reach_neither_training_nor_controller(config: LanguageConfig, whole: Path, tmp_path: Path) -> None:
    """Other test texts, evaluated inside the record windows, change no bit of training or events."""
    task = LanguageTask(replace(config, rows=("dynmoe",)))
    corpus = task.corpus
    noise = {name: [Example("w1 w2 bad", 1), Example("good w3", 0)] * 9 for name in corpus.outside}
    task.corpus = replace(corpus, inside=dict.fromkeys(corpus.inside, noise["tweets"]), outside=noise)
    path = tmp_path / "job"
    assert experiment.start(task, path, tiny_job.quiet()) == 0
    assert read_log(whole / RUNS / "dynmoe-seed0", EVENTS), "the job is chosen so that experts change"
    assert training(path, "dynmoe-seed0") == training(whole, "dynmoe-seed0")
    evaluations = [
        [line for line in read_log(where / RUNS / "dynmoe-seed0", METRICS) if line["kind"] == "eval"]
        for where in (path, whole)
    ]
    assert evaluations[0] != evaluations[1], "the tests themselves did see other texts"


def test_an_update_has_seen_as_many_tokens_as_its_training_steps(
    config: LanguageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every window contains evaluations: these run after steps 3, 6 and 9, updates after 4 and 8."""
    task, update = LanguageTask(replace(config, rows=("dynmoe",))), ExpertController._update
    seen = []

    def counted(controller: ExpertController) -> Any:
        seen.append({int(site.record.tokens) for site in controller._histories})
        return update(controller)

    monkeypatch.setattr(experiment, "estimate", lambda *_: 0.0)
    monkeypatch.setattr(ExpertController, "_update", counted)
    assert experiment.start(task, tmp_path / "job", tiny_job.quiet()) == 0
    batches = task.batches(RunKey("dynmoe", 0), 0)
    tokens = [int(next(batches)[0]["attention_mask"].sum()) for _ in range(8)]
    assert seen == [{sum(tokens[:4])}, {sum(tokens[4:])}]


def test_ctrl_c_and_resume_are_bitwise_the_uninterrupted_job(
    config: LanguageConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, stopped inside a record window and a group of batches."""
    path, train_step = tmp_path / "job", Run.train_step

    def interrupted(run: Run) -> None:
        train_step(run)
        if run.row == "dynmoe" and run.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(experiment, "estimate", lambda *_: 0.0)
    monkeypatch.setattr(Run, "train_step", interrupted)
    assert experiment.start(LanguageTask(config), path, tiny_job.quiet()) == 130
    monkeypatch.setattr(Run, "train_step", train_step)
    assert experiment.resume(path, LanguageTask, tiny_job.quiet(), data=config.data) == 0
    for row in config.rows:
        assert training(path, f"{row}-seed0") == training(whole, f"{row}-seed0")
        lines = [tiny_job.untimed(where / RUNS / f"{row}-seed0", METRICS) for where in (path, whole)]
        assert lines[0] == lines[1]


def test_resume_on_other_texts_is_refused(config: LanguageConfig, whole: Path, tmp_path: Path) -> None:
    other = tiny_texts.write_texts(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"another protocol.*texts"):
        experiment.resume(whole, LanguageTask, tiny_job.quiet(), data=str(other))


def test_rows_share_batches_and_dense_weights_and_start_from_the_dense_function(config: LanguageConfig) -> None:
    task = LanguageTask(config)
    keys = [RunKey(row, 0) for row in config.rows]
    batches = [[next(iterator) for _ in range(3)] for iterator in (task.batches(key, 0) for key in keys)]
    for other in batches[1:]:
        for (inputs, label), (expected, expected_label) in zip(other, batches[0], strict=True):
            assert all(inputs[name].equal(expected[name]) for name in expected)
            assert label.equal(expected_label)
    later = next(task.batches(keys[0], 2))
    assert later[0]["input_ids"].equal(batches[0][2][0]["input_ids"])
    dense, top_2, dynmoe = (task.build(key) for key in keys)
    shared = [name for name in dense.state_dict() if name in dynmoe.state_dict()]
    assert len(shared) > 30
    for model in (top_2, dynmoe):
        assert [layer.max_num_global_experts for layer in moe_layers(model).values()] == [4, 4]
        assert all(model.state_dict()[name].equal(dense.state_dict()[name]) for name in shared)
        with torch.no_grad():
            logits = [task.logits(each.eval(), batches[0][0][0]) for each in (dense, model)]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def test_a_group_of_batches_walks_through_all_texts_and_sorts_them_by_length(config: LanguageConfig) -> None:
    task = LanguageTask(replace(config, batch=2))
    texts = {name: [Example(f"w{n} " + "w1 " * (n % 7), 0) for n in range(GROUP)] for name in ("films", "products")}
    task.corpus = Corpus(train=texts, validation={}, inside={}, outside={})
    batches = task.batches(RunKey("dense", 0), 0)
    group = [next(batches)[0] for _ in range(GROUP)]
    first = [int(inputs["input_ids"][0, 1]) for inputs in group]
    assert sorted(first) == list(range(5, 5 + GROUP)), "every text once an epoch"
    lengths = [inputs["attention_mask"].sum(1).tolist() for inputs in group]
    assert all(a == b for a, b in lengths), "both domains have texts of the same length"


def test_command_line_makes_a_table_and_refuses_bad_input(config: LanguageConfig, tmp_path: Path) -> None:
    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["experiment", "language", *arguments], env={"COLUMNS": "150"})

    given = ["--data", config.data, "--model", config.model, "--layers", "1", "--quick", "--threads", "1"]
    done = call(*given, "--rows", "dense,dynmoe", "--steps", "4", "--batch", "4", "--out", str(tmp_path / "job"))
    assert done.exit_code == 0, done.output
    assert "2 runs of 4 steps: about" in done.stdout
    assert f"--resume {tmp_path / 'job'} --data {config.data} goes on" in " ".join(done.stdout.split())
    assert "x" in done.stdout
    assert "| dynmoe | 1 |" in (tmp_path / "job" / "table.md").read_text()
    moved = tmp_path / "moved"
    shutil.copytree(config.data, moved)
    again = call("--resume", str(tmp_path / "job"), "--data", str(moved))
    assert again.exit_code == 0, again.output
    for arguments, message in (
        (
            [*given, "--rows", "top-3"],
            "rows must be dense, dynmoe, dynmoe-kX, relu-kX, top-p-kX",
        ),
        ([*given, "--seeds", "none"], "--seeds must be numbers by comma"),
        ([*given, "--train-domains", "films,books"], "train_domains must be"),
        ([*given, "--task", "glue"], "task must be sentiment or one of sst2"),
        (["--resume", str(tmp_path / "job"), "--steps", "5"], "leave out --steps"),
        (["--resume", str(tmp_path)], "is not a run folder"),
        ([*given[2:], "--data", str(tmp_path / "absent")], "does not exist"),
        (["--data", config.data, "--model", str(tmp_path)], "cannot be loaded by transformers"),
        ([*given, "--layers", "7", "--out", str(tmp_path / "other")], "layers: FFN 7 of 3"),
    ):
        refused = call(*arguments)
        assert refused.exit_code == 2, refused.output
        assert message in " ".join(refused.stderr.split())
        assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 17}, r"experts must be at most slots \(16\), got 17"),
        ({"batch": 31}, "batch must be a multiple of 2 domains, got 31"),
        ({"train_domains": ()}, "train_domains must be"),
        ({"test_limit": 0}, "test_limit must be"),
    ],
)
def test_bad_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageConfig(**change)
