"""What ranks say when they do not make the same forwards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import GROUP_PATIENCE, spawn_ranks, wait_until

from dynmoe_tutel import MoELayer
from dynmoe_tutel.parallel import collectives

REMEDY = "Evaluate on all of them; or save with checkpoint.distributed"


def start(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks, timeout=GROUP_PATIENCE)


def layer_over_ranks(capacity: Any = "exact") -> MoELayer:
    gate = {"type": "top_any", "max_expert_num": 2 * dist.get_world_size()}
    experts = {"num_experts_per_device": 2, "hidden_size_per_expert": 8}
    return MoELayer(gate, 8, experts, group=dist.group.WORLD, capacity=capacity, a2a_ffn_overlap_degree=2)


def _unlike(rank: int, folder: str) -> None:
    """Rank 1 of three evaluates while the others train; before and after, all do the same."""
    start(rank, 3, folder)
    for capacity, gradients in (("exact", False), ("exact", True), (1.0, False), ("full", False)):
        layer, x = layer_over_ranks(capacity), torch.ones(4, 8)
        for training in (True, False):
            layer.train(training)(x).sum().backward()
        with torch.no_grad():
            layer.eval()(x)
        words = "evaluate with gradients" if gradients else "evaluate"
        said = rf"rank\(s\) \[1\] {words} and rank\(s\) \[0, 2\] train: .*{REMEDY}"
        with torch.set_grad_enabled(gradients or rank != 1), pytest.raises(ValueError, match=said):
            layer.train(rank != 1)(x)
        layer.train()(x).sum().backward()
    dist.barrier()


def test_ranks_that_evaluate_and_train_at_once_are_refused(tmp_path: Path) -> None:
    """On all ranks, before a row is sent, so that they can go on together."""
    spawn_ranks(_unlike, (str(tmp_path),), 3)


def _alone(rank: int, folder: str) -> None:
    """Rank 0 evaluates. Rank 1 waits elsewhere until it is warned about, and ends then."""
    start(rank, 2, folder)
    layer, warned = layer_over_ranks(), Path(folder) / "warned"
    if rank == 1:
        wait_until(warned.exists, "rank 0 warned")
        return
    collectives._SLOW_SECONDS, collectives._ANSWER_SECONDS = 0.2, 0.2
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            warned.touch()

    logging.getLogger("dynmoe_tutel").addHandler(Keep())
    with torch.no_grad(), pytest.raises(RuntimeError, match=rf"this one alone went to evaluate: .*{REMEDY}"):
        layer.eval()(torch.ones(4, 8))
    assert len(said) == 1
    assert "rank 0 has waited for the other ranks of group for 0.2 s in a forward without training" in said[0]
    assert REMEDY in said[0]


def test_a_rank_that_evaluates_alone_says_so(tmp_path: Path) -> None:
    spawn_ranks(_alone, (str(tmp_path),), 2)
