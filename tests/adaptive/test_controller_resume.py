"""A resumed controller continues bitwise and refuses another controller's state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from controller_case import (
    D,
    Net,
    assert_same,
    near,
    train,
)
from torch import Tensor

from dynmoe_tutel.adaptive.controller import ExpertController

pytestmark = pytest.mark.usefixtures("seeded")


def _resumable_run(directory: Path, start: int = 0, save_at: tuple[int, ...] = ()) -> dict[str, Any]:
    """Run steps `start` to 38 on data whose clusters move; load an earlier run's save at `start`, save at `save_at`.

    A resumed run has other seeds than the first, so that everything it does not load differs.
    """
    torch.manual_seed(start)
    model = Net(experts=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = {"every": 5, "window": 4}
    controller = ExpertController(model, optimizer, schedule, init="fresh", patience=2, max_new_experts=2, seed=start)
    if start:
        saved = torch.load(directory / f"{start}.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        values = json.loads((directory / f"{start}.json").read_text())
        controller.load_state_dict({"tensors": saved["tensors"], "values": values})
    for step in range(start, 38):
        if step in save_at:
            state = controller.state_dict()
            (directory / f"{step}.json").write_text(json.dumps(state["values"]))
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**states, "tensors": state["tensors"]}, directory / f"{step}.pt")
        phase = step // 8
        train(model, optimizer, controller, near(phase % D, (phase + 3) % D, (2 * phase + 1) % D, each=8))
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "controller": controller.state_dict(),
        "events": controller.events,
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run")
    return directory, _resumable_run(directory, save_at=(11, 15, 18))


class TestResume:
    # 11: a window has just opened; 15: between an update and the next window; 18: in the middle of a window
    @pytest.mark.parametrize("save_at", [11, 15, 18])
    def test_twenty_steps_after_a_resume_are_bitwiseassert_same(
        self, uninterrupted: tuple[Path, dict[str, Any]], save_at: int
    ) -> None:
        directory, whole = uninterrupted
        resumed = _resumable_run(directory, start=save_at)
        late = {event.action for event in resumed["events"] if event.step > 18}
        assert late == {"grown", "pruned"}, "the resumed part must have something to get wrong"
        assert_same(whole, resumed)

    def test_state_is_a_copy_of_plain_values_and_tensors(self) -> None:
        model = Net()
        controller = ExpertController(model, None, 3, max_new_experts=2)
        train(model, None, controller, near(0, 1, 5))
        state = controller.state_dict()
        assert json.loads(json.dumps(state["values"])) == state["values"]
        assert all(type(value) is Tensor for value in state["tensors"].values())
        assert int(state["tensors"]["mlp.gates.0:tokens"]) == 12
        train(model, None, controller, near(0, 1, 5))
        assert int(state["tensors"]["mlp.gates.0:tokens"]) == 12
        assert state["values"]["step"] == 1
        assert state["values"]["window_open"] is True

    def test_safetensors_holds_the_tensors(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        model = Net()
        controller = ExpertController(model, None, 3, max_new_experts=2)
        train(model, None, controller, near(0, 1, 5))
        state = controller.state_dict()
        safetensors.save_file(state["tensors"], tmp_path / "controller.safetensors")
        assert_same(safetensors.load_file(tmp_path / "controller.safetensors"), state["tensors"])

    def test_a_loaded_schedule_change_drops_a_window_it_does_not_know(self) -> None:
        first = ExpertController(Net(), None, 4)
        state = first.state_dict()
        assert state["values"]["window_open"]
        model = Net()
        second = ExpertController(model, None, {"every": 4, "window": 1})
        second.load_state_dict(state)
        assert not model.mlp.record_routing
        train(model, None, second, near(0))
        assert not model.mlp.record_routing

    def test_an_update_whose_window_was_never_open_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        first = ExpertController(Net(), None, {"every": 4, "window": 1})
        model = Net()
        second = ExpertController(model, None, 4)
        second.load_state_dict(first.state_dict())
        assert [train(model, None, second, near(0)) for _ in range(4)] == [[]] * 4
        assert "step 4: no update, the loaded state had no open record window" in caplog.messages
        assert model.mlp.record_routing

    def test_a_state_that_does_not_fit_is_refused_by_name(self) -> None:
        model = Net()
        controller = ExpertController(model, None, 3)
        state = controller.state_dict()

        def changed(**values: Any) -> dict[str, Any]:
            return {"tensors": state["tensors"], "values": {**state["values"], **values}}

        def of_gate(**values: Any) -> dict[str, Any]:
            return changed(gates={"mlp.gates.0": {**state["values"]["gates"]["mlp.gates.0"], **values}})

        cases: list[tuple[Any, str]] = [
            (None, "'tensors' and 'values'"),
            ({"values": {}}, "'tensors' and 'values'"),
            ({"tensors": {}, "values": {"step": 1}}, "state lacks events, gates, version, window_open"),
            ({**state, "tensors": {}}, "state lacks the tensor generator"),
            (changed(version=99), "state has version 99, this package reads 1"),
            (changed(events=[{"step": 1}]), "state has events or a generator that cannot be read"),
            (
                {**state, "tensors": {**state["tensors"], "generator": torch.zeros(3, dtype=torch.uint8)}},
                "state has events or a generator that cannot be read",
            ),
            (changed(gates={"mlp.gates.0": {}}), "state of mlp.gates.0 lacks silent_windows or record"),
            (changed(gates={}), r"only the model has \['mlp.gates.0'\]"),
            (
                changed(gates={**state["values"]["gates"], "other.gates.0": {}}),
                r"only it has \['other.gates.0'\]",
            ),
            (
                {**state, "tensors": {**state["tensors"], "mlp.gates.0:unrouted_sum": torch.zeros(D + 1)}},
                r"mlp.gates.0: the record to load has unrouted_sum of shape \[9\], this layer \[8\]",
            ),
            (
                ExpertController(Net(slots=5), None, 3).state_dict(),
                "mlp.gates.0 has 5 slots in silent_windows, the layer has 6",
            ),
            ({"tensors": None, "values": None}, "'tensors' and 'values'"),
            (changed(step="3"), "state has step '3', must be an integer of at least 0"),
            (changed(step=-1), "state has step -1"),
            ({**state, "tensors": {**state["tensors"], "generator": 3}}, "a generator that cannot be read"),
            ({**state, "tensors": {**state["tensors"], "mlp.gates.0:counts": 3}}, "has no tensor 'counts'"),
            (of_gate(load=[1]), "mlp.gates.0 has 1 slots in load, the layer has 6"),
            (of_gate(silent_windows=["a"] * 6), "has silent_windows .* must be integers of at least 0"),
            (
                {**state, "tensors": {"generator": state["tensors"]["generator"]}},
                "state of mlp.gates.0 lacks counts of its record",
            ),
        ]
        before = controller.state_dict()
        for wrong, message in cases:
            with pytest.raises(ValueError, match=message):
                controller.load_state_dict(wrong)
            assert_same(controller.state_dict(), before)
