"""The table of targets, against hand-computed numbers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import targets
from benchmarks.common.shapes import GPU_SHAPES, Shape

ROOT = Path(__file__).resolve().parents[2]


def kernel(name: str, shape: Shape, us: float, share: float) -> dict[str, Any]:
    return {
        "kernel": name,
        "dtype": "bfloat16",
        "shape": asdict(shape),
        "microseconds": {"median": us},
        "share_of_bound": share,
    }


def layer(name: str, over: float, saved: float) -> dict[str, Any]:
    return {
        "dtype": "bfloat16",
        "shape": asdict(GPU_SHAPES[name]),
        "bare_over": {targets.OURS: over},
        "milliseconds": {name: {} for name in (targets.OURS, "ours, full, graph")},
        "saved_over_bound": saved,
    }


@pytest.fixture
def summaries() -> tuple[dict[str, Any], dict[str, Any]]:
    kernels = [
        kernel("gate", GPU_SHAPES["vit-s"], 5, 0.95),
        kernel("gate", GPU_SHAPES["bert-l"], 5, 0.85),
        kernel("gate", GPU_SHAPES["bert-l-glue"], 5, 0.3),  # T D below 8M does not count
        kernel("index (bounded)", GPU_SHAPES["vit-s"], 7, 0.1),
        kernel("index (bounded)", GPU_SHAPES["llm-4k"], 13, 0.1),
        kernel("index (bounded)", Shape(40000, 8, 8, 8, 2), 99, 0.1),  # T above 32k does not
    ]
    layers = [
        layer("vit-s", 0.76, 1.0),
        layer("vit-b", 0.83, 1.02),
        layer("bert-l", 0.75, 1.01),
        layer("llm-4k", 0.69, 1.0),
    ]
    fit = {"r2": 0.9991, "one_token_with_every_expert": 1.002}
    environment = {"gpu": "NVIDIA H200"}
    return (
        {"environment": environment, "results": kernels},
        {"environment": environment, "results": layers, "affine": fit},
    )


def test_each_is_held_against_the_worst_of_its_shapes(summaries: Any) -> None:
    found = targets.targets(*summaries)
    assert [(t.value, t.of, t.met) for t in found] == [
        (0.76, "vit-s", "stretch"),
        (0.75, "bert-l", "must"),
        (0.69, "llm-4k", "no"),
        (0.85, "bert-l", "must"),
        (13, "llm-4k", "no"),
        (1.02, "vit-b", "must"),
        (0.9991, "vit-s", "must"),
        (1.002, "vit-s", "must"),
        (0.0, "steps captured as CUDA graphs", "must"),
    ]
    lines = targets.table(found, "NVIDIA H200").splitlines()
    assert lines[0] == "| target (NVIDIA H200, bf16, forward+backward) | must | stretch | measured | met |"
    assert lines[2] == "| bare / ours, ViT-S (384/1536, E 8) | 0.62 | 0.75 | 0.760 (vit-s) | stretch |"
    assert lines[6] == "| index build at T <= 32k, E <= 64 | 12 us | 8 us | 13 us (llm-4k) | no |"
    assert lines[8] == "| time affine in the assignments, R2 | 0.99 |  | 0.999 (vit-s) | must |"


def test_what_is_not_measured_is_said_so_and_met_by_nothing(summaries: Any) -> None:
    """A missing shape, a skipped contestant, a failed kernel, a missing file."""
    kernels, layers = summaries
    del layers["results"][1], layers["affine"]
    layers["results"][0]["bare_over"] = {}
    kernels["results"][1] = {**kernels["results"][1], "failed": "differs"}
    found = targets.targets(kernels, layers)
    assert [t.value for t in found] == [None, None, 0.69, None, 13, None, None, None, None]
    assert {t.met for t in found if t.value is None} == {""}
    assert "| not measured yet |  |" in targets.table(found)
    assert all(t.value is None for t in targets.targets(None, None))


def test_other_types_do_not_count(summaries: Any) -> None:
    for summary in summaries:
        for result in summary["results"]:
            result["dtype"] = "float32"
    assert [t.value for t in targets.targets(*summaries)][:6] == [None] * 6


def test_the_page_of_performance_has_these_lines() -> None:
    """A measured table can be copied over that of docs/performance.md."""
    page = (ROOT / "docs" / "performance.md").read_text()
    for target in targets.targets(None, None):
        assert f"| {target.name} | {target.bounds} |" in page


def test_report_of_files(tmp_path: Path, summaries: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """One file is complete, the other truncated."""
    (tmp_path / "layer.json").write_text(json.dumps(summaries[1]))
    (tmp_path / "kernels.json").write_text("{")
    out = tmp_path / "targets.md"
    assert targets.main([str(tmp_path / "kernels.json"), str(tmp_path / "layer.json"), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text == out.read_text()
    assert "NVIDIA H200" in text
    assert text.count(targets.NOT_MEASURED) == 2
