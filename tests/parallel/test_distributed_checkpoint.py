"""A killed job goes on from its last checkpoint; single-process checkpoints and their refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PATIENCE
from killed_job import KILLED_AFTER
from torch import Tensor, nn
from training import STEPS, same

from dynmoe_tutel import ExpertController, moe
from dynmoe_tutel.checkpoint import distributed

FOLDER = Path(__file__).parent
D = 8


def test_a_killed_job_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """SIGKILL on one of two ranks during a save; the second start equals an uninterrupted job bitwise."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent)]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(FOLDER / "killed_job.py"), str(tmp_path)]
    kill, resume = (
        subprocess.run([*command, *script, what], env=environment, timeout=PATIENCE, capture_output=True, text=True)
        for what in ("kill", "resume")
    )
    assert kill.returncode != 0
    assert "SIGKILL" in kill.stderr
    assert resume.returncode == 0, resume.stderr
    for rank in range(2):
        assert (tmp_path / f"kill-{rank}").read_text() == "nothing"
        assert (tmp_path / f"resume-{rank}").read_text() == f"step-{KILLED_AFTER - 4}"
        assert same(*torch.load(tmp_path / f"end-{rank}.pt", weights_only=True)), f"rank {rank} differs"
    kept = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    # the killed save left its temporary folder, which the next save of that name replaced
    assert kept == sorted(f"step-{step}" for step in range(4, STEPS + 1, 4))


class Alone:
    """A model on one process, without torch.distributed."""

    def __init__(self, optimizer: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        gate = {"type": "top_any", "max_expert_num": 6, **options}
        experts = {"type": "ffn", "num_experts_per_device": 3, "hidden_size_per_expert": 5}
        self.model = nn.Sequential(moe.moe_layer(gate_type=gate, experts=experts, model_dim=D), nn.Linear(D, 2))
        make = optimizer or (lambda p: torch.optim.Adam(p, lr=1e-2))
        self.optimizer = make(self.model.parameters())
        self.controller = ExpertController(self.model, self.optimizer, 3, max_new_experts=2, init="fresh")

    def train(self, steps: int, start: int = 0) -> Alone:
        for step in range(start, start + steps):
            x = torch.randn(24, D, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            (self.model(x).square().mean() + 0.01 * self.model[0].l_aux).backward()
            self.optimizer.step()
            self.controller.step()
        return self

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.controller

    def state(self) -> list[Any]:
        return [part.state_dict() for part in self.parts()]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2), foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_process_resumes_bitwise(name: str, tmp_path: Path) -> None:
    job = Alone(OPTIMIZERS[name]).train(4)
    distributed.save(tmp_path / "step-4", *job.parts())
    before = [_copied(state) for state in job.state()]
    resumed = Alone(OPTIMIZERS[name]).train(1, start=50)
    distributed.load(tmp_path / "step-4", *resumed.parts())
    assert same(resumed.state(), before)
    assert same(resumed.train(5, start=4).state(), job.train(5, start=4).state())
    assert job.controller.events, "the resumed part must have something to get wrong"


def test_a_budget_resumes_bitwise_and_is_not_lost(tmp_path: Path) -> None:
    budget = {"budget": {"target_k": 1.5, "max_k": 2}}
    job = Alone(**budget).train(4)
    assert float(job.model[0].gates[0].budget_shift) != 0
    distributed.save(tmp_path / "step-4", *job.parts())
    resumed = Alone(**budget).train(1, start=50)
    distributed.load(tmp_path / "step-4", *resumed.parts())
    assert same(resumed.train(5, start=4).state(), job.train(5, start=4).state())
    with pytest.raises(ValueError, match=r"has unknown \['model\.0\.gates\.0\.budget_shift'\]"):
        distributed.load(tmp_path / "step-4", *Alone().parts())
    distributed.save(tmp_path / "plain", *Alone().train(1).parts())
    with pytest.raises(ValueError, match=r"lacks \['model\.0\.gates\.0\.budget_shift'\]"):
        distributed.load(tmp_path / "plain", *Alone(**budget).parts())


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def test_model_alone_and_what_was_saved_beside_it(tmp_path: Path) -> None:
    job = Alone().train(2)
    distributed.save(tmp_path / "a", job.model, extra=[1, torch.ones(2)], rank_state="mine")
    other = Alone()
    restored = distributed.load(tmp_path / "a", other.model)
    assert same(other.model.state_dict(), job.model.state_dict())
    assert same(restored.extra, [1, torch.ones(2)])
    assert (restored.rank_state, restored.ranks) == ("mine", 1)
    with pytest.raises(ValueError, match="was saved without a controller"):
        distributed.load(tmp_path / "a", other.model, None, other.controller)
    with pytest.raises(ValueError, match="the checkpoint has 0 optimizers, given are 1"):
        distributed.load(tmp_path / "a", other.model, other.optimizer)


def test_the_latest_is_the_highest_number_that_is_whole(tmp_path: Path) -> None:
    assert distributed.latest(tmp_path / "nowhere") is None
    for name in ("step-900", "step-1000", "step-2000", ".tmp-step-3000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / (".metadata" if name != "step-2000" else "__0_0.distcp")).touch()
    found = distributed.latest(tmp_path)
    assert found is not None
    assert found.name == "step-1000"


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    job = Alone().train(1)
    distributed.save(tmp_path / "a", *job.parts())
    before = [_copied(state) for state in job.state()]
    data = tmp_path / "a" / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError, match="could not be read"):
        distributed.load(tmp_path / "a", *job.parts())
    (tmp_path / "a" / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="metadata cannot be read"):
        distributed.load(tmp_path / "a", *job.parts())
    assert same(job.state(), before)


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    job = Alone()
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer 0 holds a parameter of shape \[3\] that is not the model's"):
        distributed.save(tmp_path / "a", job.model, foreign)
    assert not (tmp_path / "a").exists()
