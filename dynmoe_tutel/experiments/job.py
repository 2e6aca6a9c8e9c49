"""The command `train` from its options to its last line: run folder, progress, signals, table and plots."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dynmoe_tutel.experiments.report import results, table, tensorboard
from dynmoe_tutel.experiments.report.progress import ProgressBar
from dynmoe_tutel.experiments.run_folder import RunFolder, read_config
from dynmoe_tutel.experiments.runner import Interrupted, Reporter
from dynmoe_tutel.experiments.train import TrainConfig, train
from dynmoe_tutel.version import __version__


def start(config: TrainConfig, out: Path | None, console: Console) -> int:
    """Do a new job in the folder `out` (None: runs/<time>); the exit code. ValueError where the folder is unfit."""
    path = out or Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S")
    about = {"job": config.to_dict(), "dynmoe_tutel": __version__, "torch": torch.__version__}
    with RunFolder.create(path, about) as folder:
        return _finish(config, folder, console)


def resume(path: Path, console: Console) -> int:
    """Go on with the job in a folder; the exit code. ValueError where the folder holds no job or a damaged one."""
    about = read_config(path)
    if not isinstance(about.get("job"), dict):
        raise ValueError(f"{path} holds no job of 'train'")
    config = TrainConfig.from_dict(about["job"])
    warn_of_other_versions(about, console)
    with RunFolder.resume(path) as folder:
        return _finish(config, folder, console)


def warn_of_other_versions(about: Mapping[str, Any], console: Console) -> None:
    """Say where a job was started with other versions than these."""
    for name, version in (("dynmoe_tutel", __version__), ("torch", torch.__version__)):
        if about.get(name) != version:
            console.print(
                f"[yellow]The job was started with {name} {about.get(name)}, this is {version}: "
                "the result may differ from an uninterrupted job's.[/yellow]"
            )


def _finish(config: TrainConfig, folder: RunFolder, console: Console) -> int:
    console.print(f"Run folder: {folder.path}", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    reporters = Several()
    try:
        with ProgressBar(console, len(config.plan), config.steps) as bar:
            reporters.add(bar)
            if tensorboard.available():
                reporters.add(tensorboard.ScalarWriter(folder.path))
            train(config, folder, reporters)
    except Interrupted as interrupted:
        console.print(
            f"[yellow]The job was {interrupted}.[/yellow] The state is saved. Continue with:\n"
            f"  dynmoe-tutel train --resume {shlex.quote(str(folder.path))}",
            highlight=False,
            soft_wrap=True,
        )
        return 128 + interrupted.signum
    finally:
        reporters.close()
    summaries = results.write_table(folder, config.rows, config.seeds, config.steps)
    plots = results.write_plots(folder, config.rows, config.slots)
    console.print(table.rich_table(summaries, config.steps))
    console.print(table.verdict(summaries), highlight=False)
    console.print(
        f"Test domain: {config.test_domain} degrees. {time.perf_counter() - started:.0f} s. "
        f"Table, {', '.join(plots)} in {folder.path}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


class Several:
    """Tells several reporters."""

    def __init__(self, reporters: Iterable[Reporter] = ()) -> None:
        self._all = list(reporters)

    def add(self, reporter: Reporter) -> None:
        self._all.append(reporter)

    def run_skipped(self, run: str, steps: int) -> None:
        for reporter in self._all:
            reporter.run_skipped(run, steps)

    def run_started(self, run: str, step: int, steps: int) -> None:
        for reporter in self._all:
            reporter.run_started(run, step, steps)

    def stepped(self, run: str, step: int) -> None:
        for reporter in self._all:
            reporter.stepped(run, step)

    def logged(self, run: str, line: Mapping[str, Any]) -> None:
        for reporter in self._all:
            reporter.logged(run, line)

    def run_ended(self, run: str, line: Mapping[str, Any]) -> None:
        for reporter in self._all:
            reporter.run_ended(run, line)

    def close(self) -> None:
        for reporter in self._all:
            if isinstance(reporter, tensorboard.ScalarWriter):
                reporter.close()
