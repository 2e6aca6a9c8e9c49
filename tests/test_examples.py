"""The programs in examples/ run and say what they are there to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run(name: str, *launcher: str) -> str:
    """What the example prints."""
    command = [sys.executable, *launcher, str(ROOT / "examples" / name)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_layer_learns_and_grows() -> None:
    said = run("train_a_layer.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < 0.1 < 0.9 < losses[0]
    assert "grown" in said
    experts = [int(number) for number in re.findall(r"(\d+) experts, ", said)]
    assert experts[-1] > experts[0]


def test_a_bert_is_converted_and_learns() -> None:
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed: the extra [hf] brings it")
    said = run("convert_bert.py")
    (difference,) = re.findall(r"differ by at most (\S+)", said)
    assert float(difference) < 1e-5
    (accuracy,) = re.findall(r"accuracy after \d+ steps: ([\d.]+)%", said)
    assert float(accuracy) > 90


def test_a_vision_language_model_is_converted_trained_saved_and_asked() -> None:
    if find_spec("transformers") is None or find_spec("PIL") is None:
        pytest.skip("transformers or pillow is not installed: the extra [hf] brings them")
    said = run("vision_language.py")
    first, last = re.findall(r"loss ([\d.]+) at first, ([\d.]+) at last", said)[0]
    assert float(last) < 0.3 < float(first)
    assert len(re.findall(r"layers\.[02]\.mlp: \d experts, [\d.]+ a token", said)) == 2
    (right,) = re.findall(r"right answers: (\d+)%", said)
    assert int(right) > 90


def test_two_ranks_divide_the_experts() -> None:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no Gloo")
    said = run("expert_parallel.py", *TORCHRUN)
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", said))
    assert last < first
    assert re.search(r"experts by rank: \d \d\n", said)
    assert "routers are equal on all ranks: True" in said  # average_gradients was called


@pytest.mark.slow
def test_a_vision_transformer_trains_with_deepspeed() -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'dynmoe_tutel[deepspeed]'")
    said = run("deepspeed_vit.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < losses[0] / 2
    assert "grown" in said
    (accuracy,) = re.findall(r"accuracy ([\d.]+)%", said)
    assert float(accuracy) > 70


def test_a_gate_and_a_policy_of_ones_own() -> None:
    said = run("own_gate_and_policy.py")
    assert "pruned" in said
    assert "grown" in said
    low, high = re.findall(r"from (\d+) to (\d+) experts", said)[0]
    assert 1 == int(low) < int(high)


def test_every_example_has_a_test() -> None:
    tests = Path(__file__).read_text()
    assert [path.name for path in (ROOT / "examples").glob("*.py") if f'"{path.name}"' not in tests] == []
