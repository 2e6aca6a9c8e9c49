"""The benchmarks of kernels and of the layer on a GPU, as far as a machine without one can run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynmoe_tutel.kernels import configs

from benchmarks import layer_gpu, peers, timing
from benchmarks.shapes import Shape

ROOT = Path(__file__).resolve().parents[1]
TINY = Shape(40, 16, 24, 4, 1.5)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_every_kernel_is_checked_and_listed_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert len({r["kernel"] for r in results}) == len(results) == 15
    checked = [r for r in results if r["difference"] is not None]
    assert {r["kernel"] for r in results} - {r["kernel"] for r in checked} == {"token gradient"}
    assert all(r["difference"] < 1e-5 for r in checked)
    assert all(r["bytes"] > 0 and r["bound_microseconds"] > 0 for r in results)
    assert out.with_suffix(".md").read_text().count("\n| T 40") == 15
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_without_the_interpreter_it_says_so() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "no GPU" in done.stdout


@pytest.mark.parametrize("gated", [False, True])
def test_contestants_of_the_layer_run_and_agree(gated: bool) -> None:
    """All of them but Triton's own, on a CPU; each result is in the table."""
    shape = Shape(TINY.T, TINY.D, TINY.H, TINY.E, TINY.k, gated)
    result = layer_gpu.measure(shape, torch.float32, torch.device("cpu"), 2)
    names = set(result["milliseconds"])
    assert {"bare", "dense", "loop", "grouped_mm", "ours, exact", "ours, bounded", "ours, full"} <= names
    assert result["relative_rms_to_loop"] < 1e-5
    assert 0.9 < result["saved_over_bound"] < 3  # for so few tokens the scores and flags weigh more than 8 A
    assert result["skipped"] == {}
    assert set(result["peers"]) == {"ours", *peers.ADAPTERS}
    assert result["peers"]["ours"]["it_over_ours"] == 1
    text = layer_gpu.table([result])
    assert all(f"| {name}" in text for name in peers.ADAPTERS)
    assert all(name in text for name in names)


class TestPeers:
    @pytest.mark.parametrize("name", peers.ADAPTERS)
    def test_one_that_is_not_installed_is_named(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peers, "find_spec", lambda _: None)
        case = peers.PeerCase(TINY, torch.float32, torch.device("cpu"))
        assert peers.unavailable(name, case) == "not installed"

    @pytest.mark.parametrize("gated", [False, True])
    def test_ours_on_their_routing(self, gated: bool) -> None:
        shape = Shape(TINY.T, TINY.D, TINY.H, TINY.E, 3, gated)
        case = peers.PeerCase(shape, torch.float32, torch.device("cpu"))
        assert case.index_TK.shape == (40, 3)
        assert all(len(set(row)) == 3 for row in case.index_TK.tolist())
        ours = peers.ours(case)
        assert peers.checked(ours, case) < 1e-6
        grads = peers.step(ours, case)()
        assert [g.shape for g in grads] == [t.shape for t in (case.x_TD, *ours.parameters)]

    def test_a_wrong_output_is_not_timed(self) -> None:
        case = peers.PeerCase(TINY, torch.float32, torch.device("cpu"))
        ours = peers.ours(case)
        wrong = peers.Peer(lambda x: ours.forward(x) * 1.001, ours.parameters)
        with pytest.raises(RuntimeError, match="differs from plain torch"):
            peers.checked(wrong, case)

    def test_what_a_peer_throws_is_its_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def build(name: str, case: peers.PeerCase) -> peers.Peer:
            raise ImportError("no compiled part")

        monkeypatch.setattr(peers, "unavailable", lambda *_: None)
        monkeypatch.setattr(peers, "build", build)
        found = layer_gpu.measure_peers(TINY, torch.float32, torch.device("cpu"), 2)
        assert found["tutel"] == {"skipped": "ImportError: no compiled part"}
        assert "milliseconds" in found["ours"]


def test_time_against_assignments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up clock that is affine in the rows is fitted with R2 = 1."""
    made_up = iter([1.0 + k for k in (0.5, 1, 2, 3, 4)] + [3.0, 3.03])
    monkeypatch.setattr(layer_gpu, "seconds", lambda *_: [next(made_up)])
    fit = layer_gpu.affine(torch.float32, torch.device("cpu"), Shape(4096, 16, 8, 8, 2), 1)
    assert fit["r2"] > 0.99
    assert fit["one_token_with_every_expert"] == pytest.approx(1.01)


def test_spread_and_environment() -> None:
    assert timing.spread([1.0, 2.0, 3.0])["median"] == 2.0
    assert timing.spread([5.0]) == {"median": 5.0, "quartile_1": 5.0, "quartile_3": 5.0}
    found = timing.environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert "gpu" not in found


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_tuner_writes_what_the_configurations_read(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.tune", "--interpreter", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(out.read_text())["configs"]
    kinds = {key.split("/")[0] for key in table}
    assert kinds == {"up", "linear", "activation_gradient", "weight_gradient"}
    for key, values in table.items():
        config = configs.GemmConfig(**values)
        assert config.block_m >= 16, key


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_tuned_without_a_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.tune"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "no GPU" in done.stdout
