"""A budget's shift on 4, 2 and 1 real processes: bitwise the same on every rank, the mean over all ranks on target.

Data-parallel replicas, and experts divided over the ranks; each rank has tokens of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import GROUP_PATIENCE, leave, spawn_ranks

from dynmoe_tutel import ExpertController, MoELayer, parallel

WORLDS = (4, 2)
D, STEPS, TARGET = 16, 340, 2.0
STARTS = [  # whether experts are divided, dtype, threshold; from a mean k of about 9 and of about 0.4
    (False, torch.float32, -0.2),
    (True, torch.float32, 0.45),
    (False, torch.bfloat16, 0.45),
    (True, torch.bfloat16, -0.2),
]


def _train(divided: bool, dtype: torch.dtype, threshold: float) -> dict[str, Any]:
    """Mean k of this rank in each step, and the last shift."""
    budget = {"target_k": TARGET}
    layer = MoELayer(
        {"type": "top_any", "max_expert_num": 16, "budget": budget},
        D,
        {"num_experts_per_device": 12 // dist.get_world_size() if divided else 12, "hidden_size_per_expert": 8},
        seeds=(1, 2),
        group=dist.group.WORLD if divided else None,
    ).to(dtype)
    with torch.no_grad():
        layer.gates[0].gates.fill_(threshold)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    controller = ExpertController(layer, optimizer, schedule=50)
    generator = torch.Generator().manual_seed(dist.get_rank())
    k = []
    for _ in range(STEPS):
        # each rank's tokens lie in a direction of their own: its mean k alone is far from the target
        x = torch.randn(128, D, generator=generator) + dist.get_rank() * torch.eye(D)[dist.get_rank()]
        x = x.to(dtype)
        optimizer.zero_grad()
        k.append(float(layer.route(x).k_per_token.float().mean()))
        (layer(x) - x.roll(1, dims=1)).float().square().mean().backward()
        parallel.average_gradients(layer)
        optimizer.step()
        controller.step()
    return {"k": k, "shift": layer.gates[0].budget_shift.clone(), "experts": layer.num_global_experts}


def _bound_and_capped() -> None:
    """`bind` brings rank 0's shift along, refuses unlike budgets, and a call's `max_k` holds on every rank."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD

    def layer_of(**budget: Any) -> MoELayer:
        experts = {"num_experts_per_device": 8, "hidden_size_per_expert": 8}
        return MoELayer({"type": "top_any", "budget": budget}, D, experts, seeds=(1, 2))

    layer, whole = layer_of(target_k=TARGET, max_k=4), layer_of(target_k=TARGET, max_k=4)
    whole.gates[0].budget_shift.fill_(0.1)
    layer.gates[0].budget_shift.fill_(0.1 + rank)
    layer.bind(group)
    assert torch.equal(layer.gates[0].budget_shift, whole.gates[0].budget_shift)
    x = torch.randn(ranks * 20, D, generator=torch.Generator().manual_seed(3))
    for max_k in (None, 2, 1):
        own = x[rank * 20 : rank * 20 + 20]
        routing = layer.route(own, max_k=max_k)
        assert int(routing.k_per_token.max()) == (max_k or 4)
        torch.testing.assert_close(layer(own, max_k=max_k), whole(x, max_k=max_k)[rank * 20 : rank * 20 + 20])
        assert routing.token_of_row.shape == (int(routing.num_assignments),)  # over ranks, capacity stays exact
    experts = {"num_experts_per_device": 8 // ranks, "hidden_size_per_expert": 8}
    for unlike in ({"max_k": 2 + rank}, {"target_k": 2.0} if rank else {"max_k": 2}):
        with pytest.raises(ValueError, match="moe_layer over the ranks of group: budgets = "):
            MoELayer({"type": "top_any", "budget": unlike}, D, experts, group=group)
    with pytest.raises(ValueError, match="bind: budgets = "):
        layer_of(max_k=2 + rank).bind(group)


def _process(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=GROUP_PATIENCE)
    _bound_and_capped()
    torch.save([_train(*start) for start in STARTS], f"{folder}/{rank}.pt")
    dist.barrier()
    leave()


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_holds_the_mean_of_all(world: int, tmp_path: Path) -> None:
    spawn_ranks(_process, (str(tmp_path), world), world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for (_, _, threshold), of_ranks in zip(STARTS, zip(*ranks, strict=True), strict=True):
        for other in of_ranks[1:]:
            assert torch.equal(of_ranks[0]["shift"], other["shift"])
            assert other["experts"] == of_ranks[0]["experts"]
        k = torch.tensor([rank["k"] for rank in of_ranks]).mean(dim=0)
        assert float(k[0]) > 7 if threshold < 0 else float(k[0]) < 0.7
        windows = k[200:].unfold(0, 100, 1).mean(dim=1)
        assert float((windows / TARGET - 1).abs().max()) < 0.05
        assert float(of_ranks[0]["shift"]) != 0
