"""Module paths from before 0.2 give today's modules, and import nothing until they are used."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynmoe_tutel
from dynmoe_tutel import ExpertController, MoELayer, RoutingRecord, old_paths

ROOT = Path(__file__).resolve().parents[1]
PROMISED = {"controller", "distributed_checkpoint", "meters", "policy", "records"}
FORMS = (
    "import dynmoe_tutel.{old}\nfound = dynmoe_tutel.{old}",
    "import dynmoe_tutel.{old} as found",
    "from dynmoe_tutel import {old} as found",
    "import dynmoe_tutel\nfound = dynmoe_tutel.{old}",
    "from dynmoe_tutel.{old} import __name__ as found\nimport importlib\nfound = importlib.import_module(found)",
    "import dynmoe_tutel.{new}, importlib\nfound = importlib.import_module('dynmoe_tutel.{old}')",
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_promised_ones_are_there() -> None:
    assert set(old_paths.MOVED) >= PROMISED


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_import_finds_the_module_itself(form: str) -> None:
    """Each form runs in its own process for all paths, since an import changes what the next one finds."""
    code = [
        f"{form.format(old=old, new=new)}\nimport dynmoe_tutel.{new} as now\nassert found is now, found"
        for old, new in old_paths.MOVED.items()
    ]
    assert run("\n".join([*code, "print('all')"])) == "all\n"


def test_nothing_is_imported_for_them() -> None:
    code = "import sys, dynmoe_tutel\nprint([n for n in sys.modules if 'checkpoint' in n and 'dynmoe' in n])"
    assert run(code) == "[]\n"


def test_a_path_that_never_was_is_refused() -> None:
    with pytest.raises(ModuleNotFoundError):
        __import__("dynmoe_tutel.wires")
    with pytest.raises(AttributeError, match="wires"):
        _ = dynmoe_tutel.wires


def test_a_record_of_before_is_unpickled() -> None:
    """A pickle names its class by the old path."""
    record = RoutingRecord(3, 2)
    record.counts += 5
    packed = pickle.dumps(record, protocol=0).replace(b"dynmoe_tutel.adaptive.records", b"dynmoe_tutel.records")
    assert b"dynmoe_tutel.records" in packed
    found = pickle.loads(packed)
    assert type(found) is RoutingRecord
    assert torch.equal(found.counts, record.counts)


def test_a_layer_of_before_says_what_to_do() -> None:
    """A layer pickled before layers had an exchange: its class path and those of its records are found."""
    layer = MoELayer("top_any", 4, {"num_experts_per_device": 2, "hidden_size_per_expert": 3}, seeds=(0, 0))
    del layer.exchange
    packed = pickle.dumps(layer, protocol=0)
    for now, then in (
        (b"dynmoe_tutel.adaptive.records", b"dynmoe_tutel.records"),
        (b"dynmoe_tutel.capacity", b"dynmoe_tutel.late_count"),
    ):
        assert now in packed
        packed = packed.replace(now, then)
    with pytest.raises(ValueError, match=r"make the layer anew and load its state_dict\(\)"):
        pickle.loads(packed)


def test_a_layer_pickled_before_budgets_runs_and_grows() -> None:
    """torch.save(model) of the version before: it lacks attributes that a new layer has."""
    layer = MoELayer("top_any", 8, {"num_experts_per_device": 2, "hidden_size_per_expert": 8}, seeds=(1, 2))
    x = torch.randn(5, 8)
    expected = layer(x).detach()
    gate = layer.gates[0]
    added = {layer: ("_room_by_budget", "lineage"), gate: ("budget", "_sample", "_sampled")}
    for owner, names in {**added, layer.record: ("_least_tokens",)}.items():
        for name in names:
            del vars(owner)[name]
    del gate._buffers["budget_shift"]
    restored = pickle.loads(pickle.dumps(layer))
    controller = ExpertController(restored, torch.optim.SGD(restored.parameters(), lr=0.0), 1)
    assert torch.equal(restored(x), expected)
    restored(x).sum().backward()
    controller.step()
    assert restored.state_dict().keys() == layer.state_dict().keys()
