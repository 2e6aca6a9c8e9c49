"""Averaged gradients over real Gloo processes, against one process."""

from __future__ import annotations

from pathlib import Path

import gradient_checks
import pytest
import ranks
import torch
from helpers import spawn_ranks

from dynmoe_tutel import MoELayer, parallel


@pytest.mark.parametrize("processes", [2, 4])
def test_averages_on_ranks(processes: int, tmp_path: Path) -> None:
    spawn_ranks(ranks.run, (processes, str(tmp_path), gradient_checks.AVERAGES), processes)


def test_one_process_keeps_its_gradients() -> None:
    layer = MoELayer("top_any", 4, {"num_experts_per_device": 2, "hidden_size_per_expert": 4}, seeds=(1, 2))
    layer(torch.randn(3, 4, generator=torch.Generator().manual_seed(0))).sum().backward()
    before = [p.grad.clone() for p in layer.parameters()]
    parallel.average_gradients(layer)
    assert all(torch.equal(p.grad, old) for p, old in zip(layer.parameters(), before, strict=True))


def test_ddp_goes_on_ignoring_what_it_was_told_to() -> None:
    model = torch.nn.Linear(2, 2)
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["bias"])
    for _ in range(2):
        parallel.ignore_experts_in_ddp(model)
    assert list(model._ddp_params_and_buffers_to_ignore) == ["bias"]
