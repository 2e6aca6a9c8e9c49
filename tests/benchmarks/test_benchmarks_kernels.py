"""The GPU benchmarks of kernels and layer, as far as a machine without a GPU can run them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PATIENCE

from benchmarks import gpu, kernels, layer_gpu, tune
from benchmarks.common import timing
from benchmarks.common.results import DEVICE_LOST, Progress
from benchmarks.common.shapes import GPU_SHAPES, TARGETS, Shape
from benchmarks.common.tensors import difference
from benchmarks.launches.kernel_calls import PRODUCTS, Inputs, Kernel

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(40, 16, 24, 4, 1.5)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_every_kernel_is_checked_and_listed_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert len({r["kernel"] for r in results}) == len(results) == 16 + len(PRODUCTS)
    assert all(r["difference"] < 1e-5 for r in results)
    assert all(r["bytes"] > 0 and r["bound_microseconds"] > 0 for r in results)
    _check_models({r["kernel"]: r for r in results})
    assert out.with_suffix(".md").read_text().count("\n| T 40") == 16 + len(PRODUCTS)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def _check_models(found: dict[str, dict[str, Any]]) -> None:
    """Bytes and FLOPs at T 40, D 32, H 48, E 4 in fp32, counted by hand from each kernel's reads and writes."""
    tokens, weight, router = 4 * 40 * 32, 4 * 4 * 32 * 48, 4 * 40 * 4  # 5120, 24576, 640
    A = (found["dispatch"]["bytes"] - tokens) // (4 * 32 + 4)
    assert 30 < A < 90  # mean k 1.5
    rows_D, rows_H = 4 * A * 32, 4 * A * 48
    product = 2 * A * 32 * 48
    expected = {
        # x, w, scores; per token a word of bits, a flag and a norm
        "gate": (tokens + 4 * 32 * 4 + router + 8 * 40 + 40 + 4 * 40, 2 * 40 * 32 * 4),
        "gate with a budget": (tokens + 4 * 32 * 4 + router + 8 * 40 + 40 + 4 * 40, 2 * 40 * 32 * 4),
        "index (bounded)": (8 * 40 + 4 * (2 * A + 40 + 4), 0),
        "dispatch": (tokens + rows_D + 4 * A, 0),
        "up": (tokens + weight + 2 * rows_H, product),  # writes the pre-activation and the activation
        "down": (rows_H + weight + rows_D, product),
        "combine": (rows_D + tokens + 4 * A, 0),
        "combine backward": (tokens + rows_D + 4 * A, 0),
        "activation gradient": (tokens + weight + 3 * rows_H, product),  # reads h, writes its gradient and a
        "weight gradient, first": (tokens + rows_H + weight, product),
        "weight gradient, second": (rows_H + tokens + weight, product),
        "rows of the tokens' gradient": (rows_H + weight + rows_D, product),
        "routing vectors' gradient": (tokens + router + 4 * 32 * 4, 2 * 40 * 32 * 4),
    }
    for name in PRODUCTS:
        assert found[f"{name}: grouped_mm"]["flops"] == product
    for name, numbers in expected.items():
        assert (found[name]["bytes"], found[name]["flops"]) == numbers, name
    # rows, x, dy (for the bias), dx, scores, the gradients of scores and cosines, parts of the gate's gradient
    rest = found["token gradient"]["bytes"] - (rows_D + 3 * tokens + 3 * router)
    assert rest % (4 * A) == 0
    assert rest > 0


class TestJudgement:
    def test_a_bound_is_the_longer_of_two_times(self) -> None:
        """At 1 KB/us and 2 MFLOP/us: 8 us of bytes, 5 of FLOPs; the kernel takes 10."""
        rates = {"bytes_per_second": 1e9, "flops_per_second": 2e12}
        kernel = Kernel("k", lambda: None, 8000, 10_000_000)
        found = kernels.judged(kernel, [9e-6, 10e-6, 11e-6], rates)
        assert found["microseconds"]["median"] == pytest.approx(10)
        assert found["bound_microseconds"] == pytest.approx(8)
        assert found["bound_by"] == "bytes"
        assert found["share_of_bound"] == pytest.approx(0.8)
        found = kernels.judged(Kernel("k", lambda: None, 8000, 40_000_000), [40e-6], rates)
        assert (found["bound_by"], found["share_of_bound"]) == ("flops", pytest.approx(0.5))

    def test_what_is_not_finite_differs_wherever_it_is(self) -> None:
        """A NaN in the second output: the maximum of a number and NaN may be the number."""
        good, bad = torch.ones(4), torch.tensor([1.0, float("nan"), 1.0, 1.0])
        assert difference((good, good), (good, good)) == 0
        assert difference((good, bad), (good, good)) == float("inf")
        assert difference((bad, good), (good, good)) == float("inf")
        assert difference(good[:3], good) == float("inf")
        assert difference(good[:0], good.new_empty(0, 5)) == 0  # an empty output
        assert difference(good.new_full((4,), 1.1), good) == pytest.approx(0.1)
        assert difference(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25

    @pytest.mark.parametrize("name", GPU_SHAPES)
    def test_sets_of_tokens_do_not_fit_in_a_cache(self, name: str) -> None:
        """Together they take 1.1 times the H200's 60 MB of L2, unless eight sets are less."""
        shape = GPU_SHAPES[name]
        sets, tokens = kernels.sets_of_inputs(shape, torch.bfloat16), 2 * shape.T * shape.D
        assert 1 <= sets <= 8
        assert sets * tokens > 1.1 * 60e6 or sets == 8
        if shape.T * shape.D >= 8 << 20:  # the gate has a target here
            assert sets * tokens > 120e6


class TestLoads:
    @pytest.mark.parametrize("skewed", [False, True])
    def test_one_expert_has_half_of_the_rows_or_an_equal_share(self, skewed: bool) -> None:
        shape = Shape(4096, 32, 8, 8, 1.5)
        loads = Inputs(shape, torch.float32, torch.device("cpu"), 0, skewed).index[0].diff() / shape.rows
        expected = torch.tensor([0.5] + [0.5 / 7] * 7 if skewed else [1 / 8] * 8)
        assert torch.allclose(loads, expected, atol=0.002)

    def test_only_products_are_timed_with_skewed_loads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def kernels_of(inputs: Inputs) -> Iterator[Kernel]:
            yield from (Kernel(name, lambda: None, 1, 1) for name in ("gate", *PRODUCTS, "combine"))

        monkeypatch.setattr(kernels, "kernels_of", kernels_of)
        monkeypatch.setattr(kernels, "grouped_mm_of", lambda inputs: [Kernel("up: grouped_mm", lambda: None, 1, 1)])
        rates = {"bytes_per_second": 1.0, "flops_per_second": 1.0}
        found = kernels.measure(TINY, torch.float32, torch.device("cpu"), rates, 1, True)
        names = [*(f"{name}, skewed" for name in PRODUCTS), "up: grouped_mm, skewed"]
        assert [result["kernel"] for result in found] == names

    def test_skewed_loads_follow_the_shapes_with_targets(self) -> None:
        steps = list(kernels.steps_of(dict(reversed(GPU_SHAPES.items()))))
        assert steps[:4] == list(TARGETS)
        assert steps[4:8] == [f"{name}, skewed" for name in TARGETS]
        assert sorted(steps[8:]) == sorted(GPU_SHAPES.keys() - set(TARGETS))


def _fake_results(shape: Shape, *_: object) -> Iterator[dict[str, Any]]:
    """Two kernels, of which one differs."""
    base = {"shape": asdict(shape), "dtype": "float32", "bytes": 1, "flops": 1, "difference": None}
    timed = {"microseconds": timing.spread([1.0]), "bound_microseconds": 1.0, "bound_by": "bytes"}
    yield base | {"kernel": "bad", "failed": RuntimeError("differs by 1")}
    yield base | timed | {"kernel": "good", "share_of_bound": 1.0}


class TestRuns:
    """Runs with made-up kernels, without the plot, which takes a second."""

    @pytest.fixture(autouse=True)
    def _unplotted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "roofline", lambda *_: None)

    def progress(self, out: Path | None, resume: bool = False) -> Progress:
        rates = {"bytes_per_second": 1e12, "flops_per_second": 1e12, "dtype": "float32"}
        return Progress(out, {"environment": {"gpu": "X"}, "bounds": rates}, kernels.table, resume)

    def run(self, progress: Progress, *names: str) -> int:
        shapes = {name: replace(TINY, T=40 + i) for i, name in enumerate(names)}
        return kernels.run(progress, shapes, torch.float32, torch.device("cpu"), 60, 1)

    def test_a_kernel_that_differs_ends_nothing_and_fails_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernels, "measure", _fake_results)
        out = tmp_path / "x.json"
        assert self.run(self.progress(out), "a", "b") == 1
        found = json.loads(out.read_text())
        assert [r["kernel"] for r in found["results"]] == ["bad", "good"] * 2
        assert [f["where"] for f in found["failures"]] == ["a: bad", "b: bad"]
        assert found["finished"] == ["a", "b"]
        text = out.with_suffix(".md").read_text()
        assert "| bad | failed: RuntimeError: differs by 1 |" in text
        assert "| good | 1.0 | 1.0 to 1.0 | 1.0 | bytes | **1.00** |" in text

    def test_every_kernel_is_on_disk_before_the_next(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out, seen = tmp_path / "x.json", []

        def measure(*args: Any) -> Iterator[dict[str, Any]]:
            for result in _fake_results(*args):
                yield result
                seen.append(len(json.loads(out.read_text())["results"]))
            raise KeyboardInterrupt

        monkeypatch.setattr(kernels, "measure", measure)
        with pytest.raises(KeyboardInterrupt):
            self.run(self.progress(out), "a")
        assert seen == [1, 2]

    def test_a_lost_device_is_left_for_a_fresh_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The fresh process goes on with the next shape."""
        out = tmp_path / "x.json"
        monkeypatch.setattr(kernels, "measure", _fake_results)
        monkeypatch.setattr(kernels, "usable", lambda _: False)
        assert self.run(self.progress(out), "a", "b") == DEVICE_LOST == gpu.DEVICE_LOST
        assert len(json.loads(out.read_text())["results"]) == 1
        monkeypatch.setattr(kernels, "usable", lambda _: True)
        assert self.run(self.progress(out, resume=True), "a", "b") == 1
        found = json.loads(out.read_text())
        assert [(r["shape"]["T"], r["kernel"]) for r in found["results"]] == [(40, "bad"), (41, "bad"), (41, "good")]

    def test_a_plot_that_fails_ends_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def roofline(*_: object) -> None:
            raise OSError("no fonts")

        monkeypatch.setattr(kernels, "measure", lambda shape, *_: list(_fake_results(shape))[1:])
        monkeypatch.setattr(kernels, "roofline", roofline)
        assert self.run(self.progress(tmp_path / "x.json"), "a", "b") == 1
        found = json.loads((tmp_path / "x.json").read_text())
        assert len(found["results"]) == 2
        assert [(f["where"], f["why"]) for f in found["failures"]] == [("plot", "OSError: no fonts")]

    def test_inputs_that_cannot_be_made_are_named(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def measure(*_: object) -> Iterator[dict[str, Any]]:
            raise torch.OutOfMemoryError("CUDA out of memory")
            yield

        monkeypatch.setattr(kernels, "measure", measure)
        assert self.run(self.progress(None), "a") == 1
        assert "FAILED a: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_without_the_interpreter_it_says_so() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert "without a GPU" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
    assert "Traceback" not in done.stderr


def test_spread_and_environment() -> None:
    assert timing.spread([1.0, 2.0, 3.0])["median"] == 2.0
    assert timing.spread([5.0]) == {"median": 5.0, "quartile_1": 5.0, "quartile_3": 5.0}
    found = timing.environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert "gpu" not in found


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if anything is measured; pretend that Triton's interpreter runs."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("measured before the options were checked")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module, names in ((kernels, ("bounds", "measure")), (tune, ("tune",))):
        for name in names:
            monkeypatch.setattr(module, name, fail)


def refused(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one-line error that refuses the options."""
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
        for main in [kernels.main] if option == "--device" else [kernels.main, tune.main]:
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


def test_time_that_is_up_before_the_first_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It writes no empty table and reports no success."""
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
    monkeypatch.setattr(kernels, "measure", lambda *_: list(_fake_results(TINY))[1:])
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
