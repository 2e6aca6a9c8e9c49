"""A job in which one rank raises or is killed in its second forward; each rank logs its last words."""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist
from helpers import GROUP_PATIENCE

from dynmoe_tutel import MoELayer


def main(rank: int, ranks: int, store: str, lost: int, end: str) -> None:
    dist.init_process_group("gloo", store, rank=rank, world_size=ranks, timeout=GROUP_PATIENCE)
    gate = {"type": "top_any", "max_expert_num": 2 * ranks}
    layer = MoELayer(gate, 8, {"num_experts_per_device": 2, "hidden_size_per_expert": 8}, group=dist.group.WORLD)
    layer(torch.randn(4, 8)).sum().backward()
    if rank == lost:
        if end == "kill":
            layer.experts.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        else:
            raise ValueError("a bad batch")
    layer(torch.randn(4, 8)).sum().backward()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
