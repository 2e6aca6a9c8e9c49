"""`make gpu`: its link tree is the package, and where there is no GPU it says so; the runner of its parts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[1]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources alone, so that the link tree is built beside them and not in the checkout."""
    for name in ("dynmoe_tutel", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("Makefile", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-s", *arguments], cwd=directory, capture_output=True, text=True)


@needs_make
def test_the_link_tree_is_the_package_without_an_installation(copy: Path) -> None:
    """Modules of all four directories come from the tree, though another dynmoe_tutel may be installed."""
    assert make(copy, "build/gpu/dynmoe_tutel").returncode == 0
    tree = copy / "build" / "gpu"
    names = ("dynmoe_tutel", "dynmoe_tutel.kernels.configs", "dynmoe_tutel.gates", "benchmarks.shapes")
    code = f"from importlib import import_module\nfor n in {names!r}: print(import_module(n).__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(tree)) for line in done.stdout.splitlines()), done.stdout


@needs_make
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(copy: Path) -> None:
    done = make(copy, "gpu", f"PYTHON={sys.executable}", f"RESULTS={copy / 'out'}")
    assert done.returncode != 0
    assert "make gpu: no GPU: torch" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (copy / "out").exists()


@needs_make
def test_an_interpreter_without_torch_is_named(copy: Path) -> None:
    python = copy / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    done = make(copy, "gpu", "PYTHON=./python")
    assert done.returncode != 0
    assert "has no torch: name an interpreter" in done.stderr


def test_the_parts_fit_in_the_time(tmp_path: Path) -> None:
    found = gpu.parts(tmp_path, 460)
    assert [part.name for part in found] == ["tests", "kernels", "layer"]
    assert sum(part.share for part in found) == pytest.approx(1)
    for part in found[1:]:
        budget = float(part.command[part.command.index("--seconds") + 1])
        assert budget < part.share * 460


def test_a_part_that_overruns_is_ended_with_what_it_started(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    child = f"import subprocess, sys; print('begun', flush=True); subprocess.run([{sys.executable!r}, '-c', {WAIT!r}])"
    outcome = gpu.run(gpu.Part("p", (sys.executable, "-c", child), 1.0, "log.txt"), 1.5, tmp_path)
    assert outcome == "ended after 2 s"
    assert (tmp_path / "log.txt").read_text() == "begun\n"
    assert "begun" in capfd.readouterr().out


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
        """Where a file is in the way of the folder, and where a folder is in the way of a file."""
        monkeypatch.setattr(gpu, "missing", lambda: None)
        monkeypatch.setattr(gpu, "run", never)
        (tmp_path / "file").write_text("")
        (tmp_path / "layer-gpu.md").mkdir()
        for results, path in ((tmp_path / "file", "file/tests-gpu.txt"), (tmp_path, "layer-gpu.md")):
            with pytest.raises(SystemExit, match=r"^2$"):
                gpu.main(["--results", str(results)])
            line = capsys.readouterr().err.splitlines()[-1]
            assert f"argument --results: came '{tmp_path / path}', not writable" in line

    def test_results_in_folders_that_are_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "missing", lambda: None)
        ran = []

        def run(part: gpu.Part, limit: float, results: Path) -> str:
            assert list(results.iterdir()) == []
            ran.append(part.name)
            return "passed"

        monkeypatch.setattr(gpu, "run", run)
        assert gpu.main(["--results", str(tmp_path / "a" / "b"), "--seconds", "0.5"]) == 0
        assert ran == ["tests", "kernels", "layer"]

    def test_a_short_time_leaves_each_part_some(self, tmp_path: Path) -> None:
        for part in gpu.parts(tmp_path, 0.5)[1:]:
            assert float(part.command[part.command.index("--seconds") + 1]) > 0


WAIT = "import time; time.sleep(600)"


@pytest.mark.parametrize(("code", "outcome"), [("", "passed"), ("raise SystemExit(3)", "failed (3)")])
def test_outcomes(tmp_path: Path, code: str, outcome: str) -> None:
    assert gpu.run(gpu.Part("p", (sys.executable, "-c", code), 1.0), 30, tmp_path) == outcome
