"""Real engines on two processes: the stage of ZeRO and the division of experts change no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_jobs import BF16, COPIED, WITHOUT, batches, config_of, difference, engine_of, launch, model_of, train, whole

pytestmark = WITHOUT
SCHEDULE = {"schedule": 2}
CLIP = {"gradient_clipping": 0.05}  # by SGD: Adam would hide the scale
ROUNDED = 0.01  # the steps of bf16 at 1
GROUPED = {"gradient_accumulation_steps": 2}

# name: (stage, options of the config, options of the model)
NATIVE: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "native": (0, {}, {}),
    "native zero 1": (1, {}, {}),
    "native zero 2": (2, {}, {}),
    "native zero 3": (3, {}, {}),
    "native clipped": (0, CLIP, {}),
    "native clipped zero 1": (1, CLIP, {}),
    "native clipped zero 2": (2, CLIP, {}),
    "native accumulated": (0, GROUPED, {}),
    "native accumulated zero 2": (2, GROUPED, {}),
    "native recomputed": (0, {}, {"recompute": False}),
    "native recomputed zero 2": (2, {}, {"recompute": True}),
}
DIVIDED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    f"ep {ep_size}{' residual' if residual else ''}{how} zero {stage}": (
        stage,
        options,
        {"ep_size": ep_size, "residual": residual},
    )
    for ep_size in (1, 2)
    for residual, how, options in ((False, "", {}), (True, "", {}), (False, " clipped", CLIP), (True, " acc.", GROUPED))
    for stage in (0, 1, 2)
}
HALVED = {
    f"bf16 {ep_size or 'native'} zero {stage}{' fp32 gradients' if copied else ''}": (
        stage,
        {**(COPIED if copied else BF16), **CLIP},
        {"ep_size": ep_size},
    )
    for ep_size in (None, 1, 2)
    for stage, copied in ((0, False), (1, False), (2, False), (1, True))
}
ALL = {**NATIVE, **DIVIDED, **HALVED}


def trained(rank: int, names: list[str]) -> dict[str, Any]:
    """By configuration: losses, weights, events, and the mask, W and G of this rank."""
    found = {}
    for name in names:
        stage, options, of_model = ALL[name]
        model, config = model_of(**of_model), config_of(stage, SCHEDULE, **options)
        engine = engine_of(model, config, *((torch.optim.SGD, 0.5) if "gradient_clipping" in options else ()))
        losses = train(engine, batches(rank, 8 if "gradient_accumulation_steps" in options else 4))
        events = [(event.step, event.slot, event.action) for event in engine.events]
        found[name] = {"losses": losses, "weights": whole(engine.module), "events": events}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(trained, tmp_path_factory.mktemp("matrix"), 2, list(ALL))


def alike(results: list[dict[str, Any]], names: list[str], limit: float) -> None:
    first = results[0][names[0]]
    for name in names[1:]:
        found = results[0][name]
        assert found["events"] == first["events"], name
        assert difference(found["weights"], first["weights"]) < limit, name


def test_all_ranks_agree(results: list[dict[str, Any]]) -> None:
    """On masks, routing vectors and thresholds after updates, and on every other parameter that all hold."""
    for name in ALL:
        first, second = (result[name] for result in results)
        assert first["events"] == second["events"], name
        assert first["events"], f"{name}: nothing grew, so nothing was tested"
        assert difference(first["weights"], second["weights"]) == 0, name


@pytest.mark.parametrize("how", ["", " clipped", " accumulated", " recomputed"])
def test_the_stage_changes_no_weight(results: list[dict[str, Any]], how: str) -> None:
    names = [name for name in NATIVE if name.removesuffix(f" zero {NATIVE[name][0]}") == f"native{how}"]
    alike(results, ["native", *names] if how == " recomputed" else names, 1e-6)


@pytest.mark.parametrize("how", ["", " residual", " clipped", " residual acc."])
def test_neither_the_stage_nor_the_division_changes_a_weight(results: list[dict[str, Any]], how: str) -> None:
    names = [f"ep {ep_size}{how} zero {stage}" for ep_size in (1, 2) for stage in (0, 1, 2)]
    alike(results, names, 1e-6)


@pytest.mark.parametrize("ep_size", [None, 1, 2])
def test_bf16_differs_little(results: list[dict[str, Any]], ep_size: int | None) -> None:
    """And ZeRO 0 clips by a norm without the experts' gradients: DeepSpeed's."""
    reference = results[0]["bf16 native zero 1" if ep_size is None else "bf16 1 zero 1"]
    names = [name for name in HALVED if name.startswith(f"bf16 {ep_size or 'native'} ")]
    assert len(names) == 4
    for name in names:
        found = results[0][name]
        assert found["events"] == reference["events"]
        assert difference(found["weights"], reference["weights"]) < ROUNDED, name


FOUR = [(stage, ep_size) for stage in (0, 2) for ep_size in (1, 2, 4)]


def on_four(rank: int) -> dict[str, Any]:
    found = {}
    for stage, ep_size in FOUR:
        engine = engine_of(model_of(ep_size=ep_size, residual=True), config_of(stage, {"schedule": 2}, **CLIP))
        train(engine, batches(rank, 4))
        events = [(event.step, event.slot, event.action) for event in engine.events]
        found[f"{stage} {ep_size}"] = {"weights": whole(engine.module), "events": events}
    return found


@pytest.mark.slow
def test_four_processes_agree(tmp_path: Path) -> None:
    results = launch(on_four, tmp_path, 4)
    first = results[0]["0 1"]
    assert first["events"]
    for result in results:
        for name, found in result.items():
            assert found["events"] == first["events"], name
            assert difference(found["weights"], first["weights"]) < 1e-6, name
