"""`make gpu` runs from a checkout and says when there is no GPU; the runner of its parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PATIENCE, wait_until

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of only the sources, with the checkout's link to the kernels."""
    for name in ("dynmoe_tutel", "kernels", "benchmarks", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in ("Makefile", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-s", *arguments], cwd=directory, capture_output=True, text=True)


def test_a_checkout_is_the_package_without_an_installation(copy: Path) -> None:
    """Modules of all four directories come from the checkout, though another dynmoe_tutel may be installed."""
    names = ("dynmoe_tutel", "dynmoe_tutel.kernels.gpu.tiles", "dynmoe_tutel.gates", "benchmarks.common.shapes")
    code = f"from importlib import import_module\nfor n in {names!r}: print(import_module(n).__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(copy)) for line in done.stdout.splitlines()), done.stdout


@needs_make
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(copy: Path) -> None:
    done = make(copy, "gpu", f"PYTHON={sys.executable}", f"RESULTS={copy / 'out'}")
    assert done.returncode != 0
    assert "make gpu: no GPU: torch" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (copy / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_make_it_says_so_too(copy: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--results", str(copy / "out")]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("make gpu: no GPU: torch")
    assert not (copy / "out").exists()


class TestLayOut:
    """A copy may come without symbolic links."""

    @pytest.mark.parametrize("lost", ["nothing is there", "a file with the link's text", "nothing is lost"])
    def test_the_link_is_made_again(self, lost: str, copy: Path) -> None:
        kernels = copy / "dynmoe_tutel" / "kernels"
        if lost != "nothing is lost":
            kernels.unlink()
        if lost == "a file with the link's text":
            kernels.write_text("../kernels")
        assert gpu.lay_out(copy) is None
        assert os.readlink(kernels) == "../kernels"
        assert (kernels / "__init__.py").exists()

    def test_what_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "dynmoe_tutel" / "kernels").mkdir(parents=True)
        why = gpu.lay_out(tmp_path)
        assert why is not None
        assert str(tmp_path / "dynmoe_tutel" / "kernels") in why


@needs_make
def test_an_interpreter_without_torch_is_named(copy: Path) -> None:
    python = copy / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    done = make(copy, "gpu", "PYTHON=./python")
    assert done.returncode != 0
    assert "has no torch: name an interpreter" in done.stderr


def parts(*shares: float, code: str = "", **more: Any) -> list[gpu.Part]:
    """Parts a, b, ... that run `code` in Python."""
    return [gpu.Part(n, (sys.executable, "-c", code), s, **more) for n, s in zip("abcd", shares, strict=False)]


class TestTime:
    def test_the_shares_are_all_of_it_and_benchmarks_end_before_they_are_ended(self, tmp_path: Path) -> None:
        found = gpu.parts(tmp_path)
        assert [part.name for part in found] == ["smoke", "compilation", "layer", "kernels", "tests"]
        assert sum(part.share for part in found) == pytest.approx(1)
        for part in found:
            command = gpu._command(part, 100.0, again=False)
            assert ("--seconds" in command) == (part.name != "tests")
            if part.budget:
                assert float(command[command.index("--seconds") + 1]) == 85
            assert ("--resume" in gpu._command(part, 100.0, again=True)) or not part.resumes or part.name == "tests"

    def test_what_a_part_does_not_use_the_next_ones_have(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Shares 0.2, 0.3, 0.5 of 100 s; the first part takes 10 s of its 20, the second overruns by 3 s."""
        clock, used, limits = [1000.0], iter([10.0, 36.75, 50.0]), []

        def run(part: gpu.Part, limit: float, results: Path, again: bool = False) -> tuple[str, int]:
            limits.append(limit)
            clock[0] += next(used)
            return "passed", 0

        monkeypatch.setattr(gpu, "parts", lambda _: parts(0.2, 0.3, 0.5))
        monkeypatch.setattr(gpu, "run", run)
        monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
        gpu.run_all(tmp_path, 100)
        assert limits == pytest.approx([20, 90 * 0.3 / 0.8, 100 - 10 - 36.75])


class TestCrashes:
    """A benchmark that lost the device goes on in a fresh process; one that finished or was ended does not."""

    @pytest.mark.parametrize(
        ("statuses", "outcome"),
        [
            ([0], "passed"),
            ([1], "failed (1)"),
            ([3, 0], "failed (3), the rest passed"),
            ([-11, 3, 1], "failed (-11), then failed (3), then failed (1)"),
            ([3, 3, 3, 3], "failed (3), then failed (3), then failed (3), then failed (3)"),
        ],
    )
    def test_it_goes_on(
        self, statuses: list[int], outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left, resumed = iter(statuses), []

        def run(part: gpu.Part, limit: float, results: Path, again: bool = False) -> tuple[str, int]:
            resumed.append(again)
            status = next(left)
            return (f"failed ({status})" if status else "passed"), status

        monkeypatch.setattr(gpu, "parts", lambda _: parts(1, resumes=True))
        monkeypatch.setattr(gpu, "run", run)
        assert gpu.run_all(tmp_path, 100) == {"a": outcome}
        assert resumed == [False, *[True] * (len(statuses) - 1)]

    def test_not_without_time_and_not_where_it_was_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "parts", lambda _: parts(0.1, 0.9, resumes=True))
        found = iter([("failed (3)", 3), ("ended after 90 s", -9)])
        monkeypatch.setattr(gpu, "run", lambda *_, **__: next(found))
        assert gpu.run_all(tmp_path, 100) == {"a": "failed (3)", "b": "ended after 90 s"}

    def test_a_part_that_fails_ends_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The exit status and the last lines report the failure."""
        monkeypatch.setattr(gpu, "missing", lambda: None)
        good, bad = "print('good')", "raise SystemExit(1)"
        monkeypatch.setattr(gpu, "parts", lambda _: [*parts(0.3, code=bad), *parts(0.3, 0.4, code=good)[1:]])
        (tmp_path / "layer-gpu.json").write_text("of another run")
        assert gpu.main(["--results", str(tmp_path), "--seconds", f"{PATIENCE}"]) == 1
        out = capsys.readouterr().out
        assert "a failed (1); b passed\n" in out
        assert "| bare / ours, ViT-S" in out
        page = (tmp_path / "targets-gpu.md").read_text()
        assert "bare / ours, ViT-S" in page
        assert page.splitlines()[-10:] == [f"* {line}" for line in out.splitlines()[-10:]]
        assert "a failed (1)\n" in out, "ten lines after the first part"
        assert not (tmp_path / "layer-gpu.json").exists()


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Records the seconds of each timer; the shortest timer fires once the file `begun` exists."""
    seconds: list[float] = []

    class Timer:
        def __init__(self, interval: float, function: Callable[[], None]) -> None:
            self.interval, self.function, self.ended = interval, function, threading.Event()
            seconds.append(interval)

        def start(self) -> None:
            threading.Thread(target=self.run, daemon=True).start()

        def run(self) -> None:
            end = time.monotonic() + PATIENCE
            first = self.interval == min(seconds)
            while time.monotonic() < end and not (first and (tmp_path / "begun").exists()):
                if self.ended.wait(0.02):
                    return
            self.function()

        def cancel(self) -> None:
            self.ended.set()

    monkeypatch.setattr(gpu.threading, "Timer", Timer)
    return seconds


def test_a_part_that_overruns_is_ended_with_what_it_started(
    tmp_path: Path, begun: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    grandchild = f"open({str(tmp_path / 'begun')!r}, 'w'); {WAIT}"
    child = f"import subprocess, sys; print('here', flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    outcome, _ = gpu.run(gpu.Part("p", (sys.executable, "-c", child), 1.0, "log.txt"), 1.5, tmp_path)
    assert outcome == "ended after 2 s"
    assert begun == [1.5]
    assert (tmp_path / "log.txt").read_text() == "here\n"
    assert "here" in capfd.readouterr().out


TESTS = """
import pathlib, time
def test_a(): assert False, "the reason"
def test_b():
    (pathlib.Path(__file__).parent / "begun").touch()
    time.sleep(3600)
"""


def test_tests_that_overrun_say_what_failed(
    tmp_path: Path, begun: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    """They are interrupted first; only the log has the names of tests that pass, and tracebacks."""
    (tmp_path / "test_x.py").write_text("def test_0(): pass\n" + TESTS)
    command = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path))
    outcome, _ = gpu.run(gpu.Part("tests", command, 1.0, "log.txt", grace=22.0), 30.0, tmp_path)
    assert outcome == "ended after 30 s"
    assert begun == [30.0, 8.0], "the end, and an interrupt before it"
    log, screen = (tmp_path / "log.txt").read_text(), capfd.readouterr().out
    for text in (log, screen):
        assert "FAILED" in text
        assert "the reason" in text
        assert "1 failed, 1 passed" in text
    assert "test_0 PASSED" in log
    assert "test_0" not in screen
    assert 'assert False, "the reason"' in log
    assert 'assert False, "the reason"' not in screen


def test_many_failures_leave_room_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "FAILURES", 3)
    code = "for i in range(9): print(f'FAILED test_{i}')\nprint('=== 9 failed in 1.00s ===')"
    gpu.run(gpu.Part("tests", (sys.executable, "-c", code), 1.0, "log.txt"), PATIENCE, tmp_path)
    lines = capfd.readouterr().out.splitlines()[-4:]
    assert lines == ["FAILED test_0", "FAILED test_1", "FAILED test_2", "=== 9 failed in 1.00s ==="]
    assert (tmp_path / "log.txt").read_text().count("FAILED") == 9


def test_a_process_that_a_kill_does_not_end_is_left(
    tmp_path: Path, begun: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose device hangs may be: the next part begins all the same."""
    monkeypatch.setattr(gpu, "UNKILLABLE", 0.1)
    monkeypatch.setattr(gpu, "_end", lambda *_: None)
    started: list[Any] = []
    start = gpu._start
    monkeypatch.setattr(gpu, "_start", lambda command: started.append(start(command)) or started[-1])
    code = f"open({str(tmp_path / 'begun')!r}, 'w'); {WAIT}"
    try:
        outcome, status = gpu.run(gpu.Part("p", (sys.executable, "-c", code), 1.0), 1.0, tmp_path)
        assert outcome == "ended after 1 s"
        assert status < 0
    finally:
        started[0].kill()


def test_parts_run_from_the_checkout_whatever_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = (sys.executable, "-c", "import benchmarks.common.shapes as s; print(s.__file__)")
    gpu.run(gpu.Part("p", command, 1.0, "log.txt"), PATIENCE, tmp_path)
    assert (tmp_path / "log.txt").read_text().startswith(str(ROOT))


def test_what_a_part_leaves_behind_is_ended(tmp_path: Path) -> None:
    """The part leaves a child that keeps the pipe open."""
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {WAIT!r}]).pid)"
    outcome, _ = gpu.run(gpu.Part("p", (sys.executable, "-c", code), 1.0, "log.txt"), PATIENCE, tmp_path)
    assert outcome == "passed"
    left = int((tmp_path / "log.txt").read_text())
    wait_until(lambda: _is_gone(left), "what was left behind ended")


def _is_gone(pid: int) -> bool:
    """Whether it ended, even if its parent has not reaped it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def never(*_: object) -> str:
    raise AssertionError("run before the options were checked")


class TestOptions:
    @pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e12", "soon"])
    def test_seconds(self, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(gpu, "missing", never)
        with pytest.raises(SystemExit, match=r"^2$"):
            gpu.main(["--seconds", value])
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"argument --seconds: came {value!r}, allowed: seconds above 0 and at most 86400" in line

    def test_results_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A file is in the way of the folder, or a folder is in the way of a file."""
        monkeypatch.setattr(gpu, "missing", lambda: None)
        monkeypatch.setattr(gpu, "run", never)
        (tmp_path / "file").write_text("")
        (tmp_path / "layer-gpu.md").mkdir()
        for results, path in ((tmp_path / "file", "file/smoke-gpu.json"), (tmp_path, "layer-gpu.md")):
            with pytest.raises(SystemExit, match=r"^2$"):
                gpu.main(["--results", str(results)])
            line = capsys.readouterr().err.splitlines()[-1]
            assert f"argument --results: came '{tmp_path / path}', not writable" in line

    def test_results_in_folders_that_are_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "missing", lambda: None)
        ran = []

        def run(part: gpu.Part, limit: float, results: Path, again: bool = False) -> tuple[str, int]:
            assert list(results.iterdir()) == []
            assert limit > 0
            ran.append(part.name)
            return "passed", 0

        monkeypatch.setattr(gpu, "run", run)
        assert gpu.main(["--results", str(tmp_path / "a" / "b"), "--seconds", "0.5"]) == 0
        assert ran == ["smoke", "compilation", "layer", "kernels", "tests"]

    def test_at_most_eight_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is brought back from a machine may be no more."""
        checked: list[Path] = []
        monkeypatch.setattr(gpu, "missing", lambda: None)
        monkeypatch.setattr(gpu, "check_outputs", lambda parser, option, paths: checked.extend(paths))
        monkeypatch.setattr(gpu, "run", lambda *_, **__: ("passed", 0))
        assert gpu.main(["--results", str(tmp_path)]) == 0
        assert len(set(checked)) == len(checked) <= 8
        assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in checked}


WAIT = "import time; time.sleep(3600)"


@pytest.mark.parametrize(("code", "outcome"), [("", "passed"), ("raise SystemExit(3)", "failed (3)")])
def test_outcomes(tmp_path: Path, code: str, outcome: str) -> None:
    assert gpu.run(gpu.Part("p", (sys.executable, "-c", code), 1.0), PATIENCE, tmp_path)[0] == outcome
