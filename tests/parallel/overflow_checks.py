"""Checks of `OverflowRepair` that run inside a rank of a real process group; `test_overflow_ranks` starts them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FP32, relative_rms
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynmoe_tutel import MoELayer, OverflowRepair, parallel

D, H, T = 16, 20, 24


def model_with(capacity: Any, group: Any) -> nn.Module:
    """Two layers of eight slots around a dropout."""
    ranks = 1 if group is None else dist.get_world_size(group)
    experts = {"num_experts_per_device": 8 // ranks, "hidden_size_per_expert": H, "activation_fn": F.gelu}
    layers = [MoELayer("top_any", D, experts, seeds=(s, s), capacity=capacity, group=group) for s in (1, 2)]
    return nn.Sequential(layers[0], nn.Dropout(0.2), layers[1])


def tokens(model: nn.Module, crowded: bool) -> Tensor:
    """Tokens of this rank: random ones, which go to many experts, or such as no expert takes."""
    if crowded:
        return torch.randn(T, D, generator=torch.Generator().manual_seed(dist.get_rank()))
    return -model[0].gates[0].sim_matrix.detach().t().sum(dim=0).expand(T, D)


def trained(capacity: Any, group: Any, crowded: list[int]) -> tuple[list[Tensor], OverflowRepair, nn.Module]:
    """Output and gradients of a step in which the ranks `crowded` overflow, its repair and model."""
    model = model_with(capacity, group)
    wrapped: nn.Module = model
    if group is None:
        wrapped = DistributedDataParallel(model)
    repair, x = OverflowRepair(wrapped), tokens(model, dist.get_rank() in crowded)
    for layer in (model[0], model[2]):
        layer.begin_record_routing()
    torch.manual_seed(5 + dist.get_rank())

    def step() -> Tensor:
        y: Tensor = wrapped(x)
        repair.forwards_done()
        (y.square().sum() + y.l_aux).backward()
        return y.detach()

    y = repair(step)
    if group is not None:
        parallel.average_gradients(model)
    records = [t for layer in (model[0], model[2]) for t in layer.record.tensors()]
    return [y, *(p.grad for p in model.parameters()), *records, torch.get_rng_state()], repair, model


def repaired(group: Any) -> None:
    """One rank overflows and all repeat; none does and none repeats."""
    for crowded in ([1], []):
        found, repair, model = trained(0.5, group, crowded)
        expected, never, _ = trained("exact", group, crowded)
        assert (repair.repeated, never.repeated) == (len(crowded), 0)
        assert [int(layer.dropped_assignments) for layer in (model[0], model[2])] == [0, 0]
        for a, b in zip(found, expected, strict=True):
            assert relative_rms(a, b) < FP32


def of_copies() -> None:
    """Each rank holds all experts, under DistributedDataParallel."""
    repaired(None)


def of_divided_experts() -> None:
    """The ranks divide the experts."""
    repaired(dist.group.WORLD)


CHECKS = [of_copies, of_divided_experts]
