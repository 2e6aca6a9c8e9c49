"""Experts with running statistics, and resets, on real ranks; `test_slot_buffers` starts the checks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_tutel import ExpertController, MoELayer
from dynmoe_tutel.adaptive.policy import Decision

D, E, START = 8, 8, 4


class Normed(nn.Sequential):
    """A module a slot, with statistics and a count of batches."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(D, D), nn.BatchNorm1d(D))


class Batched(nn.Module):
    """Tutel's kind, with statistics of all slots, one tensor without persistence, and integers."""

    def __init__(self, num_experts_per_device: int) -> None:
        super().__init__()
        n = num_experts_per_device
        self.w = nn.Parameter(torch.randn(n, D, D))
        self.register_buffer("shift", torch.zeros(n, D))
        self.register_buffer("calls", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("frozen", torch.zeros(n, 2, dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        return torch.bmm(x, self.w) + self.shift.unsqueeze(1) * (1 + self.calls.view(-1, 1, 1))


KINDS: dict[str, Any] = {"modules": Normed, "batched": Batched}


def layer_of(kind: str, group: Any, ranks: int = 1) -> MoELayer:
    experts = {"type": "custom", "module": KINDS[kind], "num_experts_per_device": START // ranks}
    gate = {"type": "top_any", "max_expert_num": E}
    return MoELayer(gate, D, experts, group=group, seeds=(1, 2))


def local_state(experts: Any, slot: int) -> list[Tensor]:
    """Views of all parameters and buffers of a slot of this rank."""
    if isinstance(experts.module, nn.ModuleList):
        expert = experts.module[slot]
        return [tensor.detach() for tensor in (*expert.parameters(), *expert.buffers())]
    return [tensor.detach()[slot] for tensor in (*experts.parameters(), *experts.buffers())]


def slot_state(layer: Any, slot: int) -> list[Tensor]:
    """The same for a slot of all; nothing if another rank holds it."""
    place = layer.placement
    return local_state(layer.experts, slot % place.local) if slot // place.local == place.rank else []


def mark_slots(layer: Any) -> None:
    """Give every slot values of its own, in parameters and buffers, the same on any number of ranks."""
    for slot in range(layer.slots):
        for i, tensor in enumerate(slot_state(layer, slot)):
            generator = torch.Generator().manual_seed(100 * slot + i)
            if tensor.is_floating_point():
                tensor.copy_(0.1 + torch.rand(tensor.shape, generator=generator))
            else:
                most = 2 if tensor.dtype == torch.bool else 9
                tensor.copy_(torch.randint(0, most, tensor.shape, generator=generator))


def marked(kind: str, group: Any = None, ranks: int = 1) -> MoELayer:
    layer = layer_of(kind, group, ranks)
    mark_slots(layer)
    return layer.eval()


def all_slots(layer: Any) -> list[list[Tensor]]:
    """Every slot's state, gathered from the ranks that hold it."""
    own = {slot: [t.clone() for t in slot_state(layer, slot)] for slot in range(layer.slots)}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, {slot: state for slot, state in own.items() if state})
    found = {slot: state for rank in of_ranks for slot, state in rank.items()}
    return [found[slot] for slot in range(layer.slots)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def copies() -> None:
    """Across ranks, exact and as a mean, as in one process; the buffers go along."""
    for kind in KINDS:
        layer, whole = marked(kind, dist.group.WORLD, dist.get_world_size()), marked(kind)
        for each in (layer, whole):
            each.expert_slots.copy_slot(E - 1, [0])
            each.expert_slots.copy_slot(1, [0, E - 2])
        found = all_slots(layer)
        assert same(found[E - 1], found[0]), kind
        for slot in range(E):
            assert same(found[slot], slot_state(whole, slot)), (kind, slot)


def moves() -> None:
    """Rebalancing does not change the output; every moved slot has its buffers."""
    for kind in KINDS:
        layer = marked(kind, dist.group.WORLD, dist.get_world_size())
        gate: Any = layer.gates[0]
        with torch.no_grad():  # expert e takes axis e; most tokens are on the first axes
            gate.sim_matrix.copy_(torch.eye(D))
            gate.gates.fill_(0.5)
            gate.experts_mask.fill_(1)
        layer._num_global_experts.fill_(E)
        optimizer = torch.optim.Adam(layer.parameters())
        controller = ExpertController(layer, optimizer, schedule=1, policy=lambda *_: Decision())
        x = torch.eye(D)[[0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7]]
        x = x.repeat(3, 1) + 0.01 * torch.randn(36, D, generator=torch.Generator().manual_seed(0))
        layer.train()
        layer(x).sum().backward()
        optimizer.step()
        controller.step()
        layer.eval()
        before, slots = layer(x), all_slots(layer)
        moved = controller.rebalance(1.05).layers[0].moves
        assert moved, kind
        after = all_slots(layer)
        for move in moved:
            assert same(after[move.to_slot], slots[move.slot]), (kind, move)
        assert torch.allclose(layer(x), before, atol=1e-5), kind


def bound_later() -> None:
    """`bind` permutes and divides buffers too, and a reset then gives each rank its slots' bits."""
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(3))
    for kind in KINDS:
        layer, whole = marked(kind), marked(kind)
        layer.bind(dist.group.WORLD)
        assert torch.allclose(layer(x), whole(x), atol=1e-5), kind
        block = [tensor.shape[0] for tensor in layer.experts.buffers() if tensor.dim() > 1]
        assert kind == "modules" or set(block) == {E // dist.get_world_size()}
        assert len(slot_state(layer, layer.placement.first)) == len(slot_state(whole, 0))


def resets() -> None:
    """On each rank, bitwise the block of one process's layer; without seeds all ranks still agree on the gates."""
    ranks, gate = dist.get_world_size(), {"type": "top_any", "max_expert_num": E}
    mlp = {"hidden_size_per_expert": 6}
    for experts in (mlp, {"type": "llama_ffn", **mlp}, {"type": "custom", "module": Normed}):
        torch.manual_seed(dist.get_rank())
        layer, unseeded = (
            MoELayer(gate, D, {**experts, "num_experts_per_device": 1}, group=dist.group.WORLD, seeds=seeds)
            for seeds in ((1, 2), None)
        )
        made = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        later = MoELayer(gate, D, {**experts, "num_experts_per_device": 3}, seeds=(1, 2) if dist.get_rank() else None)
        later.bind(dist.group.WORLD)
        for each in (layer, unseeded, later):
            for tensor in (*each.parameters(), *each.buffers()):
                tensor.detach().fill_(7)
            each.reset_parameters()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, made[name]), name
        assert later.num_global_experts == int(later.gates[0].active().sum()) == 3  # type: ignore[operator]
        assert unseeded.num_global_experts == ranks
        gates: list[Any] = [None] * ranks
        dist.all_gather_object(gates, unseeded.gates.state_dict())
        assert all(torch.equal(gates[0][name], other[name]) for other in gates for name in gates[0])


CHECKS = (copies, moves, bound_later, resets)
