"""A reporter that forwards to several others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dynmoe_tutel.experiments.runner import Reporter


class Several:
    """Forwards every call to all of its reporters."""

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
            reporter.close()
