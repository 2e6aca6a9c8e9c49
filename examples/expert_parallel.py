"""Train a layer whose experts are divided over the processes of a job.

Run: torchrun --nproc_per_node=2 examples/expert_parallel.py
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist

from dynmoe_tutel import ExpertController, moe, parallel

STEPS, DIM = 40, 32


def main() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layer = moe.moe_layer(
        gate_type={"type": "top_any", "max_expert_num": 4 * ranks},
        experts={"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 64, "activation_fn": "gelu"},
        model_dim=DIM,
        group=dist.group.WORLD,  # each rank holds its block of the slots
        seeds=(0, 0),
    )
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    controller = ExpertController(layer, optimizer, schedule={"every": 10})
    generator = torch.Generator().manual_seed(rank)  # every rank has tokens of its own
    for step in range(1, STEPS + 1):
        x = torch.randn(256, DIM, generator=generator)
        y = layer(x)
        loss = (y - x.roll(1, dims=1)).square().mean()
        optimizer.zero_grad()
        (loss + 0.01 * y.l_aux).backward()
        parallel.average_gradients(layer, None, None)  # all ranks share the router; each expert is on one rank
        parallel.clip_grad_norm_(layer, 1.0)  # torch's function would see one rank's experts, and routers would drift
        optimizer.step()
        for event in controller.step():  # the same events on every rank
            if rank == 0:
                print(event)
        if step % 20 == 0:
            dist.all_reduce(loss := loss.detach())
            if rank == 0:
                print(f"step {step}: loss {loss / ranks:.3f}")
    router = layer.gates[0].sim_matrix.detach()
    routers = [torch.empty_like(router) for _ in range(ranks)]
    dist.all_gather(routers, router)
    held = [None] * ranks
    dist.all_gather_object(held, layer.num_local_experts)
    if rank == 0:
        print("experts by rank:", *held)
        print("routers are equal on all ranks:", all(torch.equal(router, other) for other in routers))


if __name__ == "__main__":
    dist.init_process_group("gloo")  # on GPUs "nccl", after torch.cuda.set_device
    main()
    gc.collect()  # frees what still holds the group: torch with Gloo may abort at exit otherwise
    dist.barrier()
    dist.destroy_process_group()
