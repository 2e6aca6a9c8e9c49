"""Gates that weight experts by their scores on 2 real processes: state bitwise equal on both, the mean over both held.

Data-parallel replicas, each with tokens of its own; and experts divided over the ranks, equal to one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import GROUP_PATIENCE, leave, relative_rms, spawn_ranks

from dynmoe_tutel import MoELayer, parallel
from dynmoe_tutel.adaptive import Budgets

D, E, STEPS, WORLD = 8, 4, 60, 2
GATES: list[tuple[dict[str, Any], float | None]] = [  # with the mean k that it holds
    ({"type": "relu", "target_k": 1.5, "coefficient": 0.1}, None),
    ({"type": "top_p", "target_k": 2.0}, 2.0),
    ({"type": "expert_threshold", "target_k": 1.5, "decay": 0.9}, 1.5),
    ({"type": "null_experts", "k": 3, "target_k": 1.5}, 1.5),
    ({"type": "quantile_top_k", "k": 2}, 2.0),
]


def _layer(gate: dict[str, Any], group: Any = None) -> MoELayer:
    ranks = 1 if group is None else dist.get_world_size(group)
    experts = {"num_experts_per_device": E // ranks, "hidden_size_per_expert": 8}
    return MoELayer(gate, D, experts, seeds=(1, 2), group=group)


def _train(layer: MoELayer) -> list[float]:
    """Assignments of this rank in each step; the tokens of each rank lie in a direction of their own."""
    optimizer, budgets = torch.optim.AdamW(layer.parameters(), lr=1e-3), Budgets(layer)
    generator, means = torch.Generator().manual_seed(dist.get_rank()), []
    for _ in range(STEPS):
        x = torch.randn(200 + 100 * dist.get_rank(), D, generator=generator) + 2 * torch.eye(D)[dist.get_rank()]
        means.append(float(layer.route(x).k_per_token.sum()))
        optimizer.zero_grad()
        y = layer(x)
        ((y - x.roll(1, dims=1)).square().mean() + 0.01 * y.l_aux).backward()
        parallel.average_gradients(layer)
        optimizer.step()
        budgets.step()
    return means


def _divided(gate: dict[str, Any]) -> None:
    """The experts of a group and those of one process give one output and one gradient of x, also at k = 0."""
    whole, divided = _layer(gate), _layer(gate, dist.group.WORLD)
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(5 + dist.get_rank()))
    for mode in (True, False):
        results = []
        for layer in (whole, divided):
            tokens = x.clone().requires_grad_()
            y = layer.train(mode)(tokens)
            y.square().sum().backward()
            results.append((y, tokens.grad, layer.gates[0].wg.weight.grad))
        for mine, other in zip(*results, strict=True):
            assert relative_rms(other, mine) < 1e-6


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=GROUP_PATIENCE)
    results = []
    for gate, _ in GATES:
        layer = _layer(gate)
        results.append({"k": _train(layer), "state": dict(layer.gates[0].named_buffers())})
        _divided(gate)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    leave()


def test_state_is_one_and_the_mean_over_both_ranks_is_held(tmp_path: Path) -> None:
    spawn_ranks(_process, (str(tmp_path),), WORLD)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    for (gate, target), first, second in zip(GATES, one, other, strict=True):
        assert first["state"].keys() == second["state"].keys()
        for name, value in first["state"].items():
            assert torch.equal(value, second["state"][name]), (gate, name)
        if target is not None:
            k = (torch.tensor(first["k"]) + torch.tensor(second["k"]))[20:].mean() / 500
            assert float(k) == pytest.approx(target, rel=0.05), gate
