"""Parts of the stand-in that divide parameters and tensors of unequal sizes over the ranks, on one and two ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import spawn_ranks
from torch import Tensor, nn

from dynmoe_tutel import moe
from dynmoe_tutel.tutel_stand_in import net, sharding

WORLD, D = 2, 6


class Model(nn.Module):
    """Shared parameters of 7, 1 and 36 elements, and a layer whose experts are each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(7)), nn.Parameter(torch.zeros(()))
        experts = {"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 4}
        self.linear, self.mlp = nn.Linear(D, D), moe.moe_layer({"type": "top", "k": 2}, D, experts, seeds=(1, 2))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.linear(x)) * self.scale[:D] + self.bias
        return y.square().sum() + 0.1 * y.l_aux if hasattr(y, "l_aux") else y.square().sum()


def tokens(rank: int) -> Tensor:
    return torch.randn(5, D, generator=torch.Generator().manual_seed(rank))


def seeded_model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


def train(average: bool) -> None:
    """Three steps equal those of an optimizer with all of the shared parameters, whose gradients are summed."""
    rank, ranks = net.get_world_rank(), net.get_world_size()
    model = seeded_model()
    reference = copy.deepcopy(model)
    divided = sharding.TutelDistributedOptimizer(model.parameters(), average_shared=average)
    assert divided.warp_local(torch.optim.Adam, lr=0.1) is divided
    whole = torch.optim.Adam(reference.parameters(), lr=0.1)
    for _ in range(3):
        divided.zero_grad()
        model(tokens(rank)).backward()
        divided.step()
        whole.zero_grad()
        reference(tokens(rank)).backward()
        for p in reference.parameters():
            if not hasattr(p, "_tutel_expert") and p.grad is not None:
                p.grad = net.simple_all_reduce(p.grad) / (ranks if average else 1)
        whole.step()
    for (name, p), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(p, expected, msg=f"{name} of {rank}")
    own = sum(p.numel() for p in divided.virt_params)
    assert (
        own
        == (7 + ranks - 1) // ranks + 1 + 36 // ranks + 6 // ranks + (3 + ranks - 1) // ranks + 2 * ranks * D // ranks
    )


def collectives() -> None:
    rank, ranks = net.get_world_rank(), net.get_world_size()
    full = torch.arange(10.0).view(5, 2)
    part, shape = sharding.zero_scatter(full, net.simple_split)
    assert (part.numel(), shape) == (10 // ranks, full.shape)
    odd, _ = sharding.zero_scatter(full[0, :1], net.simple_split)
    assert odd.tolist() == [0.0]  # an element or the padding
    part = part.clone().requires_grad_()
    whole = sharding.zero_gather(part, shape)
    assert torch.equal(whole, full)
    (whole * (rank + 1)).sum().backward()
    assert part.grad.unique().tolist() == [sum(range(1, ranks + 1))]
    assert sharding.zero_gather(torch.ones(3, 2)).shape == (3 * ranks, 2)
    gathered, sizes = sharding.batch_all_gather_v(
        [torch.full((2 + rank,), rank), torch.full((2 + rank, 1), rank + 0.5)]
    )
    assert sizes.tolist() == [2 + r for r in range(ranks)]
    assert gathered[0].tolist() == [r for r in range(ranks) for _ in range(2 + r)]
    assert gathered[1].tolist() == [r + 0.5 for r in range(ranks) for _ in range(2 + r)]
    empty, sizes = sharding.batch_all_gather_v([torch.zeros(0)])
    assert (empty[0].tolist(), sizes.tolist()) == ([], [0] * ranks)
    with pytest.raises(ValueError, match=r"partition_sizes has 3 entries: give one for each of the ranks"):
        sharding.batch_all_to_all_v([torch.zeros(3)], [1, 1, 1])


@pytest.mark.parametrize("average", [False, True])
def test_the_optimizer_of_one_process(average: bool) -> None:
    train(average)


def test_the_collectives_of_one_process() -> None:
    collectives()
    (out,), sizes = sharding.batch_all_to_all_v([torch.ones(2, 2)], [4])
    assert (out.tolist(), sizes.tolist()) == ([1.0] * 4, [4])


def test_a_step_needs_warp_local() -> None:
    with pytest.raises(RuntimeError, match=r"call warp_local\(torch.optim.SGD, lr=...\) first"):
        sharding.TutelDistributedOptimizer([nn.Parameter(torch.ones(2))]).step()


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for average in (False, True):
        train(average)
    collectives()
    data = torch.arange(5) + 10 * rank
    (out, double), sizes = sharding.batch_all_to_all_v([data, data * 2.0], [[5, 0], [2, 3]][rank])
    assert sizes.tolist() == [[5, 2], [0, 3]][rank]
    assert out.tolist() == [[0, 1, 2, 3, 4, 10, 11], [12, 13, 14]][rank]
    assert double.tolist() == (out * 2).tolist()
    with pytest.raises(ValueError, match=r"datas have \[5\] elements, and partition_sizes 2"):
        sharding.batch_all_to_all_v([data], torch.tensor([1, 1]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    arguments: tuple[Any, ...] = (str(tmp_path),)
    spawn_ranks(_rank, arguments, WORLD)
