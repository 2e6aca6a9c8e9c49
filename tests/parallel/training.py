"""One job, the same on any number of ranks: a model, global batches with wide margins, a step, and the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import TRAINED_MARGIN, assert_margin
from torch import Tensor, nn

from dynmoe_tutel import ExpertController, MoELayer
from dynmoe_tutel.checkpoint import distributed

D, H, SLOTS, ACTIVE, EVERY, STEPS = 8, 6, 8, 4, 8, 20


class Net(nn.Module):
    def __init__(self, group: Any, slots: int = SLOTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        group = group or dist.group.WORLD
        self.mlp = MoELayer(
            {"type": "top_any", "max_expert_num": slots},
            D,
            {
                "type": "ffn",
                "num_experts_per_device": ACTIVE // group.size(),
                "hidden_size_per_expert": H,
                "activation_fn": nn.functional.gelu,
            },
            group=group,
            seeds=(0, 0),
        )
        self.head = nn.Linear(D, D)
        with torch.no_grad():
            self.mlp.gates[0].sim_matrix.copy_(torch.eye(D)[:, [0, 1, 2, 4, 3, 5, 6, 7][:slots]])
            self.mlp.gates[0].gates.fill_(0.5)
            # The same on any number of ranks, most of them on the first: the load drifts, and of the free slots the
            # lowest, 3, is not on the least loaded rank.
            self.mlp.gates[0].experts_mask.zero_()[[0, 1, 2, slots // 2]] = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mlp(x))


def global_batch(step: int) -> Tensor:
    """32 tokens: the last eight are unrouted in the first window, the last four in the second, with none near axis 3.

    Every token points away from axes 5 and 6 if it is not near them: an expert grown there (G = 0) decides clearly.
    """
    axes = [0, 0, 1, 2, 1, 3, 5, 5] if step < EVERY else [0, 0, 1, 2, 1, 2, 5, 6]
    generator = torch.Generator().manual_seed(step)
    centre_DD = torch.eye(D)
    centre_DD[:, 5:7] -= 0.3 * (1 - centre_DD[:, 5:7])
    return centre_DD[axes].repeat_interleave(4, 0) + 0.05 * torch.randn(32, D, generator=generator)


class Job:
    """Training on all ranks, experts divided over `group` (None: all), replicated over `replicas` (None: not)."""

    def __init__(self, group: Any = None, replicas: Any = None, **options: Any) -> None:
        self.model, self.replicas, self.step = Net(group), replicas, 0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, eps=1e-4)
        self.controller = ExpertController(self.model, self.optimizer, EVERY, **options)

    def train(self, until: int) -> Job:
        world, rank = dist.get_world_size(), dist.get_rank()
        experts = {id(p) for p in self.model.mlp.experts.parameters()}
        for step in range(self.step, until):
            batch = global_batch(step)
            x = batch.chunk(world)[rank]
            assert_margin(self.model.mlp, batch, least=TRAINED_MARGIN)
            y = self.model(x)
            loss = (y - x.roll(1, dims=1)).square().sum() / batch.numel() + 0.01 * self.model.mlp.l_aux / world
            self.optimizer.zero_grad()
            loss.backward()
            for parameter in self.model.parameters():
                if id(parameter) not in experts:
                    dist.all_reduce(parameter.grad)
                elif self.replicas is not None:
                    dist.all_reduce(parameter.grad, group=self.replicas)
            self.optimizer.step()
            self.controller.step()
        self.step = until
        return self

    def save(self, folder: Path) -> None:
        extra = {"step": self.step, "note": ("any", 1.5, None)}
        mine = {"rank": dist.get_rank()}
        distributed.save(folder, self.model, self.optimizer, self.controller, extra=extra, rank_state=mine)

    def load(self, folder: Path) -> distributed.Restored:
        restored = distributed.load(folder, self.model, self.optimizer, self.controller)
        self.step = restored.extra["step"]
        return restored

    def state(self) -> dict[str, Any]:
        """The rank's whole state."""
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**states, "controller": self.controller.state_dict()}

    def result(self) -> dict[str, Any]:
        """Results that depend neither on the experts' slots nor on the number of ranks."""
        output = self.model.eval()(global_batch(99).chunk(dist.get_world_size())[dist.get_rank()])
        self.model.train()
        gate = self.model.mlp.gates[0]
        record = self.model.mlp.record
        totals = torch.cat([record.unrouted_sum, record.unrouted_norm[None], record.tokens[None].float()])
        dist.all_reduce(totals)
        return {
            "output": gathered(output.detach()),
            "events": [(e.step, e.action, e.reason, e.experts) for e in self.controller.events],
            "slots": [(e.slot, e.action) for e in self.controller.events],
            "active": int(gate.active().sum()),
            "totals": totals,
        }


def gathered(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
