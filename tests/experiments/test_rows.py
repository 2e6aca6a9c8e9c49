"""The rows: names, order, gates; and that a router of the field moves what it holds until a run has its target."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_job
import torch

from dynmoe_tutel.experiments.experiment import NoFolder
from dynmoe_tutel.experiments.language.task import LanguageConfig, LanguageTask
from dynmoe_tutel.experiments.report.reporters import Several
from dynmoe_tutel.experiments.rows import (
    HOLDING,
    ROWS,
    check_rows,
    check_targets,
    held,
    is_fixed,
    moe_options,
    row_order,
)
from dynmoe_tutel.experiments.runner import Run
from dynmoe_tutel.experiments.task import RunKey, Settings, Task
from dynmoe_tutel.experiments.vision.digits_task import DigitsTask, TrainConfig
from dynmoe_tutel.experiments.vision.task import VisionConfig, VisionTask

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROUTERS = ("relu-k1", "top-p-k1.5", "expert-threshold-k1.5", "null-experts-k1.5", "quantile-top-2")
CONFIG = replace(tiny_job.CONFIG, rows=ROUTERS, experts=4, steps=40, log_every=40)


def test_rows_have_names_an_order_and_options() -> None:
    check_rows(ROWS)
    assert row_order(["dynmoe", "top-1-of-16", "top-4-of-8", "dense"]) == (
        "dense", "top-4-of-8", "top-1-of-16", "dynmoe",
    )  # fmt: skip
    assert row_order({"dynmoe", "top-2", "top-1-of-8", "top-1", "dense"}) == (
        "dense", "top-1", "top-2", "top-1-of-8", "dynmoe",
    )  # fmt: skip
    assert moe_options("top-2", 4, 8)["num_experts"] == 4
    assert moe_options("top-4-of-16", 8, 16) == {
        "gate_type": {"type": "cosine_top", "k": 4, "fp32_gate": True},
        "num_experts": 16,
    }
    assert moe_options("dynmoe", 8, 16)["gate_type"]["max_expert_num"] == 16
    assert moe_options("dynmoe-k1.5", 8, 16)["gate_type"]["budget"] == {"target_k": 1.5}
    assert row_order(["dynmoe-k1.5", "dynmoe-k3", "dynmoe", "dense"]) == ("dense", "dynmoe", "dynmoe-k3", "dynmoe-k1.5")
    check_rows(("dense", "dynmoe-k2", "dynmoe-k1.5"))
    for bad, message in (
        ("top-9-of-8", "got 'top-9-of-8'"),
        ("top-2", "got 'top-2'"),
        ("best", "got 'best'"),
        ("dynmoe-k0", "got 'dynmoe-k0'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_rows(("dense", bad))
    with pytest.raises(ValueError, match="different ones"):
        check_rows(("dense", "dense"))


def test_routers_of_the_field_are_rows() -> None:
    check_rows(("relu-k2", "top-p-k1.5", "expert-threshold-k2", "null-experts-k1.25", "quantile-top-2-of-8"))
    assert [is_fixed(row) for row in ("top-2", "top-2-of-8", "quantile-top-2-of-8", "dense", "dynmoe")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert [held(row) for row in ("null-experts-k1.25", "dynmoe-k2", "dynmoe", "top-2-of-8", "best-k2")] == [
        ("null-experts", 1.25), ("dynmoe", 2.0), None, None, None,
    ]  # fmt: skip
    ordered = (
        "top-1-of-8", "dynmoe", "dynmoe-k2", "relu-k2", "relu-k1", "top-p-k2", "null-experts-k1", "quantile-top-1-of-8",
    )  # fmt: skip
    assert row_order(sorted(ordered)) == ordered
    for name in HOLDING:
        options = moe_options(f"{name}-k1.5", 8, 16)
        assert (options["num_experts"], options["gate_type"]["target_k"]) == (8, 1.5)
    assert moe_options("null-experts-k1.25", 8, 16)["gate_type"]["k"] == 3
    assert moe_options("quantile-top-2-of-16", 8, 16) == {
        "gate_type": {"type": "quantile_top_k", "k": 2, "fp32_gate": True},
        "num_experts": 16,
    }
    for bad in ("relu", "relu-k0", "quantile-top-9-of-8", "quantile-top-2", "threshold-k2"):
        with pytest.raises(ValueError, match=f"relu-kX.*got '{bad}'"):
            check_rows((bad,))


def test_a_relu_row_starts_above_its_target() -> None:
    """Half of the experts have a positive logit at start, and nothing brings back those that the loss took away."""
    check_targets(("relu-k1.9",), 4)
    with pytest.raises(ValueError, match=r"relu-k2 of 4 experts starts with about 2 a token.*X below 2"):
        check_targets(("relu-k2",), 4)


@pytest.mark.parametrize("settings", [TrainConfig, VisionConfig, LanguageConfig], ids=lambda each: each.__name__)
def test_rows_that_no_layer_can_hold_are_refused_before_anything_runs(settings: Callable[..., Settings]) -> None:
    for row in ("dynmoe-k8.5", "top-p-k99", "null-experts-k9"):
        with pytest.raises(ValueError, match=rf"rows: {row} of \d experts: give .*-kX with X at most"):
            settings(rows=("dense", row))
    with pytest.raises(ValueError, match=r"different ones.*dynmoe-k2\.0"):
        settings(rows=("dynmoe-k2", "dynmoe-k2.0"))


def test_train_takes_them() -> None:
    TrainConfig(rows=("relu-k1", "quantile-top-2", "dynmoe-k1.5"))
    with pytest.raises(ValueError, match=r"rows must be .*got dense, quantile-top-4"):
        TrainConfig(rows=("dense", "quantile-top-4"))


@pytest.mark.parametrize("task", [VisionTask, LanguageTask], ids=lambda task: task.experiment_name())
def test_rows_are_added_to_the_folders_of_the_results(task: type[Task]) -> None:
    """Their protocol is that of the settings as they are: `experiment.start` refuses another."""
    protocol = json.loads((RESULTS / task.experiment_name() / "config.json").read_text())["protocol"]
    settings = json.loads(json.dumps(task.settings_type().to_dict()))
    for name in ("threads", *task.axes, *task.movable):  # threads are those of the command that made the results
        settings.pop(name, None)
    assert {name: value for name, value in protocol.items() if name in settings} == settings


@pytest.mark.parametrize("row", ROUTERS)
def test_what_a_router_holds_moves_in_a_run(row: str) -> None:
    """Mean k of the last ten steps is the target. That of relu follows its loss slowly: its coefficient has moved."""
    run = Run(DigitsTask(CONFIG), RunKey(row, 0), NoFolder(), Several())
    assert run.controller is None
    for step in range(CONFIG.steps):
        if step == CONFIG.steps - 10:
            run.meter.reset()
        run.train_step()
        run.adapt()
    if row == "relu-k1":
        states = [layer.held_gates[0].coefficient for layer in run.meter.layers.values()]
        assert torch.equal(states[0], states[1])
        assert float(states[0]) != pytest.approx(0.1)
    else:
        k = statistics.fmean(layer["k"] for layer in run.meter.read().values())
        assert k == pytest.approx(2.0 if row == "quantile-top-2" else 1.5, rel=0.25)
