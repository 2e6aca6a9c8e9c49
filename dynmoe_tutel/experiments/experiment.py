"""The engine behind `train` and `experiment ...`: it runs a task in a job folder, then writes the table and the plots.

    config.json  runs/<run>/{config.json, metrics.jsonl, events.jsonl, checkpoints/}  table.md  table.json  *.png

Every run is a run folder of its own (run_folder.py), so runs can be done in any order and by several commands, as long
as the protocol in config.json is the same; the table is made of all runs that are finished. Earlier versions
of `train` kept all runs in one run folder; such folders can still be resumed.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dynmoe_tutel.checkpoint import write_file
from dynmoe_tutel.experiments.report import claims, plots, table, tensorboard
from dynmoe_tutel.experiments.report.progress import ProgressBar
from dynmoe_tutel.experiments.report.reporters import Several
from dynmoe_tutel.experiments.rows import row_order
from dynmoe_tutel.experiments.run_folder import (
    CONFIG,
    EVENTS,
    METRICS,
    RUNS,
    NoFolder,
    RunFolder,
    checkpoints_of,
    read_config,
    read_log,
)
from dynmoe_tutel.experiments.runner import Interrupted, Run, run_all, stop_requests, thread_count
from dynmoe_tutel.experiments.task import RunKey, Task
from dynmoe_tutel.version import __version__

VERSIONS = {"dynmoe_tutel": __version__, "torch": torch.__version__}
SHARED = "job"  # key of the settings in config.json, where all runs share one run folder
WARM_UP_STEPS, TIMED_STEPS, TIMED_BATCHES = 1, 2, 2


def start(task: Task, out: Path | None, console: Console) -> int:
    """Do the task's runs in the folder `out` (None: runs/<time>), new or of the same protocol; the exit code.

    ValueError where the folder is unfit or holds runs of another protocol, and for options that no model can be built
    with; nothing is in the folder then.
    """
    path = out or Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S")
    protocol = _plain(task.protocol())
    is_new = not (path / CONFIG).exists()
    if is_new:
        _make_folder(path)
    else:
        about = read_config(path)
        _refuse_other_task(path, about, type(task))
        _refuse_other_protocol(path, about, protocol)
        _warn_of_other_versions(about, console)
    job = _Job(task, path, [(path / RUNS / key.name, [key]) for key in task.plan])
    _announce(job, console)
    if is_new:
        about = {"experiment": task.experiment_name(), "protocol": protocol, **VERSIONS}
        _write(path, CONFIG, json.dumps(about, indent=2) + "\n")
    for folder, key in job.runs():
        if not (folder / CONFIG).exists():
            axes = {axis: list(_plain(getattr(task.settings, axis))) for axis in task.axes}
            with RunFolder.create(folder, {"run": key.fields, "axes": axes, **VERSIONS}):
                pass
    return _finish(job, console)


def resume(path: Path, task_type: type[Task], console: Console, **moved: Any) -> int:
    """Do what was asked for in this folder and is not done yet; the exit code.

    `moved`: the task's `movable` settings. ValueError if the folder holds no job of this task, or if its data changed.
    """
    about = read_config(path)
    if isinstance(about.get(SHARED), dict) and task_type.experiment_name() == "train":
        task = task_type.of(about[SHARED], **moved)
        job = _Job(task, path, [(path, task.plan)])
    else:
        if "experiment" not in about or not isinstance(about.get("protocol"), dict):
            raise ValueError(f"{path} holds no job of {task_type.command!r}")
        _refuse_other_task(path, about, task_type)
        task = task_type.of({**about["protocol"], **_asked_for(path)}, **moved)
        _refuse_other_protocol(path, about, _plain(task.protocol()))
        groups = [(path / RUNS / key.name, [key]) for key in task.plan]
        job = _Job(task, path, [(folder, keys) for folder, keys in groups if (folder / CONFIG).exists()])
    _warn_of_other_versions(about, console)
    _announce(job, console)
    return _finish(job, console)


@dataclass(frozen=True)
class _Job:
    """The work in a job folder `path`: pairs of a run folder and the runs that write to its logs."""

    task: Task
    path: Path
    groups: list[tuple[Path, list[RunKey]]]

    def runs(self) -> Iterator[tuple[Path, RunKey]]:
        """All runs, each with its run folder."""
        return ((folder, key) for folder, keys in self.groups for key in keys)

    @property
    def to_resume(self) -> str:
        """The arguments after --resume that continue this job."""
        return shlex.quote(str(self.path)) + self.task.resume_options


def _asked_for(path: Path) -> dict[str, list[Any]]:
    """The union of the axes of all commands that used this folder; an empty axis stands for all there is."""
    configs = [read_config(folder) for folder in sorted((path / RUNS).glob("*")) if (folder / CONFIG).exists()]
    if not configs:
        raise ValueError(f"{path} holds no run")
    axes: dict[str, list[Any]] = {}
    for config in configs:
        of_run = config.get("axes")
        if not isinstance(of_run, dict) or not all(isinstance(values, list) for values in of_run.values()):
            raise ValueError(f"{path} has a run whose {CONFIG} has no axes: it is damaged or of another version")
        for axis, values in of_run.items():
            known = axes.get(axis, values)
            axes[axis] = list(dict.fromkeys([*known, *values])) if known and values else []
    return axes


def _warn_of_other_versions(about: Mapping[str, Any], console: Console) -> None:
    """Warn if the job was started with other versions."""
    for name, version in VERSIONS.items():
        if about.get(name) != version:
            console.print(
                f"[yellow]The job was started with {name} {about.get(name)}, this is {version}: "
                "the result may differ from an uninterrupted job's.[/yellow]"
            )


def estimate(task: Task, plan: list[RunKey]) -> float:
    """Seconds that these runs take, measured: a few steps and batches of evaluation of every row, then thrown away."""
    by_row: dict[str, tuple[float, float]] = {}
    evaluations = 1 + -(-task.settings.steps // task.settings.eval_every)
    with thread_count(task.settings.threads):
        for key in plan:
            if key.row not in by_row:
                run = Run(task, key, NoFolder(), Several())
                for _ in range(min(WARM_UP_STEPS + TIMED_STEPS, task.settings.steps)):  # a task has no more batches
                    run.train_step()
                step = statistics.fmean(run.step_ms[WARM_UP_STEPS:] or run.step_ms) / 1e3
                small, whole = (_evaluation_seconds(run, at) for at in (1, task.settings.steps))
                by_row[key.row] = (step, whole + (evaluations - 1) * small)
    return sum(by_row[key.row][0] * task.settings.steps + by_row[key.row][1] for key in plan)


@torch.no_grad()
def _evaluation_seconds(run: Run, step: int) -> float:
    """Of the evaluation after so many steps, from the first batches of every part."""
    run.model.eval()
    seconds = 0.0
    for part in run.task.parts(run.key, step):
        start, done = time.perf_counter(), 0
        for done, (inputs, _) in enumerate(part.batches, 1):
            run.task.logits(run.model, inputs)
            if done == TIMED_BATCHES:
                break
        seconds += (time.perf_counter() - start) / max(1, done) * len(part.batches)
    run.model.train()
    return seconds


def _announce(job: _Job, console: Console) -> None:
    """Print the folder, and how long what is not done yet will take."""
    console.print(f"Folder: {job.path}", highlight=False, soft_wrap=True)
    task, steps = job.task, job.task.settings.steps
    pending = [key for folder, key in job.runs() if not _is_done(folder, key, steps)]
    beside = task.seconds_beside_runs(job.path)
    if pending or beside:
        minutes = (estimate(task, pending) + beside) / 60
        console.print(
            f"{len(pending)} runs of {steps} steps: about {minutes:.0f} min on {task.settings.threads} "
            f"threads, measured on {TIMED_STEPS} steps of every row. Ctrl-C stops, "
            f"--resume {job.to_resume} goes on.",
            highlight=False,
            soft_wrap=True,
        )


def _finish(job: _Job, console: Console) -> int:
    started = time.perf_counter()
    task = job.task
    try:
        with ProgressBar(console, len(list(job.runs())), task.settings.steps) as bar, stop_requests() as stop_request:
            for path, keys in job.groups:
                signum = stop_request()
                if signum is not None:
                    raise Interrupted(signum)
                with RunFolder.resume(path) as folder:
                    reporters = Several([bar])
                    if tensorboard.available():
                        reporters.add(tensorboard.ScalarWriter(path))
                    try:
                        run_all(task, keys, folder, reporters, stop_request)
                    finally:
                        reporters.close()
            task.measure(job.path, stop_request)
            signum = stop_request()
            if signum is not None:
                raise Interrupted(signum)
    except Interrupted as interrupted:
        console.print(
            f"[yellow]The job was {interrupted}.[/yellow] The state is saved. Continue with:\n"
            f"  dynmoe-tutel {task.command} --resume {job.to_resume}",
            highlight=False,
            soft_wrap=True,
        )
        return 128 + interrupted.signum
    if not task.report(job.path, console):
        _report(task, job.path, console)
    seconds = time.perf_counter() - started
    console.print(f"{task.about}{seconds:.0f} s. Tables and plots in {job.path}", highlight=False, soft_wrap=True)
    return 0


def _report(task: Task, path: Path, console: Console) -> None:
    """Write tables and plots of all finished runs in the folder, and print the tables."""
    metrics, events = read_runs(path)
    rows = row_order({line["row"] for line in metrics})
    steps = task.settings.steps
    summaries = table.summarise(metrics, rows, steps, task.selection)
    _write(path, "table.md", table.markdown(summaries, steps, task.selection))
    content = table.as_json(summaries, steps, task.selection)
    if task.selection != "last":
        content["after_last_step"] = table.as_json(table.summarise(metrics, rows, steps), steps, "last")
    _write(path, "table.json", json.dumps(content, indent=2) + "\n")
    done = {(row.row, *run) for row in summaries for run in row.runs}
    first = min(test for _, _, test in done)  # the plots against steps are of runs that left out the same part
    metrics, events = (
        [line for line in log if line.get("test", "") == first and (line["row"], line["seed"], first) in done]
        for log in (metrics, events)
    )
    for name, picture in plots.draw(metrics, events, summaries, task.settings.slots).items():
        _write(path, name, picture)
    for drawn in table.rich_tables(summaries, steps, task.selection, console.width):
        console.print(drawn)
    console.print("\n".join([table.verdict(summaries), *claims.sentences(summaries)]), highlight=False)


def read_runs(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of metrics and events of all runs in a job's folder."""
    folders = [path, *sorted((path / RUNS).glob("*"))]
    folders = [folder for folder in folders if (folder / METRICS).exists()]
    metrics, events = ([line for folder in folders for line in read_log(folder, name)] for name in (METRICS, EVENTS))
    return metrics, events


def _is_done(folder: Path, key: RunKey, steps: int) -> bool:
    found = checkpoints_of(folder, key.name)
    return bool(found) and found[-1].name.endswith(f"-{steps:06d}")


def _refuse_other_task(path: Path, about: Mapping[str, Any], task_type: type[Task]) -> None:
    found, name = about.get("experiment") or "train", task_type.experiment_name()
    if found != name:
        raise ValueError(f"{path} holds a job of {found!r}, not of {name!r}")
    if SHARED in about:
        raise ValueError(f"folder {path} is not empty: name another, or continue the job in it with --resume")


def _refuse_other_protocol(path: Path, about: Mapping[str, Any], protocol: Mapping[str, Any]) -> None:
    before = about.get("protocol")
    if not isinstance(before, Mapping):
        raise ValueError(f"{path / CONFIG} has no protocol: it is damaged or of another version")
    differing = [key for key in {**before, **protocol} if before.get(key) != protocol.get(key)]
    if differing:
        changes = "; ".join(f"{key}: {before.get(key)!r} there, {protocol.get(key)!r} now" for key in sorted(differing))
        raise ValueError(f"{path} holds runs of another protocol, which cannot share a table: {changes}")


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _make_folder(path: Path) -> None:
    """A new or empty folder at `path`. ValueError where it is neither, or cannot be written."""
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"folder {path} is not empty and holds no experiment: name another")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder {path} cannot be written: {error.strerror or error}") from error
    if not os.access(path, os.W_OK | os.X_OK):  # said now, and not after the time is measured
        raise ValueError(f"folder {path} cannot be written: permission denied")


def _write(path: Path, name: str, content: bytes | str) -> None:
    try:
        write_file(path / name, content)
    except OSError as error:
        raise ValueError(f"folder {path} cannot be written: {error.strerror or error}") from error
