"""A divided layer's features besides its forward, and its refusals, inside a rank of a real process group."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FP32, assert_margin, make_case, relative_rms
from ranks import D, E, H, compare, divided, load_block, tokens_of_ranks
from torch import Tensor, nn

from dynmoe_tutel import Decision, ExpertController, MoELayer
from dynmoe_tutel.parallel.collectives import gathered

TOP_ANY = {"type": "top_any", "max_expert_num": E}


class Expert(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))


class Batched(nn.Module):
    """Tutel's kind."""

    def __init__(self, model_dim: int, num_experts_per_device: int) -> None:
        super().__init__()
        self.W = nn.Parameter(0.1 * torch.randn(num_experts_per_device, model_dim, model_dim))

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        return torch.bmm(x, self.W)


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    x, dy = torch.randn(2, 24, D, generator=torch.Generator().manual_seed(seed))
    return x, dy


def pair(gate: Any, experts: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """A divided layer, and the whole one with the same seeds."""
    ranks = dist.get_world_size()
    options = {"seeds": (3, 5), **options}
    layer = MoELayer(gate, D, {**experts, "num_experts_per_device": E // ranks}, group=dist.group.WORLD, **options)
    return layer, MoELayer(gate, D, {**experts, "num_experts_per_device": E}, **options)


def custom_experts() -> None:
    """A list, a class (drawn per slot from the seed; without a seed, differently on every rank), and Tutel's kind."""
    x, dy = batch()
    torch.manual_seed(0)  # the same on all ranks
    modules = [Expert() for _ in range(E)]
    for module in (modules, Expert):
        before = torch.get_rng_state()
        layer, whole = pair(TOP_ANY, {"type": "custom", "module": copy.deepcopy(module)})
        assert torch.equal(torch.get_rng_state(), before)
        own = list(whole.experts.module)[layer.placement.first :][: layer.placement.local]
        for mine, theirs in zip(layer.experts.module, own, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))
        assert_margin(whole, x)
        sizes = tokens_of_ranks(24, "unequal")
        mine = layer(x.split(sizes)[dist.get_rank()])
        y = whole(x)
        assert relative_rms(mine, y.split(sizes)[dist.get_rank()]) < FP32
        mine.backward(dy.split(sizes)[dist.get_rank()]), y.backward(dy)
        for one, other in zip(layer.experts.module, own, strict=True):
            for p, q in zip(one.parameters(), other.parameters(), strict=True):
                assert relative_rms(p.grad, q.grad) < FP32
    layer, _ = pair(TOP_ANY, {"type": "custom", "module": Expert}, seeds=None)
    first = gathered(layer.experts.module[0][0].weight[None], dist.group.WORLD)
    assert not any(torch.equal(first[0], other) for other in first[1:])
    for capacity in ("exact", "full", float(E)):
        layer, whole = pair(TOP_ANY, {"type": "custom", "module": Batched}, capacity=capacity)
        load_block(layer, whole)
        compare(layer, whole, x, dy, tokens_of_ranks(24, "equal"))


def gate_lists() -> None:
    """Each gate of a list, chosen by its index."""
    gates = [TOP_ANY, {"type": "top", "k": 2}, {"type": "gated_multi_gate_t", "max_expert_num": E}]
    layer, whole = pair(gates, {"hidden_size_per_expert": H})
    for index, gate in enumerate(layer.gates):
        x, dy = batch(index)
        assert_margin(whole, x, index)
        sizes, rank = tokens_of_ranks(24, "unequal"), dist.get_rank()
        y, expected = layer(x.split(sizes)[rank], gate_index=index), whole(x, gate_index=index)
        assert relative_rms(y, expected.split(sizes)[rank]) < FP32
        y.backward(dy.split(sizes)[rank]), expected.backward(dy)
        for p, q in zip(gate.parameters(), whole.gates[index].parameters(), strict=True):
            dist.all_reduce(p.grad)
            assert relative_rms(p.grad, q.grad) < 4 * FP32


def masks() -> None:
    """Padding (NaN here) gets no expert and enters no record, in all capacities, in training and eval."""
    case, rank = make_case(T=24, D=D, H=H, E=E), dist.get_rank()
    mask = torch.rand(24, generator=torch.Generator().manual_seed(1)) > 0.4
    x = case.x.masked_fill(~mask.unsqueeze(1), torch.nan)
    sizes = tokens_of_ranks(24, "equal")
    for capacity in ("exact", "full", float(E)):
        layer = divided({"capacity": capacity}, TOP_ANY, "ffn", F.gelu)
        load_block(layer, case.layer)
        for one in (layer, case.layer):
            one.begin_record_routing()
        for training in (True, False):
            y = layer.train(training)(x.split(sizes)[rank], token_mask=mask.split(sizes)[rank])
            expected = case.layer.train(training)(x, token_mask=mask)
            assert relative_rms(y, expected.split(sizes)[rank]) < FP32
        layer.record.all_reduce()
        for name in ("counts", "tokens", "k_histogram", "unrouted_tokens"):
            assert torch.equal(getattr(layer.record, name), getattr(case.layer.record, name))
        case.layer.train()


def modes() -> None:
    """Autocast, accumulation over two forwards, evaluation between forward and backward, reentrant checkpointing."""
    from torch.utils.checkpoint import checkpoint

    case, rank, sizes = make_case(T=24, D=D, H=H, E=E), dist.get_rank(), tokens_of_ranks(24, "unequal")
    layer = divided({}, TOP_ANY, "ffn", F.gelu)
    load_block(layer, case.layer)
    x, dy = case.x.split(sizes)[rank], case.dy.split(sizes)[rank]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), case.layer(case.x)
    assert relative_rms(y, expected.split(sizes)[rank]) < 2e-2
    grads = []
    for between in (False, True):
        layer.zero_grad()
        one, two = layer(x), layer(2 * x)
        if between:
            with torch.no_grad():
                layer.eval()(x), layer.train()
        one.backward(dy), two.backward(dy)
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    layer.zero_grad()
    for part in (x, 2 * x):
        checkpoint(layer, part.clone().requires_grad_(), use_reentrant=True).backward(dy)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(layer.parameters(), grads[0], strict=True))


def capacity_factors() -> None:
    """Tutel's drops count over the group's ranks; an undivided layer communicates with no rank."""
    layer, whole = pair({"type": "top", "k": 2}, {"hidden_size_per_expert": H})
    x, _ = batch(dist.get_rank())
    assert relative_rms(layer(x, capacity_factor=1.0), whole(x, capacity_factor=1.0)) < FP32
    assert 0 < int(layer.dropped_assignments) == int(whole.dropped_assignments)
    if dist.get_rank() == 0:
        whole(x, capacity_factor=-0.5)  # alone, as for an evaluation


def bound_later() -> None:
    """A layer made in one process and divided by `bind` gives the same outputs and gradients with other slots."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    experts = {"hidden_size_per_expert": H, "num_experts_per_device": E // 2, "activation_fn": F.gelu}
    for kind, gate in (
        ({}, TOP_ANY),
        ({"type": "llama_ffn", "activation_fn": F.silu}, TOP_ANY),
        ({"num_experts_per_device": E}, {"type": "top", "k": 2}),
    ):
        whole = MoELayer(gate, D, {**experts, **kind}, seeds=(1, 2))
        layer = MoELayer(gate, D, {**experts, **kind}, seeds=(1 + rank, 2 + rank))  # rank 0's experts are all ranks'
        assert layer.placement.ranks == 1
        layer.bind(dist.group.WORLD)
        assert layer.max_num_local_experts == E // ranks
        assert layer.num_local_experts == whole.num_global_experts // ranks
        assert all(hasattr(parameter, "_tutel_expert") for parameter in layer.experts.parameters())
        x, dy = batch()
        y = whole(x)
        y.backward(dy)
        own = layer(x.chunk(ranks)[rank])
        own.backward(dy.chunk(ranks)[rank])
        assert relative_rms(own, y.chunk(ranks)[rank]) < FP32
        for name in ("sim_matrix", "wg.weight"):
            for one, all_ in zip(layer.gates.named_parameters(), whole.gates.named_parameters(), strict=True):
                if one[0].endswith(name):
                    dist.all_reduce(one[1].grad)
                    norms = [p.grad.norm(dim=0 if name == "sim_matrix" else 1).sort().values for p in (one[1], all_[1])]
                    assert relative_rms(*norms) < 4 * FP32
        size = sum(p.grad.double().square().sum() for p in layer.experts.parameters())
        dist.all_reduce(size)
        assert abs(size / sum(p.grad.double().square().sum() for p in whole.experts.parameters()) - 1) < 1e-5
        assert "divided over" in refusal(lambda: layer.bind(dist.group.WORLD))  # noqa: B023
    ragged = MoELayer(TOP_ANY, D, {**experts, "hidden_size_per_expert": H + rank}, seeds=(1, 2))
    before = [parameter.clone() for parameter in ragged.parameters()]
    assert "bind: tensors = " in refusal(lambda: ragged.bind(dist.group.WORLD))
    assert all(torch.equal(a, b) for a, b in zip(before, ragged.parameters(), strict=True))  # nothing was sent
    unlike = MoELayer(TOP_ANY, D, {**experts, "num_experts_per_device": 1 + rank}, seeds=(1, 2))
    assert "bind: experts at start = " in refusal(lambda: unlike.bind(dist.group.WORLD))
    hooked = MoELayer(TOP_ANY, D, experts, seeds=(1, 2))
    hooked.experts.batched_fc1_w.register_hook(lambda grad: grad)
    assert "experts.batched_fc1_w has hooks" in refusal(lambda: hooked.bind(dist.group.WORLD))
    assert "group = 3: give a process group" in refusal(lambda: unlike.bind(3))
    few = MoELayer({"type": "top_any", "max_expert_num": 1}, D, {"hidden_size_per_expert": H})
    assert f"1 slots cannot be divided over {ranks} ranks" in refusal(lambda: few.bind(dist.group.WORLD))
    pruned = MoELayer(TOP_ANY, D, experts, seeds=(1, 2))
    pruned.begin_record_routing(), pruned(batch()[0]), pruned.end_record_routing()
    if rank == 0:
        pruned.update_experts(Decision(prune=[(slot, "") for slot in range(1, E // 2)]))
    counts = pruned.record.counts.sum()
    pruned.bind(dist.group.WORLD)
    assert pruned.num_global_experts == int(pruned.gates[0].active().sum()) == 1
    assert pruned.record.counts.sum() == counts
    moved = MoELayer(TOP_ANY, D, experts, seeds=(1, 2))
    moved.begin_record_routing(), moved(batch()[0]), moved.end_record_routing()
    moved.bind(dist.group.WORLD)
    assert moved.record.counts.sum() > 0 == moved.record.counts[~moved.gates[0].active()].sum()
    recording = MoELayer(TOP_ANY, D, experts, seeds=(1, 2))
    recording.begin_record_routing()
    assert "a record window is open" in refusal(lambda: recording.bind(dist.group.WORLD))


def equal_tokens() -> None:
    """On every rank, bounded capacities refuse unequal token counts, and the layer still works afterwards."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for capacity in ("full", 1.0):
        layer = divided({"capacity": capacity}, TOP_ANY, "ffn", F.gelu)
        layer(torch.randn(8, D))
        said = refusal(lambda: layer(torch.randn(8 + rank, D)))  # noqa: B023
        assert said.startswith(f"input has {[8 + r for r in range(ranks)]} tokens on the ranks of group: a bounded"), (
            said
        )
        layer(torch.randn(4, D)).sum().backward()


def copies_and_states() -> None:
    """deepcopy keeps the groups; a state dict holds the rank's block and fits no other rank; whole states split."""
    layer = divided({"seeds": (1, 2)}, TOP_ANY, "ffn", F.gelu)
    x = batch()[0].chunk(dist.get_world_size())[dist.get_rank()]
    layer(x).sum().backward()
    other = copy.deepcopy(layer)
    assert other.group is layer.group
    assert torch.equal(other(x), layer(x))
    assert other.wire is not layer.wire
    layer.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, buffer.getvalue())
    state = torch.load(io.BytesIO(states[0]), weights_only=True)
    said = refusal(lambda: layer.load_state_dict(state))
    assert ("nothing was refused" in said) == (dist.get_rank() == 0)
    if dist.get_rank():
        assert f"slots 0 to {layer.placement.local - 1}, and this rank holds slots {layer.placement.first} to" in said
    for experts, start in (
        ({"hidden_size_per_expert": H}, E),
        ({"type": "llama_ffn", "hidden_size_per_expert": H}, E // 2),
        ({"type": "custom", "module": Expert}, E),
        ({"type": "custom", "module": Batched}, E // 2),
    ):
        slots = {"type": "top_any", "max_expert_num": start}  # fewer slots in the state: the missing ones stay inactive
        whole = MoELayer(slots, D, {**experts, "num_experts_per_device": start}, seeds=(7, 8))
        layer, _ = pair(TOP_ANY, experts)
        layer.load_state_dict(whole.state_dict())
        assert layer.num_global_experts == start
        assert_margin(whole, x)
        assert relative_rms(layer(x), whole(x)) < FP32
    assert "this rank holds all slots" in refusal(lambda: whole.load_state_dict(layer.state_dict()))


def keys_of_one_score() -> None:
    """EMoE's avg-k gate has the keys of all ranks' experts."""
    layer, whole = pair({"type": "top", "k": 2}, {"hidden_size_per_expert": H}, one_score_gate=True)
    layer.update_one_score_gate(), whole.update_one_score_gate()
    assert torch.equal(layer.gates[0].wg.weight, whole.gates[0].wg.weight)


def a_rank_without_tokens_and_degrees() -> None:
    """One rank never gets a token while the controller grows; a call's overlap persists; text is refused."""
    torch.manual_seed(dist.get_rank())
    layer = divided({"seeds": (1, 2)}, {"type": "top_any", "max_expert_num": 2 * E}, "ffn", F.gelu)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    controller = ExpertController(layer, optimizer, schedule=2, max_new_experts=3)
    for _ in range(4):
        optimizer.zero_grad()
        x = -F.normalize(layer.gates[0].sim_matrix.detach(), dim=0).sum(dim=1).expand(24, D)  # away from every expert
        layer(x[: 0 if dist.get_rank() else 24], a2a_ffn_overlap_degree=2).sum().backward()
        optimizer.step()
        controller.step()
    events: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(events, [str(event) for event in controller.events])
    assert events[0]
    assert all(other == events[0] for other in events)
    assert layer.a2a_ffn_overlap_degree == 2
    assert "a2a_ffn_overlap_degree = '2'" in refusal(lambda: layer(x, a2a_ffn_overlap_degree="2"))


def unlike_layers() -> None:
    """If ranks build different layers, all of them raise."""
    width = H + (dist.get_rank() == 1)
    said = refusal(lambda: pair(TOP_ANY, {"hidden_size_per_expert": width}))
    assert "'hidden_size_per_expert': 21" in said
    assert "on rank 1 of group" in said


CHECKS = (
    custom_experts,
    gate_lists,
    masks,
    modes,
    capacity_factors,
    bound_later,
    equal_tokens,
    copies_and_states,
    keys_of_one_score,
    a_rank_without_tokens_and_degrees,
    unlike_layers,
)
