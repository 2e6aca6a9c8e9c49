"""Data and expert parallel under torchrun: gradients by DDP, FSDP2 or plain all-reduce equal one process's."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import GROUP_PATIENCE, TRAINED_MARGIN, assert_margin, leave, relative_rms
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dynmoe_tutel import MoELayer, parallel

D, E, T = 8, 8, 6
EPS = 1e-4  # of Adam: a smaller divisor would turn the rounding of a gradient near 0 into a step


class Model(nn.Module):
    """Dense, MoE, dense."""

    def __init__(self, group: Any, ranks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 1)
        experts = {"num_experts_per_device": E // ranks, "hidden_size_per_expert": 12, "activation_fn": F.gelu}
        self.moe = MoELayer({"type": "top_any", "max_expert_num": E}, D, experts, group=group, seeds=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.moe(x))


def loss(model: nn.Module, moe: Any, x: Tensor) -> Tensor:
    return model(x).square().mean() + 0.01 * moe.l_aux


def main(expert_ranks: int) -> None:
    dist.init_process_group("gloo", timeout=GROUP_PATIENCE)
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // expert_ranks, expert_ranks), mesh_dim_names=("data", "experts"))
    expert_group, expert_data_group = mesh["experts"].get_group(), mesh["data"].get_group()
    batches = torch.randn(2, world, T, D, generator=torch.Generator().manual_seed(30))
    one = Model(None, 1)
    optimizer = torch.optim.Adam(one.parameters(), 1e-2, eps=EPS)
    expected = []
    for batch in batches:
        optimizer.zero_grad()
        # no decision is in doubt, or a rank's rounding could send a token elsewhere
        assert_margin(one.moe, one.first(batch), least=TRAINED_MARGIN)
        sum(loss(one, one.moe, x) for x in batch).div(world).backward()
        expected.append([p.grad.clone() for p in one.parameters()])
        optimizer.step()
    for how in ("all-reduce", "ddp", "ddp static", "fsdp"):
        model = Model(expert_group, expert_ranks)
        wrapped: Any = model
        if how.startswith("ddp"):
            parallel.ignore_experts_in_ddp(model)
            wrapped = nn.parallel.DistributedDataParallel(model, static_graph=how == "ddp static")
        elif how == "fsdp":
            experts = {p for _, p in parallel.expert_parameters(model)}
            wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params=experts)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2, eps=EPS, foreach=False)
        for step, batch in enumerate(batches):
            optimizer.zero_grad()
            loss(wrapped, model.moe, batch[rank]).backward()
            parallel.average_gradients(model, None, expert_data_group, dense=how == "all-reduce")
            for (name, p), q in zip(model.named_parameters(), expected[step], strict=True):
                assert p.grad is not None, (how, name)
                grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                if ".experts." in name:
                    q = q.chunk(expert_ranks)[model.moe.rank]
                error = relative_rms(grad, q)
                assert error < 1e-5, f"{how}, step {step}: the gradient of {name} is off by {error:.1e}"
            optimizer.step()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
    leave()
