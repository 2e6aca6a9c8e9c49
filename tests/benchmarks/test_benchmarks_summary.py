"""The ten lines on a run on a GPU, by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernels, summary
from benchmarks.common.shapes import GPU_SHAPES, TARGETS
from benchmarks.common.timing import spread

ENVIRONMENT = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3"}
RATES = {"bytes_per_second": 4.3e12, "flops_per_second": 7.9e14}


def layer_of(name: str, **milliseconds: float) -> dict[str, Any]:
    times = {"bare": 0.4, "ours, bounded, graph": 0.8, "ours, exact": 1.0, **milliseconds}
    return {
        "shape": asdict(GPU_SHAPES[name]),
        "milliseconds": {contestant: spread([ms]) for contestant, ms in times.items()},
        "bare_over": {contestant: 0.4 / ms for contestant, ms in times.items()},
        "skipped": {"grouped_mm": "RuntimeError: not this type"} if "grouped_mm" not in times else {},
    }


def kernel_of(name: str, shape: str, us: float, share: float = 0.5) -> dict[str, Any]:
    shapes = {"shape": asdict(GPU_SHAPES[shape]), "kernel": name}
    return {**shapes, "microseconds": spread([us]), "share_of_bound": share}


def write(folder: Path) -> None:
    """All files: two shapes of the layer, two products."""
    smoke = {
        "environment": ENVIRONMENT,
        "results": [{"shape": {}, "checks": [("decisions off", 0, 0), ("y off", 0.004, 0.02), ("unequal", 0, 0)]}],
        "failures": [],
    }
    layer = {
        "environment": ENVIRONMENT,
        "bounds": RATES,
        "compiled": ["up_kernel"],
        "results": [layer_of("vit-s", grouped_mm=1.6), layer_of("bert-l")],
    }
    measured = [
        kernel_of("up", "vit-s", 100, 0.6),
        kernel_of("up", "bert-l", 100, 0.4),
        kernel_of("up: grouped_mm", "vit-s", 70),
        kernel_of("up: grouped_mm", "bert-l", 120),
        kernel_of("up, skewed", "vit-s", 180),
        kernel_of("weight gradient, first", "vit-s", 200, 0.3),
        kernel_of("weight gradient, first", "decode", 1, 0.01),  # no shape with a target
        {"kernel": "down", "shape": asdict(GPU_SHAPES["vit-s"]), "failed": "differs"},
    ]
    kernels_ = {"environment": ENVIRONMENT, "bounds": RATES, "results": measured}
    for name, found in (("smoke", smoke), ("layer", layer), ("kernels", kernels_)):
        (folder / f"{name}-gpu.json").write_text(json.dumps(found))
    closing = "== 2 failed, 7 passed in 81.20s (0:01:21) =="
    (folder / "tests-gpu.txt").write_text(f"[gw0] PASSED x\n=== FAILURES ===\n{closing}\n")


def test_by_hand(tmp_path: Path) -> None:
    write(tmp_path)
    assert summary.lines(tmp_path, {"smoke": "passed", "tests": "failed (1)"}) == [
        "NVIDIA H200, torch 2.11.0, Triton 3.6.0, Python 3.12.3, copy 4.30 TB/s, product 790 TFLOP/s",
        "smoke: 3 checks, worst difference 4.0e-03, none failed",
        "vit-s: bare 0.400 ms, graph 0.800 (0.50), exact 1.000 (0.40), grouped_mm 1.600 (0.25)",
        "vit-b: not measured",
        "bert-l: bare 0.400 ms, graph 0.800 (0.50), exact 1.000 (0.40), "
        "1 FAILED: grouped_mm: RuntimeError: not this type",
        "llm-4k: not measured",
        "share of bound, worst: up 0.40 (bert-l), dW first 0.30 (vit-s)",
        "grouped_mm / ours, time: up 0.70 (vit-s)",
        "skewed / equal loads, time: up 1.80 (vit-s)",
        "tests: 2 failed, 7 passed in 81.20s (0:01:21); compiled late: layer 1, kernels 0; "
        "smoke passed; tests failed (1)",
    ]


@pytest.mark.parametrize("missing", [("smoke",), ("layer",), ("kernels",), ("smoke", "layer", "kernels")])
def test_ten_lines_whatever_is_there(missing: tuple[str, ...], tmp_path: Path) -> None:
    write(tmp_path)
    for name in missing:
        (tmp_path / f"{name}-gpu.json").write_text("{")
    (tmp_path / "tests-gpu.txt").unlink()
    lines = summary.lines(tmp_path)
    assert len(lines) == 10 == 6 + len(TARGETS)
    assert all("\n" not in line and len(line) < 400 for line in lines)
    assert lines[-1].startswith("tests: no closing line")


def test_a_failed_check_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    smoke = json.loads((tmp_path / "smoke-gpu.json").read_text())
    smoke["failures"] = [{"where": "vit-s: gradient of x off", "why": "0.3, allowed 0.02"}] * 2
    (tmp_path / "smoke-gpu.json").write_text(json.dumps(smoke))
    assert summary.lines(tmp_path)[1].endswith("2 FAILED: vit-s: gradient of x off: 0.3, allowed 0.02")


def test_the_products_are_those_of_the_benchmark() -> None:
    assert tuple(summary.PRODUCTS) == kernels.PRODUCTS


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no results\n")
    assert summary.main([]) == summary.main([str(tmp_path / "x")]) == 2
