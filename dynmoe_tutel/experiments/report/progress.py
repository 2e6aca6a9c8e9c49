"""The progress bar of a job: loss, accuracy, mean k and experts, with a line for every finished run. Needs rich."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """Shows a job of `runs` runs of `steps` steps each; to be used in a `with` statement.

    Without a terminal only the lines of the finished runs are printed.
    """

    def __init__(self, console: Console, runs: int, steps: int) -> None:
        self.console = console
        self.steps = steps
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self.task = self.progress.add_task("starting", total=runs * steps, state="")

    def __enter__(self) -> ProgressBar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def run_skipped(self, run: str, steps: int) -> None:
        self.progress.update(self.task, advance=steps)
        self.console.print(f"{run}: done before", highlight=False)

    def run_started(self, run: str, step: int, steps: int) -> None:
        self.progress.update(self.task, description=run, state="", advance=step)

    def stepped(self, run: str, step: int) -> None:
        self.progress.update(self.task, advance=1)

    def logged(self, run: str, line: Mapping[str, Any]) -> None:
        if line["kind"] == "train":
            state = f"loss {line['loss']:.2f}  accuracy {line['accuracy']:.0%}{_routing(line)}"
            self.progress.update(self.task, state=state)

    def run_ended(self, run: str, line: Mapping[str, Any]) -> None:
        text = f"{run}: {line['in_accuracy']:.1%} in domain, {line['out_accuracy']:.1%} out of domain"
        self.console.print(f"{text}{_routing(line)}", highlight=False)

    def close(self) -> None:
        """Do nothing: the `with` statement stops the bar."""


def _routing(line: Mapping[str, Any]) -> str:
    layers = [layer for layer in line["layers"].values() if layer["k"] is not None]
    if not layers:
        return ""
    k = statistics.fmean(layer["k"] for layer in layers)
    return f"  k {k:.2f}  experts {' '.join(str(layer['experts']) for layer in layers)}"
