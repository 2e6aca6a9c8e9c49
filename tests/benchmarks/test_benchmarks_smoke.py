"""The first check on a GPU finds what is wrong; here with the torch engine in the place of Triton's kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import PATIENCE

from benchmarks import smoke
from benchmarks.common import lost_device
from benchmarks.common.results import DEVICE_LOST, Progress
from benchmarks.common.shapes import Shape
from benchmarks.layer_case import Case

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHAPE, GATED = Shape(60, 32, 48, 4, 1.5), Shape(60, 32, 48, 4, 1.5, gated=True)


def run(progress: Progress, repeats: int = 2) -> int:
    return smoke.run(progress, {"plain": SHAPE, "gated": GATED}, torch.float32, CPU, repeats, "torch")


def test_right_steps_pass(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(None, {}, smoke.table)
    assert run(progress) == 0
    plain, gated = ({name: found for name, found, _ in r["checks"]} for r in progress.results)
    assert "gradient of experts.batched_fc2_bias off" in plain
    assert "gradient of experts.W_fc3 off" in gated
    assert {"decisions off", "y off", "l_aux off", "gradient of x off", "gradient of gates.0.gates off"} <= plain.keys()
    assert plain["unequal in 2 repeats: none"] == 0
    assert "T 60, D 32, H 48, E 4, k 1.5, GLU: " in capsys.readouterr().out


def wrong_at(monkeypatch: pytest.MonkeyPatch, call: int, change: Any) -> None:
    """Let `change` change what the step of this number returns; ours is the first, the torch engine's the second."""
    original, calls = smoke.step, []

    def step(case: Case, layer: Any) -> dict[str, torch.Tensor]:
        calls.append(layer)
        found = original(case, layer)
        if len(calls) == call:
            change(found)
        return found

    monkeypatch.setattr(smoke, "step", step)


def failures(progress: Progress) -> list[str]:
    return [f"{f['where']}: {f['why']}" for f in progress.summary["failures"]]


def test_a_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_at(monkeypatch, 2, lambda found: found["gradient of x"].mul_(1.01))
    progress = Progress(None, {}, smoke.table)
    assert run(progress) == 1
    assert failures(progress) == ["plain: gradient of x off: 0.0099, allowed 0.0001"]


def test_a_step_of_other_bits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_at(monkeypatch, 4, lambda found: found["y"][0, 0].add_(1e-6))
    progress = Progress(None, {}, smoke.table)
    assert run(progress) == 1
    assert failures(progress) == ["plain: unequal in 2 repeats: y: 1, allowed 0"]


def test_decisions_against_float64() -> None:
    """A gate that lets two more tokens pass is off by two; one within the margin is right."""
    case = Case(SHAPE, torch.float32, CPU)
    assert smoke.wrong_decisions(case) == 0
    route = case.layer.route

    def other(x: torch.Tensor) -> Any:
        routing = route(x)
        routing.bits[:2] ^= 1
        return routing

    case.layer.route = other
    assert smoke.wrong_decisions(case) == 2


def test_a_shape_that_raises_ends_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = smoke.Case

    def case(shape: Shape, *args: Any) -> Case:
        if not shape.gated:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(shape, *args)

    monkeypatch.setattr(smoke, "Case", case)
    progress = Progress(tmp_path / "x.json", {}, smoke.table, page=False)
    assert run(progress) == 1
    assert failures(progress) == ["plain: OutOfMemoryError: CUDA out of memory"]
    assert [len(r["checks"]) > 5 for r in json.loads((tmp_path / "x.json").read_text())["results"]] == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    monkeypatch.setattr(smoke, "usable", lambda _: False)
    assert run(Progress(None, {}, smoke.table)) == DEVICE_LOST


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_in_the_interpreter(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.smoke", "--repeats", "1", "--out", str(tmp_path / "x.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unequal in 1 repeats: none" in done.stdout


class Failed:
    failed, longreprtext = True, "E   illegal access"


class TestLostDevice:
    """The pytest plugin of the tests on a GPU."""

    def report(self, worker: bool) -> Any:
        """Drive the hook with a report of a failure."""
        config = SimpleNamespace(workerinput={}) if worker else SimpleNamespace()
        item = SimpleNamespace(nodeid="test_x.py::test_y", config=config)
        hook: Iterator[None] = lost_device.pytest_runtest_makereport(item, None)
        next(hook)
        with pytest.raises(StopIteration) as stopped:
            hook.send(Failed)  # type: ignore[attr-defined]
        return stopped.value.value

    @pytest.mark.parametrize(
        ("worker", "usable", "ends"), [(True, False, True), (True, True, False), (False, False, False)]
    )
    def test_it_ends_a_worker_whose_gpu_is_lost(
        self, worker: bool, usable: bool, ends: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        ended: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(lost_device, "usable", lambda _: usable)
        monkeypatch.setattr(lost_device.os, "_exit", ended.append)
        assert self.report(worker) is Failed
        assert ended == ([DEVICE_LOST] if ends else [])
