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
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu, kernels, layer_gpu, peers, tune
from benchmarks.common import timing
from benchmarks.common.results import DEVICE_LOST, Progress
from benchmarks.common.shapes import GPU_SHAPES, TARGETS, Shape
from benchmarks.common.tensors import difference
from benchmarks.launches.kernel_calls import PRODUCTS, Inputs, Kernel
from dynmoe_tutel.kernels.gpu import tiles

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


@pytest.mark.parametrize("gated", [False, True])
def test_contestants_of_the_layer_run_and_agree(gated: bool) -> None:
    """All contestants except Triton's run on a CPU; each result is in the table."""
    shape = Shape(TINY.T, TINY.D, TINY.H, TINY.E, TINY.k, gated)
    cpu = torch.device("cpu")
    *_, result = layer_gpu.measure(shape, torch.float32, cpu, 2)
    *_, result["peers"] = layer_gpu.measure_peers(tuple(peers.ADAPTERS), peers.PeerCase(shape, torch.float32, cpu), 2)
    names = set(result["milliseconds"])
    assert {"bare", "dense", "loop", "grouped_mm", "ours, exact", "ours, bounded", "ours, full"} <= names
    assert result["relative_rms_to_loop"] < 1e-5
    assert 0.9 < result["saved_over_bound"] < 3  # with so few tokens, scores and flags take more than 8 A
    assert result["skipped"] == {}
    assert set(result["peers"]) == {"ours", *peers.ADAPTERS}
    assert result["peers"]["ours"]["it_over_ours"] == 1
    rates = {"bytes_per_second": 1e12, "flops_per_second": 1e12}
    text = layer_gpu.table({"environment": {}, "bounds": rates, "results": [result], "failures": []})
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
        case = peers.PeerCase(TINY, torch.float32, torch.device("cpu"))
        *_, found = layer_gpu.measure_peers(("tutel",), case, 2)
        assert found["tutel"] == {"skipped": "ImportError: no compiled part"}
        assert "milliseconds" in found["ours"]

    def test_one_that_is_wrong_is_named_and_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is off by 3 %: the table has the reason in place of its time."""
        monkeypatch.setattr(peers, "unavailable", lambda *_: None)
        timed = []

        def build(name: str, case: peers.PeerCase) -> peers.Peer:
            right = peers.ours(case)
            factor = 1.03 if name == "tutel" else 1.0
            return peers.Peer(lambda x: right.forward(x) * factor, right.parameters, note=name)

        monkeypatch.setattr(peers, "build", build)
        step = peers.step
        monkeypatch.setattr(peers, "step", lambda peer, case: timed.append(peer.note) or step(peer, case))
        case = peers.PeerCase(TINY, torch.float32, torch.device("cpu"))
        *_, found = layer_gpu.measure_peers(("tutel", "scattermoe"), case, 2)
        assert found["tutel"] == {"skipped": "RuntimeError: its output differs from plain torch by 3.0e-02"}
        assert timed == ["", "scattermoe"]
        lines = layer_gpu.peer_rows({"shape": asdict(TINY), "dtype": "float32", "peers": found})
        assert "skipped: RuntimeError: its output differs" in lines[1]

    def test_every_peer_is_in_the_results(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ours is measured once, and again if there is a peer that tunes."""
        cpu, measured = torch.device("cpu"), []
        ours = peers.ours
        monkeypatch.setattr(peers, "ours", lambda case: measured.append("ours") or ours(case))
        quick = tuple(name for name in peers.ADAPTERS if name not in peers.TUNING)
        for reasons in ({}, {"moe-ops": None}):
            monkeypatch.setattr(
                peers, "unavailable", lambda name, _, reasons=reasons: reasons.get(name, "not installed")
            )
            monkeypatch.setattr(peers, "build", lambda _, case: ours(case))
            progress = Progress(None, {}, layer_gpu.table)
            progress.results.append({"shape": asdict(TINY), "dtype": "float32", "peers": {}})
            for names in (quick, peers.TUNING):
                layer_gpu._measure_peers(progress, names, TINY, torch.float32, cpu, 1, float("inf"))
            found = progress.results[0]["peers"]
            assert set(found) == {"ours", *peers.ADAPTERS}
            skipped = {name for name, entry in found.items() if "skipped" in entry}
            assert skipped == peers.ADAPTERS.keys() - reasons.keys()
        assert measured == ["ours"] * 3

    def test_none_begins_without_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peers, "unavailable", lambda *_: None)
        case = peers.PeerCase(TINY, torch.float32, torch.device("cpu"))
        *_, found = layer_gpu.measure_peers(("tutel", "scattermoe"), case, 1, end=0.0)
        assert found["tutel"] == found["scattermoe"] == {"skipped": "no time was left"}
        assert "milliseconds" in found["ours"]


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        else:
            assert "mm" not in name
        return func(*args, **(kwargs or {}))


class TestLayer:
    def test_time_against_assignments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A made-up clock: 1 s plus 10 ms per assignment; the heavy token takes 1 % more than the mean around it."""
        rows: list[int] = []
        made = layer_gpu.Case

        def case(*args: Any) -> layer_gpu.Case:
            found = made(*args)
            rows.append(found.rows)
            return found

        monkeypatch.setattr(layer_gpu, "Case", case)
        later = iter([2.9, 3.03, 3.1])
        monkeypatch.setattr(layer_gpu, "seconds", lambda *_: [1 + 0.01 * rows[-1] if len(rows) < 6 else next(later)])
        fit = layer_gpu.affine(torch.float32, torch.device("cpu"), Shape(256, 16, 8, 8, 2), 1)
        assert fit["r2"] == pytest.approx(1)
        assert fit["nanoseconds_an_assignment"] == pytest.approx(1e7)
        assert fit["one_token_with_every_expert"] == pytest.approx(1.01)
        assert fit["the_same_again"] == pytest.approx(3.1 / 2.9)

    def test_determination_by_hand(self) -> None:
        """Times 1, 2, 4 at 0, 1, 2: slope 1.5, residuals 1/6, -1/3, 1/6, R2 = 1 - (1/6) / (14/3)."""
        r2, slope = layer_gpu.determination([0, 1, 2], [1, 2, 4])
        assert slope == pytest.approx(1.5)
        assert r2 == pytest.approx(1 - (1 / 6) / (14 / 3))

    def test_flops_by_hand(self) -> None:
        """20 rows of 3 by 5: two products of 2 * 20 * 15, three if gated, all times three with the backward."""
        assert Shape(10, 3, 5, 4, 2).flops(backward=False) == 1200
        assert Shape(10, 3, 5, 4, 2).flops(backward=True) == 3600
        assert Shape(10, 3, 5, 4, 2, gated=True).flops(backward=True) == 5400

    @pytest.mark.parametrize("gated", [False, True])
    def test_bare_and_dense_multiply_as_much_as_the_layer(self, gated: bool) -> None:
        """Counted by torch; the layer's loop also has the gate's products."""
        shape = Shape(64, 16, 24, 4, 2, gated)
        case = layer_gpu.Case(shape, torch.float32, torch.device("cpu"))
        flops = replace(shape, k=case.rows / shape.T).flops(backward=True)
        for run in (case.bare(), case.dense()):
            with Products() as counter:
                run()
            assert counter.flops == flops

    def test_saved_by_hand(self) -> None:
        """All that the CPU's backward keeps (x, h, the index and more), over x, h and 8 A."""
        shape = Shape(512, 64, 256, 4, 2)
        case = layer_gpu.Case(shape, torch.float32, torch.device("cpu"))
        bound = 4 * 512 * 64 + 4 * case.rows * 256 + 8 * case.rows
        # scores, bits, flags, norms; offsets; the routing vectors' tensors that the loss keeps
        more = 512 * (4 * 4 + 8 + 1 + 4) + 4 * (512 + 1 + 4 + 1)
        assert 1 + more / bound <= case.saved_share() < 1 + (more + 8192) / bound

    def test_the_result_grows_and_a_contestant_that_fails_is_named(self) -> None:
        def bad() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def contestants(case: layer_gpu.Case) -> Iterator[tuple[str, Any, bool]]:
            yield "bare", case.bare(), True
            yield "ours, exact", bad, False
            yield "loop", case.bare(), False
            yield "bare", case.bare(), True

        failed = []

        def fail(name: str, error: Exception) -> None:
            failed.append((name, str(error)))

        steps = [
            (set(result["milliseconds"]), set(result["skipped"]))
            for result in layer_gpu.measure(TINY, torch.float32, torch.device("cpu"), 3, fail, [contestants])
        ]
        oom = {"ours, exact"}
        both = {"bare", "loop"}
        assert steps == [(set(), set()), ({"bare"}, set()), ({"bare"}, oom), (both, oom), (both, oom)]
        assert failed == [("ours, exact", "CUDA out of memory")]

    def test_a_later_step_adds_to_the_result(self) -> None:
        cpu, progress = torch.device("cpu"), Progress(None, {}, layer_gpu.table)
        for group in layer_gpu.GROUPS:
            layer_gpu._measure_shape(progress, "tiny", [group], TINY, torch.float32, cpu, 1)
        (result,) = progress.results
        names = ["bare", "ours, bounded, graph", "ours, exact", "grouped_mm"]
        assert list(result["milliseconds"])[:4] == names
        later = {"ours, bounded", "ours, full", "ours, full, graph", "loop", "dense"}
        assert set(result["milliseconds"]) == {*names, *later}
        assert result["milliseconds"].keys() == result["bare_over"].keys() == result["seconds"].keys()
        assert progress.summary["failures"] == []

    def test_a_layer_drawn_on_its_device_is_a_layer(self) -> None:
        """Active experts, orthonormal routing vectors, thresholds at 0; experts neither zero nor equal."""
        layer = layer_gpu.Case(TINY, torch.bfloat16, torch.device("cpu"))._unused
        assert layer.num_global_experts == TINY.E
        assert layer.experts.batched_fc1_w.shape == (TINY.E, TINY.H, TINY.D)
        assert float(layer.experts.batched_fc1_w.detach().float().std()) == pytest.approx(TINY.D**-0.5, rel=0.1)
        w_DE = layer.gates[0].sim_matrix.float()
        assert torch.allclose(w_DE.t() @ w_DE, torch.eye(TINY.E), atol=0.02)
        assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in layer.parameters())

    def test_a_run_in_order_of_weight(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Shapes with targets, the fit, other shapes, peers; a failing step fails the run but does not end it."""
        order: list[str] = []

        def bad(*_: object) -> dict[str, Any]:
            order.append("affine")
            raise RuntimeError("no graph")

        def measure(shape: Shape, *_: object) -> Iterator[dict[str, Any]]:
            order.append(str(shape))
            yield from ()

        monkeypatch.setattr(layer_gpu, "bounds", lambda *_: {"bytes_per_second": 1.0, "flops_per_second": 1.0})
        monkeypatch.setattr(layer_gpu, "affine", bad)
        monkeypatch.setattr(layer_gpu, "_measure_shape", lambda _, step, *__: order.append(step))
        monkeypatch.setattr(layer_gpu, "_measure_peers", lambda _, names, *__: order.append(",".join(names)))
        out = tmp_path / "x.json"
        assert layer_gpu.run(torch.device("cpu"), ["float32"], 60, 1, out) == 1
        shapes = [f"{name}, float32" for name in (*TARGETS, *GPU_SHAPES) if name in GPU_SHAPES]
        shapes = list(dict.fromkeys(shapes))
        assert order[:4] == shapes[:4]
        assert order[4] == "affine"
        assert order[5:9] == [f"{shape}, further" for shape in shapes[:4]]
        assert order[9:15] == shapes[4:]
        assert order[15:25] == ["scattermoe,sonicmoe,megablocks,tutel"] * 10
        assert order[25:] == ["moe-ops,liger-kernel"] * 10
        (failure,) = json.loads(out.read_text())["failures"]
        assert (failure["where"], failure["why"]) == ("affine", "RuntimeError: no graph")


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


def test_entries_of_other_shapes_stay_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with --out to a folder that does not exist yet, then again."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "new" / "folder" / "x.json"
    for key in ("up/1", "linear/2"):
        entry = {key: asdict(tiles.GemmConfig(16, 16, 16, 1, 1))}
        monkeypatch.setattr(tune, "tune", lambda *_, entry=entry: entry.items())
        assert tune.main(["--interpreter", "--out", str(out)]) == 0
    assert set(tune.read_table(out)) == {"up/1", "linear/2"}


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
