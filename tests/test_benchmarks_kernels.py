"""The benchmarks of kernels and of the layer on a GPU, as far as a machine without one can run them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from dynmoe_tutel.kernels import configs

from benchmarks import kernels, layer_gpu, peers, timing, tune
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
    assert "without a GPU" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
    assert "Traceback" not in done.stderr


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
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be measured fails the test; Triton's interpreter seems to run."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("measured before the options were checked")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module, names in ((kernels, ("bounds", "measure")), (tune, ("tune",))):
        for name in names:
            monkeypatch.setattr(module, name, fail)


def refused(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line in which the options are refused."""
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *usage, line = captured.err.splitlines()
    assert all(text.startswith(("usage: ", " ")) for text in usage)
    assert " error: " in line
    return line


@pytest.mark.usefixtures("unmeasured")
class TestOptions:
    @pytest.mark.parametrize(
        ("option", "value", "allowed"),
        [
            ("--repeats", "0", "whole number of 1 or more"),
            ("--repeats", "-5", "whole number of 1 or more"),
            ("--repeats", "1.5", "whole number of 1 or more"),
            ("--seconds", "-1", "seconds above 0"),
            ("--seconds", "0", "seconds above 0"),
            ("--seconds", "nan", "seconds above 0"),
            ("--device", "banana", "choose from"),
            ("--shape", "vit-xxl", "choose from"),
            ("--dtype", "int8", "choose from"),
        ],
    )
    def test_a_bad_value_is_named_with_what_is_allowed(
        self, option: str, value: str, allowed: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for main in [kernels.main] if option in ("--seconds", "--device") else [kernels.main, tune.main]:
            line = refused(main, capsys, option, value)
            assert f"argument {option}: " in line
            assert repr(value) in line
            assert allowed in line

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_cuda_without_a_gpu(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = refused(kernels.main, capsys, "--device", "cuda")
        assert "came 'cuda': no GPU: torch" in line
        assert "allowed here: cpu" in line

    @pytest.mark.parametrize("value", ["0", "", "banana"])
    def test_a_processor_without_the_interpreter(
        self, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert "allowed: TRITON_INTERPRET=1" in refused(kernels.main, capsys, "--device", "cpu")
        assert "allowed: TRITON_INTERPRET=1" in refused(tune.main, capsys, "--interpreter")

    def test_a_gpu_under_the_interpreter(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert "TRITON_INTERPRET is set" in refused(kernels.main, capsys, "--device", "cuda")
        assert "TRITON_INTERPRET is set" in refused(tune.main, capsys)

    def test_no_triton(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(timing, "find_spec", lambda _: None)
        assert "Triton is not installed" in refused(kernels.main, capsys, "--device", "cpu")
        assert "Triton is not installed" in refused(tune.main, capsys, "--interpreter")

    @pytest.mark.parametrize("name", ["", "taken/x.json", "folder", "x" * 300])
    @pytest.mark.parametrize("argv", [("kernels", "--device", "cpu"), ("tune", "--interpreter")])
    def test_an_output_that_cannot_be_written(
        self, argv: tuple[str, ...], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "taken").write_text("a file, not a folder")
        (tmp_path / "folder").mkdir()
        out = str(tmp_path / name) if name else ""
        line = refused({"kernels": kernels, "tune": tune}[argv[0]].main, capsys, *argv[1:], "--out", out)
        assert "argument --out: came " in line
        assert str(Path(out)) in line
        assert "allowed: " in line

    @pytest.mark.parametrize("suffix", [".md", ".png"])
    def test_results_that_the_table_or_the_plot_would_overwrite(
        self, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = str(tmp_path / f"x{suffix}")
        assert "a file beside it has this name" in refused(kernels.main, capsys, "--device", "cpu", "--out", out)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "[]", "3", '"configs"', "{}", '{"configs": [1]}', '{"configs": {"up": {"block_m": 1}}}'),
            '{"configs": {"up": {"block_m": "a", "block_n": 1, "block_k": 1, "num_warps": 1, "num_stages": 1}}}',
            "[" * 100000,
        ],
        ids=range(10),
    )
    def test_a_file_that_is_no_table_stays_as_it_is(
        self, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "x.json"
        out.write_text(text)
        line = refused(tune.main, capsys, "--interpreter", "--out", str(out))
        assert f"argument --out: came {str(out)!r}, which is no table of tiles" in line
        assert out.read_text() == text


def test_entries_of_other_shapes_stay_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under --out in a folder that is not there yet, then again."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "new" / "folder" / "x.json"
    for key in ("up/1", "linear/2"):
        entry = {key: asdict(configs.GemmConfig(16, 16, 16, 1, 1))}
        monkeypatch.setattr(tune, "tune", lambda *_, entry=entry: entry)
        assert tune.main(["--interpreter", "--out", str(out)]) == 0
    assert set(tune.read_table(out)) == {"up/1", "linear/2"}


def test_time_that_is_up_before_the_first_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No empty table, and no success."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (kernels, layer_gpu):
        monkeypatch.setattr(module, "bounds", lambda *_: {"bytes_per_second": 1.0, "flops_per_second": 1.0})
    out = tmp_path / "x.json"
    assert kernels.main(["--device", "cpu", "--seconds", "1e-9", "--out", str(out)]) == 1
    assert "nothing is measured: --seconds 1e-09" in capsys.readouterr().err
    assert layer_gpu.run(torch.device("cpu"), ["float32"], 1e-9, 1, out) == 1
    assert "nothing is measured: --seconds 1e-09" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_there_is_no_plot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "bounds", lambda *_: {"bytes_per_second": 1.0, "flops_per_second": 1.0})
    result = {"shape": asdict(TINY), "dtype": "float32", "kernel": "k", "bytes": 1, "flops": 1, "difference": None}
    result |= {"microseconds": timing.spread([1.0]), "bound_microseconds": 1.0, "bound_by": "bytes"}
    monkeypatch.setattr(kernels, "measure", lambda *_: [result | {"share_of_bound": 1.0}])
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    out = tmp_path / "a" / "b" / "x.json"
    assert kernels.main(["--device", "cpu", "--out", str(out)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert {path.name for path in out.parent.iterdir()} == {"x.json", "x.md"}


class TestOutputs:
    def test_folders_are_made_and_files_are_left_as_they_are(self, tmp_path: Path) -> None:
        old = tmp_path / "old.json"
        old.write_text("kept")
        link, target = tmp_path / "link.json", tmp_path / "elsewhere" / "new.json"
        link.symlink_to(target)
        timing.check_outputs(argparse.ArgumentParser(), "--out", [old, tmp_path / "a" / "b" / "new.json", link])
        assert old.read_text() == "kept"
        assert list((tmp_path / "a" / "b").iterdir()) == []
        assert link.is_symlink()
        assert list(target.parent.iterdir()) == []

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(SystemExit):
            timing.check_outputs(argparse.ArgumentParser(), "--out", [tmp_path / "pipe"])
        assert "no regular file" in capsys.readouterr().err

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_permission(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(SystemExit):
            timing.check_outputs(argparse.ArgumentParser(), "--out", [tmp_path / "x.json"])
        assert "Permission denied" in capsys.readouterr().err
