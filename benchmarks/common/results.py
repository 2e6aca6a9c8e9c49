"""Writes a benchmark's results to disk after every step, so that a run that is killed or crashes keeps them.

The file has the keys `environment`, `bounds`, `results`, `failures` (where, why), `begun` and `finished` (names of
steps) and those that a benchmark adds. A run with `resume` skips the steps that the earlier run began.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .timing import write

DEVICE_LOST = 3  # exit status of a benchmark that a fresh process can continue
MOST_TRACEBACK = 4000  # characters, the last ones


class Progress:
    """The summary of a benchmark, its JSON file and, as a `page` beside it, the table."""

    def __init__(
        self,
        out: Path | None,
        summary: dict[str, Any],
        table: Callable[[dict[str, Any]], str],
        resume: bool = False,
        page: bool = True,
    ) -> None:
        self.out, self.table, self.page = out, table, page
        self.summary: dict[str, Any] = {**summary, "results": [], "failures": [], "begun": [], "finished": []}
        if resume and out is not None and out.exists():
            before = json.loads(out.read_text())
            self.summary |= {name: value for name, value in before.items() if name not in summary}
        self.earlier = tuple(self.summary["begun"])
        for step in self.earlier:
            if step not in self.summary["finished"]:
                self.finish(step, "the process ended before the end of it")

    @property
    def results(self) -> list[dict[str, Any]]:
        """One entry a measurement."""
        return self.summary["results"]

    def begin(self, step: str) -> bool:
        """Note that a step begins; False if an earlier run began it."""
        if step in self.earlier:
            return False
        self.summary["begun"].append(step)
        self.save()
        return True

    def finish(self, step: str, error: Exception | str | None = None) -> None:
        """Note that a step is over, and why it failed, if it did."""
        self.summary["finished"].append(step)
        if error is None:
            self.save()
        else:
            self.fail(step, error)

    def fail(self, where: str, error: Exception | str) -> None:
        """Note and print what could not be measured; the file also gets an exception's traceback."""
        failure = {"where": where, "why": error if isinstance(error, str) else reason(error)}
        if isinstance(error, Exception):
            failure["traceback"] = "".join(traceback.format_exception(error))[-MOST_TRACEBACK:]
        print(f"FAILED {where}: {failure['why']}", flush=True)
        self.summary["failures"].append(failure)
        self.save()

    def save(self) -> None:
        """Write the file and the table."""
        if self.out is not None:
            write(self.out, self.summary, self.table(self.summary) if self.page else None)

    def conclude(self, limit: float) -> int:
        """Print the table; return the exit status: 1 if something failed or nothing began within `limit` seconds."""
        if not self.results and not self.summary["failures"]:
            print(f"nothing is measured: --seconds {limit:g} went by before the first shape", file=sys.stderr)
            return 1
        print("\n" + self.table(self.summary))
        return 1 if self.summary["failures"] else 0


def late_compilations() -> list[str]:
    """A list that grows by the name of every kernel that Triton compiles in this process and did not find on disk."""
    from triton import knobs

    names: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(src.name)

    knobs.compilation.listener = listen
    return names


def reason(error: BaseException) -> str:
    """One line of an exception."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300]


def usable(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access, every call in the process fails."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False
