"""The job: determinism, resume after every kind of end, equal budgets, and its message when the disk is full."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_job
import torch
from helpers import PATIENCE

from dynmoe_tutel.checkpoint import files, read_checkpoint
from dynmoe_tutel.experiments import experiment
from dynmoe_tutel.experiments.report import plots
from dynmoe_tutel.experiments.run_folder import EVENTS, METRICS, RunFolder, runs_of
from dynmoe_tutel.experiments.run_folder import RUNS as RUNS_FOLDER
from dynmoe_tutel.experiments.runner import Interrupted, Run, stop_requests
from dynmoe_tutel.experiments.vision.digits_task import TrainConfig, build_model
from dynmoe_tutel.experiments.vision.task import VisionConfig, VisionTask
from dynmoe_tutel.experiments.vision.vit import ViTConfig

RUNS = ["dense-seed0", "dynmoe-seed0", "top-2-seed0"]
PROGRAM = [sys.executable, str(Path(tiny_job.__file__))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted job."""
    return tiny_job.run_job(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots and estimates take longer than these jobs; test_results and test_experiment cover them."""
    monkeypatch.setattr(plots, "draw", lambda *_: {})
    monkeypatch.setattr(experiment, "estimate", lambda *_: 0.0)


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Check that the job leaves torch's random state, its threads and the signal handlers alone."""
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(signum) for signum in signals]
    yield
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert [signal.getsignal(signum) for signum in signals] == handlers


def assert_same(actual: Any, expected: Any, where: str = "state") -> None:
    """Assert bitwise equality through all nesting."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for position, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, f"{where}/{position}")
    else:
        assert actual == expected, where


def assert_same_job(actual: Path, expected: Path) -> None:
    assert tiny_job.untimed(actual, METRICS) == tiny_job.untimed(expected, METRICS)
    assert tiny_job.lines(actual, EVENTS) == tiny_job.lines(expected, EVENTS)
    for path in (actual, expected):
        assert [run for run in RUNS if runs_of(tiny_job.run_folder(path, run)).count(run)] == RUNS
    for run in RUNS:
        states = [read_checkpoint(tiny_job.checkpoints(path, run)[-1]) for path in (actual, expected)]
        for state in states:
            del state["log_bytes"]  # log lines contain times of varying length
        assert_same(*states, run)


def test_two_jobs_with_one_seed_are_bitwise_equal_and_those_with_another_are_not(whole: Path, tmp_path: Path) -> None:
    assert_same_job(tiny_job.run_job(tmp_path / "again"), whole)
    other = tiny_job.run_job(tmp_path / "other", replace(tiny_job.CONFIG, seeds=(1,), rows=("dense",)))
    losses = [[line["loss"] for line in tiny_job.lines(path, METRICS) if "loss" in line] for path in (whole, other)]
    assert losses[0][: len(losses[1])] != losses[1]


def test_evaluating_changes_nothing_of_the_training(tmp_path: Path) -> None:
    """Neither weights nor statistics of training forwards change, even between two log lines."""
    often, seldom = (
        tiny_job.run_job(
            tmp_path / str(every), replace(tiny_job.CONFIG, rows=("dynmoe",), log_every=3, eval_every=every)
        )
        for every in (2, 12)
    )
    lines = [[line for line in tiny_job.untimed(path, METRICS) if line["kind"] == "train"] for path in (often, seldom)]
    assert lines[0] == lines[1]
    assert lines[0][-1]["layers"]["blocks.1.mlp"]["k"] > 0
    states = [read_checkpoint(tiny_job.checkpoints(path, "dynmoe-seed0")[-1]) for path in (often, seldom)]
    assert_same(states[0]["model"], states[1]["model"])
    assert_same(states[0]["controller"], states[1]["controller"])


def test_job_adapts_experts_and_logs_every_change(whole: Path) -> None:
    events = tiny_job.lines(whole, EVENTS)
    assert events, "the tiny job is chosen so that experts change"
    assert {event["row"] for event in events} == {"dynmoe"}
    assert all(event["step"] in (4, 8) for event in events), "no update in the last stretch"
    for layer in ("blocks.1.mlp", "blocks.3.mlp"):
        changes = [1 if event["action"] == "grown" else -1 for event in events if event["layer"] == layer]
        last = [line for line in tiny_job.lines(whole, METRICS) if line["row"] == "dynmoe"][-1]
        assert last["layers"][layer]["experts"] == tiny_job.CONFIG.experts + sum(changes)


def test_resume_after_sigkill_is_bitwise_the_uninterrupted_job(whole: Path, tmp_path: Path) -> None:
    """Killed during a checkpoint, when the logs have lines that no checkpoint covers."""
    folder = tmp_path / "run"
    killed = subprocess.run([*PROGRAM, str(folder), "kill", "8"], capture_output=True, timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in tiny_job.checkpoints(folder, "dynmoe-seed0")] == ["step-000004"]
    run = tiny_job.run_folder(folder, "dynmoe-seed0")
    assert list(run.glob("checkpoints/dynmoe-seed0/.tmp*"))
    assert tiny_job.lines(run, METRICS)[-1]["step"] == 8
    console = tiny_job.quiet()
    assert tiny_job.resume(folder, console) == 0
    assert "dense-seed0: done before" in console.file.getvalue()  # type: ignore[attr-defined]
    assert_same_job(folder, whole)
    assert not list(folder.rglob(".tmp*"))


def test_sigterm_saves_at_the_next_step_and_resume_is_bitwise_the_uninterrupted_job(
    whole: Path, tmp_path: Path
) -> None:
    """Step 5 is inside a record window and is no step of logs or checkpoints."""
    folder = tmp_path / "run"
    with subprocess.Popen(
        [*PROGRAM, str(folder), "wait", "5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert_interrupted(folder, said)
    assert tiny_job.resume(folder, tiny_job.quiet()) == 0
    assert_same_job(folder, whole)


@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="nohup has it ignored")
def test_the_end_of_the_terminal_saves_at_the_next_step(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, train_step = tmp_path / "run", Run.train_step

    def hung_up(run: Run) -> None:
        train_step(run)
        if run.row == "dynmoe" and run.step == 5:
            os.kill(os.getpid(), signal.SIGHUP)

    console = tiny_job.quiet()
    with monkeypatch.context() as patched:
        patched.setattr(Run, "train_step", hung_up)
        assert tiny_job.start(tiny_job.CONFIG, folder, console) == 128 + signal.SIGHUP
    assert_interrupted(folder, console.file.getvalue())  # type: ignore[attr-defined]
    assert tiny_job.resume(folder, tiny_job.quiet()) == 0
    assert_same_job(folder, whole)


def test_nohup_keeps_its_meaning() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop_request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_request() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_saves_at_the_next_step_every_time(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, train_step = tmp_path / "run", Run.train_step

    def interrupted(run: Run) -> None:
        train_step(run)
        if run.row == "dynmoe" and run.step in (5, 10):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "train_step", interrupted)
    console = tiny_job.quiet()
    assert tiny_job.start(tiny_job.CONFIG, folder, console) == 130
    assert_interrupted(folder, console.file.getvalue())  # type: ignore[attr-defined]
    assert tiny_job.resume(folder, console) == 130
    assert tiny_job.resume(folder, console) == 0
    assert_same_job(folder, whole)


def assert_interrupted(folder: Path, said: str) -> None:
    assert f"--resume {folder}" in said
    assert "Traceback" not in said
    assert [path.name for path in tiny_job.checkpoints(folder, "dynmoe-seed0")] == ["step-000005"]
    assert not (folder / "table.md").exists(), "an unfinished job has no table"


def test_resume_of_a_finished_job_changes_nothing_and_draws_again(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    table = (folder / "table.md").read_bytes()
    (folder / "table.md").unlink()
    logs = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    assert len(logs) == 2 * len(RUNS)
    assert tiny_job.resume(folder, tiny_job.quiet()) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == logs
    assert (folder / "table.md").read_bytes() == table


def test_no_space_keeps_the_last_checkpoint_and_says_so(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "run", files.write_synced

    def full(path: Path, content: bytes) -> None:
        if "step-000008" in str(path) and path.name == files.TENSORS:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    config = replace(tiny_job.CONFIG, rows=("dynmoe",))
    monkeypatch.setattr(files, "write_synced", full)
    with pytest.raises(ValueError, match=r"No space left on device.*step-000004, is whole.*--resume"):
        tiny_job.start(config, folder, tiny_job.quiet())
    run = tiny_job.run_folder(folder, "dynmoe-seed0")
    assert [path.name for path in (run / "checkpoints" / "dynmoe-seed0").iterdir()] == ["step-000004"]
    monkeypatch.undo()
    assert tiny_job.resume(folder, tiny_job.quiet()) == 0
    final = [read_checkpoint(tiny_job.checkpoints(path, "dynmoe-seed0")[-1]) for path in (folder, whole)]
    assert_same(final[0]["model"], final[1]["model"])


def test_no_space_in_a_log_loses_nothing_either(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full accepts no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder, log = tmp_path / "run", RunFolder.log

    def fill(run_folder: RunFolder, name: str, line: dict[str, Any]) -> None:
        if line["step"] == 6:
            with open("/dev/full", "ab", buffering=0) as full:
                monkeypatch.setitem(run_folder._logs, METRICS, full)
                log(run_folder, name, line)
        log(run_folder, name, line)

    monkeypatch.setattr(RunFolder, "log", fill)
    with pytest.raises(ValueError, match=r"No space left on device.*step-000004, is whole"):
        tiny_job.start(replace(tiny_job.CONFIG, rows=("dynmoe",)), folder, tiny_job.quiet())
    monkeypatch.undo()
    assert tiny_job.resume(folder, tiny_job.quiet()) == 0
    assert tiny_job.untimed(folder, METRICS) == [
        line for line in tiny_job.untimed(whole, METRICS) if line["row"] == "dynmoe"
    ]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job of an earlier version: all runs share one run folder."""
    path = tmp_path_factory.mktemp("shared") / "run"
    tiny_job.start_shared(path)
    return path


@pytest.mark.parametrize("layout", ["whole", "shared"])
def test_damaged_checkpoint_is_refused_by_name(
    layout: str, whole: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(layout), folder)
    damaged = tiny_job.checkpoints(folder, "top-2-seed0")[-1]
    tensors = damaged / files.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"truncated.*Remove .*top-2-seed0.*to repeat"):
        tiny_job.resume(folder, tiny_job.quiet())
    shutil.rmtree(damaged)
    if layout == "shared":
        with pytest.raises(ValueError, match=r"checkpoint of dynmoe-seed0 but none of top-2-seed0"):
            tiny_job.resume(folder, tiny_job.quiet())
        shutil.rmtree(tiny_job.checkpoints(folder, "dynmoe-seed0")[-1])
    assert tiny_job.resume(folder, tiny_job.quiet()) == 0
    assert_same_job(folder, whole)


@pytest.mark.parametrize("layout", ["whole", "shared"])
def test_logs_that_were_cut_are_refused(layout: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(layout), folder)
    with (tiny_job.run_folder(folder, "dynmoe-seed0") / METRICS).open("r+b") as log:
        log.truncate(100)
    with pytest.raises(ValueError, match=r"metrics.jsonl has 100 bytes.*cut or replaced"):
        tiny_job.resume(folder, tiny_job.quiet())


@pytest.mark.parametrize("layout", ["whole", "shared"])
def test_a_folder_in_use_is_refused(layout: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("fcntl")
    folder = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(layout), folder)
    run = tiny_job.run_folder(folder, "dynmoe-seed0")
    with RunFolder.resume(run), pytest.raises(ValueError, match="in use by another process"):
        tiny_job.resume(folder, tiny_job.quiet())


def test_a_folder_of_one_log_for_all_runs_is_resumed_as_it_is(
    whole: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished one only gets its table; one stopped inside a record window ends bitwise as a new job."""
    folder, train_step = tmp_path / "run", Run.train_step

    def interrupted(run: Run) -> None:
        train_step(run)
        if run.row == "dynmoe" and run.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "train_step", interrupted)
    with pytest.raises(Interrupted):
        tiny_job.start_shared(folder)
    monkeypatch.setattr(Run, "train_step", train_step)
    done = tmp_path / "done"
    shutil.copytree(shared, done)
    tables = []
    for path in (folder, done, tmp_path / "new"):
        if path.name == "new":
            tiny_job.run_job(path)
        else:
            assert tiny_job.resume(path, tiny_job.quiet()) == 0
            assert not (path / RUNS_FOLDER).exists()
        assert_same_job(path, whole)
        table = json.loads((path / "table.json").read_text())
        for row in table["rows"]:
            del row["step_ms"], row["step_ratio"]
        tables.append(table)
    assert tables[0] == tables[1] == tables[2]


def test_a_folder_of_one_log_for_all_runs_is_not_added_to(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(shared, folder)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(ValueError, match=r"is not empty: name another, or continue the job in it with --resume"):
        tiny_job.start(tiny_job.CONFIG, folder, tiny_job.quiet())
    with pytest.raises(ValueError, match=r"holds no job of 'experiment vision'"):
        experiment.resume(folder, VisionTask, tiny_job.quiet())
    with pytest.raises(ValueError, match=r"holds a job of 'train', not of 'vision'"):
        experiment.start(VisionTask(VisionConfig(test_domains=("75",))), folder, tiny_job.quiet())
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_rows_get_the_same_batches_and_start_from_equal_shared_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    forward = torch.nn.functional.cross_entropy

    class Spy:
        row = ""

    def record(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        seen.setdefault(Spy.row, []).append(label)
        return forward(logits, label)

    train_step = Run.train_step

    def named(run: Run) -> None:
        Spy.row = run.row
        train_step(run)

    monkeypatch.setattr(Run, "train_step", named)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", record)
    config = replace(tiny_job.CONFIG, steps=3)
    tiny_job.start(config, tmp_path / "run", tiny_job.quiet())
    assert set(seen) == set(config.rows)
    assert all(len(labels) == 3 for labels in seen.values())
    for row in config.rows:
        assert_same(seen[row], seen["dense"])
    models = {row: build_model(config, row, 0).state_dict() for row in config.rows}
    shared = [name for name in models["dense"] if not name.startswith(("blocks.1.mlp", "blocks.3.mlp"))]
    assert len(shared) > 30
    for row in config.rows:
        assert_same({name: models[row][name] for name in shared}, {name: models["dense"][name] for name in shared})
    assert not torch.equal(models["dense"]["head.weight"], build_model(config, "dense", 1).state_dict()["head.weight"])


def test_experts_are_as_wide_as_the_mlp_and_top_k_rows_have_dynmoes_first_experts() -> None:
    config = TrainConfig()
    for row in ("top-1", "top-2", "dynmoe"):
        layers = dict(build_model(config, row, 0).named_modules())
        for name in ("blocks.1.mlp", "blocks.3.mlp"):
            layer: Any = layers[name]
            assert layer.num_global_experts == config.experts
            assert layer.experts.batched_fc1_w.shape[1:] == (config.model.hidden, config.model.dim)


def test_a_diverging_loss_is_named(tmp_path: Path) -> None:
    config = replace(tiny_job.CONFIG, rows=("dense",), learning_rate=1e30)
    with pytest.raises(ValueError, match="dense-seed0 diverged"):
        tiny_job.run_job(tmp_path / "run", config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ("dense", "best")}, "rows must be .*dynmoe-k2, quantile-top-1, quantile-top-2, got dense, best"),
        ({"rows": ()}, "rows must be"),
        ({"rows": ("dense", "dense")}, "rows must be different"),
        ({"seeds": ()}, "seeds must be"),
        ({"seeds": (-1,)}, "seeds must be from 0"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"test_domain": 17}, r"test_domain must be one of \[0, 15.*got 17"),
        ({"experts": 9}, r"experts must be at most slots \(8\), got 9"),
        ({"threads": 0}, "threads must be"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
    ],
)
def test_bad_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_config_survives_its_file_and_an_unknown_one_is_refused() -> None:
    config = replace(TrainConfig().quick(), model=ViTConfig(dim=32))
    assert TrainConfig.from_dict(config.to_dict()) == config
    content = config.to_dict()
    content["epochs"] = content.pop("steps")
    with pytest.raises(ValueError, match=r"missing \['steps'\], unknown \['epochs'\]"):
        TrainConfig.from_dict(content)


def test_train_refuses_a_checkpoint_of_another_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(tiny_job.checkpoints(folder, "dynmoe-seed0")[-1])
    first = tiny_job.checkpoints(folder, "dense-seed0")[-1]
    state = {**read_checkpoint(first), "step": 4}
    run = tiny_job.run_folder(folder, "dynmoe-seed0")
    files.write_checkpoint(run / "checkpoints" / "dynmoe-seed0" / "step-000004", state)
    with pytest.raises(ValueError, match="is of dense-seed0, not of dynmoe-seed0"):
        tiny_job.resume(folder, tiny_job.quiet())
