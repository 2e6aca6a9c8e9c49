"""Peers of `benchmarks.layer --peers`: they compute the layer's function, or are not timed and the table says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import layer, layer_peers
from benchmarks.common.shapes import Shape
from benchmarks.peers import LayerPeer, transformers, tutel
from dynmoe_tutel import tutel_stand_in

TINY = Shape(48, 16, 24, 4, 1.5)
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@pytest.fixture
def case() -> layer.Case:
    return layer.Case(TINY, torch.float32, biases=False)


@pytest.fixture
def some_tutel() -> Iterator[None]:
    """Tutel where it is installed, else the stand-in, whose custom gates take logits as Tutel's do."""
    if tutel_stand_in.tutel_is_importable():
        yield
        return
    tutel_stand_in.install()
    yield
    tutel_stand_in.remove()


def agrees(case: layer.Case, peer: LayerPeer) -> dict[str, float]:
    """What was compared with ours."""
    return layer_peers.checked(case, peer, layer_peers.outcome(case, layer_peers.ours(case)))


def test_the_case_has_tokens_without_an_expert_and_different_k(case: layer.Case) -> None:
    assert len(case.routing.k_per_token.unique()) >= 3
    assert case.routing.k_per_token.min() == 0


@needs_transformers
@pytest.mark.parametrize("kind", transformers.KINDS)
def test_experts_of_transformers(kind: str, case: layer.Case) -> None:
    compared = list(agrees(case, transformers.build(case, kind)))
    assert compared == ["output", "tokens", "vectors", "thresholds", "up", "down"]


@needs_transformers
def test_sentinels_are_not_multiplied_and_padding_is(case: layer.Case) -> None:
    k_T = case.routing.k_per_token
    for kind, rows in (("grouped_mm", k_T.sum()), ("grouped_mm, padded", TINY.T * k_T.max())):
        with Rows() as seen, torch.no_grad():
            transformers.build(case, kind).forward()
        assert seen.rows == [int(rows)] * 2


def test_tutels_layer_pads_and_its_softmax_is_the_mean(case: layer.Case, some_tutel: None) -> None:
    """Its router's gradient is that of the other semantics, and is not compared."""
    assert list(agrees(case, tutel.build_layer(case))) == ["output", "up", "down"]


def test_a_peer_that_differs_is_named_and_not_timed(case: layer.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(change: Callable[[Tensor], Tensor]) -> tuple[str, layer_peers.Build]:
        def build(case: layer.Case) -> LayerPeer:
            peer = layer_peers.loop(case)
            return LayerPeer(lambda: change(peer.forward()), peer.up, peer.down)

        return "torch", build

    def broken(case: layer.Case) -> LayerPeer:
        raise ImportError("too old")

    peers = {
        "loop": layer_peers.PEERS["loop"],
        "wrong output": off(lambda y: y * 1.001),
        "wrong gradient": off(lambda y: y + (y - y.detach()) * 0.001),
        "broken": ("torch", broken),
        "absent": ("no_such_package", broken),
    }
    monkeypatch.setattr(layer_peers, "PEERS", peers)
    for result in layer_peers.measure(case, 2):
        found = result["peers"]
        assert found["loop"]["over_ours"]["median"] > 0
        assert {name: entry["skipped"] for name, entry in found.items() if name != "loop"} == {
            "wrong output": "RuntimeError: its output differs from ours by 1.0e-03",
            "wrong gradient": "RuntimeError: its gradient of the tokens differs from ours by 1.0e-03",
            "broken": "ImportError: too old",
            "absent": "not installed",
        }
    table = layer_peers.table([result])
    assert "Not timed: absent: not installed." in table
    assert "Not timed: wrong output: RuntimeError" in table


def test_a_loop_that_differs_ends_the_run(case: layer.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then ours may be the one that is wrong."""
    forward = layer.Case.loop_forward
    monkeypatch.setattr(layer.Case, "loop_forward", lambda self: forward(self) * 1.001)
    with pytest.raises(RuntimeError, match="its output differs from ours"):
        layer_peers.measure(case, 1)


def test_from_the_command_line_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layer, "SHAPES", (TINY,))
    out = tmp_path / "x.json"
    assert layer.main(["--peers", "--repeats", "1", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["environment"]["transformers"] == (version("transformers") if find_spec("transformers") else None)
    results = written["results"]
    assert [r["pass"] for r in results] == ["forward", "forward+backward"]
    for result in results:
        assert result["peers"].keys() == layer_peers.PEERS.keys()
        assert result["ours"]["milliseconds"]["median"] > 0
        for entry in result["peers"].values():
            assert ("skipped" in entry) != ("over_ours" in entry)
    printed = capsys.readouterr().out
    assert all(name in printed for name in layer_peers.PEERS)


class Rows(TorchDispatchMode):
    """Records the rows that each grouped product multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grouped_mm" in str(func):
            self.rows.append(int(next(a for a in args if a is not None and a.dtype == torch.int32)[-1]))
        return func(*args, **(kwargs or {}))
