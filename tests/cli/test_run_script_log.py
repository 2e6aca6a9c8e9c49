"""What a script that `dynmoe-tutel run` runs shows of the package's log, and of growth."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from script_case import call, write

from dynmoe_tutel import tutel_stand_in
from dynmoe_tutel.cli.run_script import run

if tutel_stand_in.tutel_is_importable():
    pytest.skip("Tutel is installed: its own tests run scripts with it", allow_module_level=True)

LOG = "log = logging.getLogger('dynmoe_tutel.part')\nlog.debug('no')\nlog.info('an %s', 'event')\nlog.warning('care')\n"


@pytest.mark.parametrize(
    ("set_up", "lines"),
    [
        ("", ["dynmoe_tutel.part INFO: an event", "dynmoe_tutel.part WARNING: care"]),
        ("logging.basicConfig(format='%(message)s')", ["care"]),
        ("logging.basicConfig(level=logging.INFO, format='> %(message)s')", ["> an event", "> care"]),
        ("logging.getLogger('dynmoe_tutel').setLevel(logging.WARNING)", ["dynmoe_tutel.part WARNING: care"]),
        ("l = logging.getLogger('dynmoe_tutel'); l.addHandler(logging.StreamHandler())", ["an event", "care"]),
    ],
)
def test_what_is_logged_is_seen_unless_the_script_configures_logging(
    set_up: str, lines: list[str], tmp_path: Path
) -> None:
    done = call(write(tmp_path, f"import logging, tutel.moe\n{set_up}\n{LOG}"), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (0, "", lines)


GROWS = """
import logging, os, sys, torch
{set_up}
import tutel.moe
layer = tutel.moe.moe_layer({{"type": "gated_multi_gate", "max_expert_num": 4}}, 8, {{"hidden_size_per_expert": 4}})
for tokens in (-layer.gates[0].sim_matrix.detach().T[:1], torch.randn(64, 8)):  # the first grow an expert, then none
    layer.begin_record_routing()
    layer(tokens)
    layer.adaptive_update_experts()
"""
GROWN = "adaptive update: from 1 to 2 experts, slot 1 grown"
WARNINGS = "logging.basicConfig(level=logging.WARNING)"


@pytest.mark.parametrize(
    ("set_up", "environment", "lines"),
    [
        (WARNINGS, {}, [f"dynmoe_tutel: {GROWN}"]),
        (f"{WARNINGS}; logging.root.handlers[0].setLevel(logging.ERROR)", {}, [f"dynmoe_tutel: {GROWN}"]),
        ("logging.basicConfig(level=logging.WARNING, filename=os.devnull)", {}, [f"dynmoe_tutel: {GROWN}"]),
        (WARNINGS, {"DYNMOE_TUTEL_EVENTS": "0"}, []),
        (WARNINGS, {"RANK": "1"}, []),
        (WARNINGS, {"RANK": "1", "DYNMOE_TUTEL_EVENTS": "1"}, []),
        ("logging.basicConfig(level=logging.INFO, format='> %(message)s')", {}, [f"> {GROWN}"]),
        ("", {}, [f"dynmoe_tutel INFO: {GROWN}"]),
        ("", {"RANK": "1"}, []),
    ],
)
def test_growth_is_seen_once_whatever_the_script_logs(
    set_up: str, environment: dict[str, str], lines: list[str], tmp_path: Path
) -> None:
    done = call(write(tmp_path, GROWS.format(set_up=set_up)), cwd=tmp_path, **environment)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    seen = [line for line in done.stderr.splitlines() if "experts, slot" in line]
    assert seen == lines


def test_events_are_asked_for_while_the_script_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = write(tmp_path, "import os, sys\nsys.exit(int(os.environ['DYNMOE_TUTEL_EVENTS']))\n")
    monkeypatch.delenv("DYNMOE_TUTEL_EVENTS", raising=False)
    assert run([str(script)]) == 1
    assert "DYNMOE_TUTEL_EVENTS" not in os.environ
    monkeypatch.setenv("DYNMOE_TUTEL_EVENTS", "3")
    assert run([str(script)]) == 3
    assert os.environ["DYNMOE_TUTEL_EVENTS"] == "3"
