"""Refusals of a busy machine are retried, and told apart from faults of the input."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.common import patience
from benchmarks.common.patience import NOT_STARTED, NotStartedError, in_processes, patiently

AGAIN = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
REFUSALS = [
    AGAIN,
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    MemoryError(),
    BrokenProcessPool("a process ended"),
    RuntimeError("Resource temporarily unavailable"),  # a C++ thread
    RuntimeError("can't start new thread"),
    RuntimeError("PTXAS error: `ptxas` failed with error code -9\n`ptxas` stderr:\n"),
    subprocess.CalledProcessError(-signal.SIGKILL, "cuobjdump"),
]
FINDINGS = [
    ValueError("unsupported"),
    RuntimeError("PTXAS error: `ptxas` failed with error code 255"),
    subprocess.CalledProcessError(-signal.SIGSEGV, "ptxas"),
    subprocess.CalledProcessError(1, "cuobjdump"),
]


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Records the pauses without sleeping."""
    pauses: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
    return pauses


def refusing(errors: list[Exception]) -> Callable[[], str]:
    """A call that raises one of these errors per try, then returns a result."""
    left = iter(errors)

    def call() -> str:
        for error in left:
            raise error
        return "done"

    return call


class TestPatiently:
    @pytest.mark.parametrize("error", REFUSALS, ids=repr)
    def test_what_the_machine_refuses_is_tried_again(self, error: Exception, slept: list[float]) -> None:
        assert patiently(refusing([error, error]), (1, 2, 3)) == "done"
        assert slept == [1, 2]

    @pytest.mark.parametrize("error", REFUSALS, ids=repr)
    def test_and_is_reported_as_such_in_the_end(self, error: Exception, slept: list[float]) -> None:
        with pytest.raises(NotStartedError, match=type(error).__name__) as raised:
            patiently(refusing([error] * 4), (1, 2, 3))
        assert raised.value.__cause__ is error
        assert slept == [1, 2, 3]

    @pytest.mark.parametrize("error", FINDINGS, ids=repr)
    def test_any_other_error_is_raised_at_once(self, error: Exception, slept: list[float]) -> None:
        with pytest.raises(type(error)) as raised:
            patiently(refusing([error]))
        assert raised.value is error
        assert slept == []

    def test_no_pause_brings_a_missing_tool(self, slept: list[float]) -> None:
        with pytest.raises(NotStartedError, match="FileNotFoundError"):
            patiently(refusing([FileNotFoundError("ptxas")] * 9))
        assert slept == []


def ends_once(folder: str, task: int) -> int:
    """Task 2 ends its process the first time."""
    if task == 2 and not (Path(folder) / "ended").exists():
        (Path(folder) / "ended").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * task


def ends_always(task: int) -> int:
    """Task 2 ends its process whenever it comes."""
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * task


TASKS = [(task,) for task in range(5)]


class TestInProcesses:
    def test_a_process_that_ends_is_followed_by_another(self, tmp_path: Path) -> None:
        found = list(in_processes(partial(ends_once, str(tmp_path)), TASKS, 2, (0,)))
        assert found == [0, 10, 20, 30, 40]

    def test_a_task_that_ends_every_process_costs_no_other(self) -> None:
        found = list(in_processes(ends_always, TASKS, 2, (0,)))
        assert [*found[:2], *found[3:]] == [0, 10, 30, 40]
        assert isinstance(found[2], NotStartedError)
        assert "BrokenProcessPool" in str(found[2])

    def test_a_process_that_cannot_be_started(self, slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        """The second of two cannot start: the first, which waits for work, is killed, and one process does all."""
        start, tries = patience.get_context("spawn").Process.start, iter([False, True])

        def refuse(process: object) -> None:
            if next(tries, False):
                raise AGAIN
            start(process)

        monkeypatch.setattr(patience.get_context("spawn").Process, "start", refuse)
        assert list(in_processes(abs, [(-1,), (-2,)], 2, (7,))) == [1, 2]
        assert slept == [7]
        assert not patience.active_children()

    def test_no_process_can_be_started(self, slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        """It waits only for the first task; the tasks after it are tried once."""

        def refuse(process: object) -> None:
            raise AGAIN

        monkeypatch.setattr(patience.get_context("spawn").Process, "start", refuse)
        found = list(in_processes(abs, [(-1,), (-2,)], 2, (1, 2)))
        assert all(isinstance(result, NotStartedError) for result in found)
        assert (len(found), slept) == (2, [1, 2])


class TestParts:
    """The parts of `make gpu`."""

    def refuse(self, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
        start, left = subprocess.Popen, iter(range(times))

        def popen(*args: object, **options: object) -> object:
            for _ in left:
                raise AGAIN
            return start(*args, **options)  # type: ignore[call-overload]

        monkeypatch.setattr(gpu.subprocess, "Popen", popen)

    @pytest.mark.parametrize(("times", "outcome"), [(2, "passed"), (99, "could not be started: BlockingIOError: ")])
    def test_the_process_of_a_part(
        self, times: int, outcome: str, tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.refuse(times, monkeypatch)
        found, status = gpu.run(gpu.Part("p", (sys.executable, "-c", ""), 1.0), 300, tmp_path)
        assert found.startswith(outcome)
        assert status == (0 if times < 99 else NOT_STARTED)
        assert slept == list(patience.PAUSES)[:times]

    def test_what_a_part_could_not_start(self, tmp_path: Path) -> None:
        command = (sys.executable, "-c", f"raise SystemExit({NOT_STARTED})")
        assert gpu.run(gpu.Part("p", command, 1.0), 300, tmp_path)[0] == "failed: a tool could not be started"


def test_it_imports_nothing_heavy() -> None:
    """The interpreter that runs `make gpu` may have no torch; then `make gpu` says so."""
    code = (
        "import sys, json, benchmarks.common.patience as _; "
        "print(json.dumps([m for m in sys.modules if m in ('torch', 'triton')]))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
