"""The benchmark of the layer on a GPU, as far as a machine without a GPU can run it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import layer_gpu, peers
from benchmarks.common.results import Progress
from benchmarks.common.shapes import GPU_SHAPES, TARGETS, Shape

TINY = Shape(40, 16, 24, 4, 1.5)


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
