"""A token that is not finite, over ranks: its rank and its output show it, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dynmoe_tutel import MoELayer

D, E, T, BROKEN = 8, 4, 12, 5
GATES: tuple[dict[str, Any], ...] = (
    {"type": "top_any", "max_expert_num": E},
    {"type": "top", "k": 2},
    {"type": "cosine_top", "k": 2, "proj_dim": 7},
)


def _check(gate: dict[str, Any], capacity: Any) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    experts = {"num_experts_per_device": E // world, "hidden_size_per_expert": 6}
    layer = MoELayer(gate, D, experts, seeds=(1, 2), group=dist.group.WORLD, capacity=capacity)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(rank))
    if rank == 1:
        x[BROKEN, 2] = float("nan")
    x.requires_grad_()
    y = layer(x)
    finite = [not (rank == 1 and t == BROKEN) for t in range(T)]
    assert y.isfinite().all(dim=1).tolist() == finite
    y[torch.tensor(finite)].square().sum().backward()
    assert x.grad is not None
    assert x.grad[torch.tensor(finite)].isfinite().all()
    if gate["type"] == "top_any":
        assert all(p.grad.isfinite().all() for p in layer.gates.parameters() if p.grad is not None)


def _case(gate: dict[str, Any], capacity: Any) -> Callable[[], None]:
    def check() -> None:
        _check(gate, capacity)

    check.__name__ = f"{gate['type']} {capacity}"
    return check


def checks() -> list[Callable[[], None]]:
    """Every gate with every kind of capacity."""
    return [_case(gate, capacity) for gate in GATES for capacity in ("exact", float(E), "full")]


def run_checks() -> None:
    """All of `checks`, on one rank."""
    for check in checks():
        try:
            check()
        except Exception as error:
            raise AssertionError(f"{check.__name__}: {error!r}") from error
