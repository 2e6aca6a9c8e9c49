"""`dynmoe-tutel run` on two ranks, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from helpers import outputs
from script_case import COMMAND, write

from dynmoe_tutel import tutel_stand_in

if tutel_stand_in.tutel_is_importable():
    pytest.skip("Tutel is installed: its own tests run scripts with it", allow_module_level=True)

RANKS = """
import torch
from tutel import net, system
env = system.init_data_model_parallel(backend="gloo")
total = net.simple_all_reduce(torch.tensor([env.global_rank + 1.0]))
system.get_local_session().dist_print("sum", total.item(), "of", env.global_size)
"""


DIVIDED = """
import gc
import torch
import torch.distributed as dist
from tutel import moe as tutel_moe
from tutel.impls.moe_layer import MOELayer

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()


def main():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), tutel_moe.moe_layer(
        gate_type={"type": "gated_multi_gate", "max_expert_num": 6},
        experts={"type": "ffn", "count_per_node": 2, "hidden_size_per_expert": 32,
                 "activation_fn": lambda x: torch.nn.functional.gelu(x)},
        model_dim=16, scan_expert_func=lambda name, param: setattr(param, "skip_allreduce", True)))
    assert isinstance(model[1], MOELayer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)  # tokens of its own
    for step in range(8):
        x = torch.randn(64, 8, generator=generator)
        y = model(x)
        loss = (y[:, :8] - x).square().mean() + 0.01 * model[1].l_aux
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            if not hasattr(p, "skip_allreduce"):
                dist.all_reduce(p.grad)
                p.grad /= ranks
        optimizer.step()
    different = []
    for name, p in model.named_parameters():
        of_ranks = [torch.empty_like(p) for _ in range(ranks)]
        dist.all_gather(of_ranks, p.detach())
        if not all(torch.equal(p, other) for other in of_ranks):
            different.append(name)
            assert p.skip_allreduce, name
    marked = [name for name, p in model.named_parameters() if hasattr(p, "skip_allreduce")]
    assert different == marked == [f"1.experts.{name}" for name, _ in model[1].experts.named_parameters()]
    if rank == 0:
        print(ranks, "ranks:", model[1].num_local_experts, "of", model[1].num_global_experts, "experts,",
              list(model[1].experts.batched_fc1_w.shape), flush=True)


main()
gc.collect()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [(RANKS, "sum 3.0 of 2\n"), (DIVIDED, "2 ranks: 2 of 4 experts, [3, 32, 16]\n")],
    ids=["collectives", "layer"],
)
def test_two_ranks(code: str, said: str, tmp_path: Path) -> None:
    """As torchrun starts them: `torchrun -m dynmoe_tutel run SCRIPT`."""
    script = write(tmp_path, code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [*COMMAND, str(script)],
            env={**where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    output = outputs(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], output
    assert [out for out, _ in output] == [said, ""]
