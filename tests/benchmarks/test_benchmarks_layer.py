"""The command line of the layer's benchmark: options are checked before anything is measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import layer, layer_gpu
from benchmarks.common.shapes import Shape
from benchmarks.launches import operations

TINY = Shape(48, 16, 24, 4, 1.5)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("measured before the options were checked")

    monkeypatch.setattr(layer, "Case", fail)
    monkeypatch.setattr(layer_gpu, "run", fail)
    monkeypatch.setattr(torch, "set_num_threads", fail)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one-line error that refuses the options."""
    with pytest.raises(SystemExit, match=r"^2$"):
        layer.main(argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    *usage, line = captured.err.splitlines()
    assert all(text.startswith(("usage: ", " ")) for text in usage)
    return line


@pytest.mark.usefixtures("unmeasured")
class TestOptions:
    @pytest.mark.parametrize(
        ("option", "value", "allowed"),
        [
            ("--shape", "9", "whole number from 0 to 3"),
            ("--shape", "-1", "whole number from 0 to 3"),
            ("--shape", "vit-s", "whole number from 0 to 3"),
            ("--repeats", "0", "whole number of 1 or more"),
            ("--repeats", "-5", "whole number of 1 or more"),
            ("--threads", "0", f"whole number from 1 to {os.cpu_count()}"),
            ("--threads", "1000000", f"whole number from 1 to {os.cpu_count()}"),
            ("--seconds", "-1", "seconds above 0"),
            ("--device", "banana", "choose from"),
            ("--dtype", "int8", "choose from"),
        ],
    )
    def test_a_bad_value_is_named_with_what_is_allowed(
        self, option: str, value: str, allowed: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = refused(capsys, option, value)
        assert f"argument {option}: " in line
        assert repr(value) in line
        assert allowed in line

    @pytest.mark.parametrize(
        "argv",
        ["--device cuda --shape 1", "--device cuda --threads 1", "--device cuda --peers", "--seconds 5", "--resume"],
    )
    def test_an_option_of_the_other_device_is_not_passed_over(
        self, argv: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "allowed: with --device" in refused(capsys, *argv.split())

    def test_peers_in_another_dtype(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = refused(capsys, "--peers", "--dtype", "float32", "bfloat16")
        assert "argument --dtype: came ['float32', 'bfloat16'] with --peers, allowed: float32" in line

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_cuda_without_a_gpu(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = refused(capsys, "--device", "cuda")
        assert "argument --device: came 'cuda': no GPU: torch" in line
        assert "allowed here: cpu" in line

    @pytest.mark.parametrize("name", ["taken/x.json", "folder"])
    def test_an_output_that_cannot_be_written(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "taken").write_text("a file, not a folder")
        (tmp_path / "folder").mkdir()
        assert f"argument --out: came '{tmp_path / name}', not writable" in refused(
            capsys, "--out", str(tmp_path / name)
        )

    def test_results_that_the_table_would_overwrite(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """On a GPU the benchmark writes a table beside the results."""
        monkeypatch.setattr(layer, "unable", lambda *_, **__: None)
        out = str(tmp_path / "x.md")
        assert "a file beside it has this name" in refused(capsys, "--device", "cuda", "--out", out)


def test_on_a_gpu_the_options_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(layer, "unable", lambda *_, **__: None)
    monkeypatch.setattr(layer_gpu, "run", lambda *arguments: seen.append(arguments[1:]) or 1)
    assert layer.main(["--device", "cuda", "--seconds", "5"]) == 1
    layer.main(["--device", "cuda", "--dtype", "float32", "bfloat16", "--repeats", "2"])
    layer.main(["--device", "cuda", "--resume"])
    assert seen == [
        (["bfloat16"], 5.0, 15, None, False),
        (["float32", "bfloat16"], float("inf"), 2, None, False),
        (["bfloat16"], float("inf"), 15, None, True),
    ]


def test_one_repeat_is_its_own_spread_in_a_folder_that_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the file, on a tiny shape."""
    monkeypatch.setattr(layer, "SHAPES", (TINY, replace(TINY, T=32)))
    out = tmp_path / "a" / "b" / "x.json"
    assert layer.main(["--dtype", "float32", "--shape", "1", "--repeats", "1", "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert [r["pass"] for r in results] == ["forward", "forward+backward"]
    for result in results:
        assert result["shape"]["T"] == 32
        ours = result["ours_over_bare"]
        assert ours["quartile_1"] == ours["median"] == ours["quartile_3"] > 0


@pytest.mark.parametrize("gated", [False, True])
def test_operations_are_recorded_for_the_types_that_the_layer_calls_them_with(gated: bool) -> None:
    """Otherwise other kernels compile ahead than launch: dtypes, shapes and None must match for every argument."""
    shape = Shape(64, 32, 48, 4, 2, gated)
    case = layer_gpu.Case(shape, torch.bfloat16, torch.device("cpu"))
    with Calls() as called:
        case.step(case.make(2.5, "auto"))()
    listed = {}

    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                listed.setdefault(name, []).append(described(args))
                return (torch.empty(0),) * 3

            return call

    recorded = operations.Operations(replace(shape, k=2.5), torch.bfloat16, operations.VARIANTS["default"])
    for name in ("threshold_gate", "ragged_index", "top_any_ffn"):
        getattr(recorded, name)(Recorder())
    for name in ("threshold_gate", "ragged_index", "bound_assignments", "top_any_ffn"):
        assert called.found[name] in [args[: len(called.found[name])] for args in listed[name]], name


def described(args: Sequence[Any]) -> list[Any]:
    """A tensor's dtype and shape, those of each in a group or list, None for None, otherwise the value's type."""

    def of(a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return a.dtype, tuple(a.shape)
        if isinstance(a, (list, tuple)):
            return described(a)
        return None if a is None else type(a)

    return [of(a) for a in args]


class Calls(TorchDispatchMode):
    """Records calls of the package's operations, with the last arguments of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dynmoe_tutel":
            self.found[func.overloadpacket.__name__] = described(args)
        return func(*args, **(kwargs or {}))
