"""The tuner of tiles, in Triton's interpreter or with made-up times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PATIENCE

from benchmarks import tune
from benchmarks.common.shapes import Shape
from benchmarks.launches.kernel_calls import Inputs
from dynmoe_tutel.kernels.gpu import tiles

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(40, 16, 24, 4, 1.5)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_tuner_writes_what_the_configurations_read(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.tune", "--interpreter", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(out.read_text())["configs"]
    kinds = {key.split("/")[0] for key in table}
    assert kinds == {"up", "linear", "activation_gradient", "weight_gradient"}
    for key, values in table.items():
        config = tiles.GemmConfig(**values)
        assert config.block_m >= 16, key


class TestTuner:
    RULE = tiles.GemmConfig(128, 128, 64, 8, 3, programs=2, pieces=8, max_registers=128)

    def test_the_rule_comes_first_then_near_tiles_of_its_stages(self) -> None:
        found = tune.candidates(self.RULE)
        assert found[0] == self.RULE
        assert len(set(found)) == len(found) > 50
        few = found[:12]
        assert {c.num_stages for c in few} == {3}
        assert {(c.block_m, c.block_n) for c in few} >= {(128, 256), (256, 128), (64, 128), (128, 64)}

    def test_registers_allow_the_programs(self) -> None:
        """64 Ki a multiprocessor."""
        for config in tune.candidates(self.RULE):
            threads = 32 * config.num_warps * config.programs
            assert (config.max_registers or 65536 // threads) * threads <= 65536, config

    def test_a_candidate_is_what_is_launched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the host functions remember of earlier calls."""
        from triton.runtime.interpreter import GridExecutor

        launched: list[dict[str, Any]] = []
        monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: launched.append(kwargs))
        run, key = tune.products(Inputs(TINY, torch.float32, torch.device("cpu"), 0))["up"]
        for size in (16, 32, 16):
            with tune.chosen(key, tiles.GemmConfig(size, 2 * size, size, 4, 2)):
                run()
            assert (launched[-1]["BLOCK_M"], launched[-1]["BLOCK_N"]) == (size, 2 * size)
        run()
        assert launched[-1]["BLOCK_N"] == tiles.default_gemm("up", "interpreter", torch.float32, 15, 16, 24).block_n

    def test_what_is_known_is_written_and_a_product_that_fails_ends_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        out, seen = tmp_path / "x.json", []

        def best(run: Any, key: str, start: tiles.GemmConfig, *_: object) -> tuple[tiles.GemmConfig, float, float]:
            seen.append(len(tune.read_table(out)) if out.exists() else 0)
            if len(seen) == 2:
                raise RuntimeError("no tile fits")
            return start, 1.0, 1.0

        monkeypatch.setattr(tune, "best", best)
        monkeypatch.setattr(tune, "products", lambda _: {k: (None, f"{k}/float32/rows16/K1/N1") for k in tune.PRODUCTS})
        assert tune.main(["--interpreter", "--out", str(out)]) == 0
        assert seen == [0, 1, 1, 2, 3]
        assert "RuntimeError: no tile fits" in capsys.readouterr().out

    def test_no_candidate_but_the_rules_begins_without_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        timed = []
        monkeypatch.setattr(tune, "seconds", lambda *_: timed.append(1) or [1.0])
        assert tune.best(lambda: None, "k", self.RULE, torch.device("cpu"), 1, None, 0.0)[0] == self.RULE
        assert timed == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_tuned_without_a_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.tune"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_entries_of_other_shapes_stay_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with --out to a folder that does not exist yet, then again."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "new" / "folder" / "x.json"
    for key in ("up/1", "linear/2"):
        entry = {key: asdict(tiles.GemmConfig(16, 16, 16, 1, 1))}
        monkeypatch.setattr(tune, "tune", lambda *_, entry=entry: entry.items())
        assert tune.main(["--interpreter", "--out", str(out)]) == 0
    assert set(tune.read_table(out)) == {"up/1", "linear/2"}
