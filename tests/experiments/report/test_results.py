"""Table and plots: the tests recompute the numbers from the log and look at the pictures' pixels."""

from __future__ import annotations

import io
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_job
from matplotlib import image
from matplotlib.colors import to_rgb

from dynmoe_tutel.experiments.report import plots, table, tensorboard
from dynmoe_tutel.experiments.report.table import RowSummary, Spread, verdict
from dynmoe_tutel.experiments.run_folder import EVENTS, METRICS

SEEDS = (0, 1)
LAYERS = ("blocks.1.mlp", "blocks.3.mlp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(tiny_job.CONFIG, seeds=SEEDS, eval_every=12)
    return tiny_job.run_job(tmp_path_factory.mktemp("results") / "run", config)


def last_lines(folder: Path, row: str) -> list[dict[str, Any]]:
    lines = tiny_job.lines(folder, METRICS)
    return [
        [line for line in lines if (line["kind"], line["row"], line["seed"]) == ("eval", row, seed)][-1]
        for seed in SEEDS
    ]


def test_table_numbers_are_those_of_the_metrics(folder: Path) -> None:
    written = json.loads((folder / "table.json").read_text())
    assert [row["row"] for row in written["rows"]] == list(tiny_job.CONFIG.rows)
    for row in written["rows"]:
        last = last_lines(folder, row["row"])
        for key in ("in_accuracy", "out_accuracy"):
            values = [line[key] for line in last]
            assert row[key]["mean"] == pytest.approx(sum(values) / 2)
            assert row[key]["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        times = [
            statistics.median(
                line["step_ms"]
                for line in tiny_job.lines(folder, METRICS)
                if line["kind"] == "train" and (line["row"], line["seed"]) == (row["row"], seed)
            )
            for seed in SEEDS
        ]
        assert row["step_ms"]["mean"] == pytest.approx(sum(times) / 2)
        if row["row"] == "dense":
            assert row["mean_k"] is None
            assert row["experts_start"] == row["experts_end"] == []
            assert row["activated_parameters"] == row["total_parameters"]
        else:
            k = [sum(line["layers"][layer]["k"] for layer in LAYERS) / 2 for line in last]
            assert row["mean_k"]["mean"] == pytest.approx(sum(k) / 2)
            assert row["experts_start"] == [2, 2]
            ends = [sum(line["layers"][layer]["experts"] for line in last) / 2 for layer in LAYERS]
            assert row["experts_end"] == ends
            assert row["activated_parameters"] <= row["total_parameters"]
    assert written["rows"][1]["mean_k"]["mean"] == 2  # top-2


def test_activated_parameters_follow_from_mean_k(folder: Path) -> None:
    """An expert of the tiny model has 2*16*16 weights and 16+16 biases; DynMoE's gate 17 entries a slot."""
    expert = 2 * 16 * 16 + 32
    dense = last_lines(folder, "dense")[0]["total_parameters"]
    for line in last_lines(folder, "dynmoe"):
        layers = line["layers"].values()
        outside = dense - 2 * expert + sum(17 * layer["experts"] for layer in layers)
        assert line["activated_parameters"] == pytest.approx(outside + sum(layer["k"] for layer in layers) * expert)
        assert line["total_parameters"] == outside + sum(layer["experts"] for layer in layers) * expert


def test_markdown_table_has_the_cells_and_the_verdict(folder: Path) -> None:
    summaries = table.summarise(tiny_job.lines(folder, METRICS), tiny_job.CONFIG.rows, tiny_job.CONFIG.steps)
    text = (folder / "table.md").read_text()
    for row in summaries:
        assert f"| {' | '.join(row.cells())} |" in text
    assert verdict(summaries) in text
    console = tiny_job.quiet()
    console.print(*table.rich_tables(summaries, 12, "last", console.width))
    for row in summaries:
        assert all(cell in console.file.getvalue() for cell in row.cells())  # type: ignore[attr-defined]


def test_default_table_fits_a_terminal_of_80_columns() -> None:
    row = RowSummary(
        row="dynmoe",
        seeds=(0, 1, 2),
        in_accuracy=Spread(0.923, 0.014),
        out_accuracy=Spread(0.715, 0.096),
        mean_k=Spread(3.71, 0.1),
        experts_start=[4, 4],
        experts_end=[6.3, 6.7],
        activated_parameters=383e3,
        total_parameters=578e3,
        step_ms=Spread(143.1, 12.0),
        step_ratio=Spread(2.84, 0.1),
    )
    console = tiny_job.quiet()
    console.width = 80
    console.print(*table.rich_tables([row], 200, "last", 80))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    cells = dict(zip(table.HEADER, row.cells(), strict=True))
    assert cells.pop("ms a\nstep") == "143"  # for the files
    assert all(cell in text for cell in cells.values())
    assert "…" not in text


def test_unfinished_runs_are_in_no_table(folder: Path) -> None:
    lines = [
        line
        for line in tiny_job.lines(folder, METRICS)
        if (line["row"], line["seed"], line["step"]) not in (("dense", 1, 12), ("top-2", 0, 12), ("top-2", 1, 12))
    ]
    rows = table.summarise(lines, tiny_job.CONFIG.rows, 12)
    assert [(row.row, row.seeds) for row in rows] == [("dense", (0,)), ("dynmoe", (0, 1))]
    assert "do the runs that are missing" in verdict(rows)


@pytest.mark.parametrize(
    ("seeds", "selection", "expected"),
    [
        ([(0,), (3,)], "last", "One seed, after 80 steps"),
        ([(0, 1), (0, 1)], "last", "Mean over 2 seeds after 80 steps, ± standard deviation over the seeds"),
        ([(0, 1), (0,)], "validation", "Mean over the seeds at the best validation accuracy within 80 steps, ± "
         "standard deviation over the seeds"),
    ],
)  # fmt: skip
def test_title_says_what_the_numbers_are(seeds: list[tuple[int, ...]], selection: str, expected: str) -> None:
    rows = [replace(summary("dense", 0.8, None), seeds=each) for each in seeds]
    assert table.title(rows, 80, selection) == expected


def summary(row: str, out: float, deviation: float | None) -> RowSummary:
    return RowSummary(row, (0,), Spread(0.9, 0.1), Spread(out, deviation), None, [], [], 1.0, 1.0, Spread(1.0, None))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [("dense", 0.80, 0.01), ("dynmoe", 0.75, 0.02)],
            "dense with 80.0 ± 1.0 %, 5.0 points ahead of dynmoe: more than the spread over the seeds (2.0). "
            "DynMoE does not win here.",
        ),
        ([("dense", 0.80, 0.06), ("top-1", 0.79, 0.0), ("dynmoe", 0.75, 0.02)], "5.0 points ahead of dynmoe: within"),
        ([("dense", 0.80, 0.01), ("top-1", 0.79, 0.0), ("dynmoe", 0.83, 0.02)], "dynmoe with 83.0 ± 2.0 %, 3.0 points "
         "ahead of dense: more than"),
        ([("dense", 0.80, None), ("dynmoe", 0.83, None)], "ahead of dense; one seed says nothing"),
        ([("dense", 0.80, 0.01)], "Out of domain dense reaches 80.0 ± 1.0 %."),
    ],
)  # fmt: skip
def test_verdict_names_the_best_row_and_weighs_the_gap(rows: list[Any], expected: str) -> None:
    assert expected in verdict([summary(*row) for row in rows])


def pixels(content: bytes) -> np.ndarray:
    return image.imread(io.BytesIO(content), format="png")[..., :3]


def share(picture: np.ndarray, colour: str) -> float:
    """Share of pixels with this colour."""
    return float((np.abs(picture - np.array(to_rgb(colour))).max(-1) < 0.02).mean())


def test_all_plots_are_there_large_enough_to_read_and_not_empty(folder: Path) -> None:
    for name in ("accuracy", "experts", "k_histogram", "load", "trade_off"):
        picture = pixels((folder / f"{name}.png").read_bytes())
        assert picture.shape[0] >= 450, name
        assert picture.shape[1] >= 900, name
        assert 0.005 < float((picture.min(-1) < 0.9).mean()) < 0.95, name


def test_plots_show_their_data(folder: Path) -> None:
    """The picture has a curve, bar or mark exactly if the data have it."""
    metrics, events = tiny_job.lines(folder, METRICS), tiny_job.lines(folder, EVENTS)
    rows = tiny_job.CONFIG.rows
    both, one = pixels(plots.accuracy(metrics, rows)), pixels(plots.accuracy(metrics, rows[:1]))
    for position in range(3):
        assert share(both, plots.COLOURS[position]) > 5e-4
    assert share(one, plots.COLOURS[0]) > 5e-4
    assert share(one, plots.COLOURS[1]) < 1e-5
    assert events
    marked, unmarked = (pixels(plots.experts(metrics, some, "dynmoe", 4)) for some in (events, []))
    assert share(marked, "black") > share(unmarked, "black") + 1e-4
    bars = pixels((folder / "k_histogram.png").read_bytes())
    assert share(bars, plots.COLOURS[0]) > 0.02
    of_dynmoe, of_top_2 = pixels((folder / "load.png").read_bytes()), pixels(plots.load(metrics, "top-2"))
    assert not np.array_equal(of_dynmoe, of_top_2)


def test_life_of_a_layer_counts_births_and_deaths() -> None:
    layer = {"blocks.1.mlp": {"experts": 4}}
    metrics = [{"kind": "eval", "row": "dynmoe", "seed": 0, "step": step, "layers": layer} for step in (0, 100)]
    changes = [(0, 25, "pruned", 3), (0, 25, "grown", 4), (0, 50, "grown", 5), (1, 9, "grown", 5)]
    events = [
        {"row": "dynmoe", "layer": "blocks.1.mlp", "seed": seed, "step": step, "action": action, "experts": experts}
        for seed, step, action, experts in changes
    ]
    steps, alive, births, deaths = plots._life(metrics, events, "dynmoe", "blocks.1.mlp", 0)
    assert (steps, alive) == ([0, 25, 25, 50, 100], [4, 3, 4, 5, 5])
    assert births == [(25, 4), (50, 5)]
    assert deaths == [(25, 3)]


def test_plots_of_experts_need_experts(folder: Path) -> None:
    with pytest.raises(ValueError, match="'dense' has no MoE layer"):
        plots.load(tiny_job.lines(folder, METRICS), "dense")


def test_tensorboard_has_every_number_of_the_log(folder: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for row in ("dense", "dynmoe"):
        events = accumulator.EventAccumulator(
            str(tiny_job.run_folder(folder, f"{row}-seed0") / tensorboard.FOLDER / f"{row}-seed0")
        )
        events.Reload()
        lines = [line for line in tiny_job.lines(folder, METRICS) if (line["row"], line["seed"]) == (row, 0)]
        expected: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            for name, value in tensorboard.scalars(line):
                expected.setdefault(name, []).append((line["step"], value))
        assert set(events.Tags()["scalars"]) == set(expected)
        assert "train/loss" in expected
        for name, values in expected.items():
            written = [(event.step, event.value) for event in events.Scalars(name)]
            assert [step for step, _ in written] == [step for step, _ in values]
            assert [value for _, value in written] == pytest.approx([value for _, value in values], rel=1e-5)
