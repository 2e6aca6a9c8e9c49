"""Checks of averaged and clipped gradients inside a rank; `test_gradients` and `test_gradient_norm` start them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from features import refusal
from helpers import TRAINED_MARGIN, assert_margin, relative_rms
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dynmoe_tutel import MoELayer, parallel
from dynmoe_tutel.parallel.placement import Placement

D, H, E, T, STEPS = 8, 12, 8, 6, 20
TOP_ANY = {"type": "top_any", "max_expert_num": E}


class Net(nn.Module):
    """Dense, MoE, and one of four heads; experts divided over `group`."""

    def __init__(self, group: Any = None, gates: Any = TOP_ANY, activation: Any = F.gelu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(D, D)
        self.heads = nn.ModuleList(nn.Linear(D, 1) for _ in range(4))
        ranks = 1 if group is None else dist.get_world_size(group)
        experts = {"num_experts_per_device": E // ranks, "hidden_size_per_expert": H, "activation_fn": activation}
        self.moe = MoELayer(gates, D, experts, group=group, seeds=(1, 2))

    def forward(self, x: Tensor, head: int = 0, gate: int = 0) -> Tensor:
        x = self.first(x)
        return self.heads[head](x + self.moe(x, gate_index=gate))


def loss(model: nn.Module, moe: Any, x: Tensor, **call: int) -> Tensor:
    return 20 * (model(x, **call) - 3).square().mean() + 0.01 * moe.l_aux


def batches(steps: int) -> Tensor:
    """[steps, ranks, T, D]"""
    return torch.randn(steps, dist.get_world_size(), T, D, generator=torch.Generator().manual_seed(8))


def replicated(model: Any) -> list[Tensor]:
    experts = {id(p) for _, p in parallel.expert_parameters(model)}
    return [p.detach() for p in model.parameters() if id(p) not in experts]


def equal_on_ranks(tensor: Tensor, group: Any = None) -> bool:
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, tensor.contiguous(), group=group)
    return all(torch.equal(others[0], other) for other in others)


def trained(
    model: Any,
    calls: list[dict[str, int]],
    *,
    wrapped: Any = None,
    copies: Any = None,
    max_norm: float = 1.0,
    gates: Any = TOP_ANY,
    activations: Any = (F.gelu, F.gelu),
) -> None:
    """STEPS steps of SGD beside one process, which clips the gradient of the mean loss by torch's function.

    Each rank calls the model with its own of `calls`.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    one = Net(gates=gates, activation=activations[1])
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.02, momentum=0.5) for m in (model, one))
    clipped = 0
    for batch in batches(STEPS):
        ours.zero_grad(), theirs.zero_grad()
        for x, call in zip(batch, calls, strict=True):
            assert_margin(one.moe, one.first(x), call.get("gate", 0), TRAINED_MARGIN / 10)
            loss(one, one.moe, x, **call).div(ranks).backward()
        loss(wrapped or model, model.moe, batch[rank], **calls[rank]).backward()
        parallel.average_gradients(model, None, copies, dense=wrapped is None)
        for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
        expected = torch.nn.utils.clip_grad_norm_(one.parameters(), max_norm)
        read = parallel.grad_norm(model)
        norm = parallel.clip_grad_norm_(model, max_norm)
        assert torch.equal(read, norm)
        assert relative_rms(norm, expected) < 1e-4
        clipped += bool(norm > max_norm)
        ours.step(), theirs.step()
    assert clipped > 0
    for (name, p), q in zip(model.named_parameters(), one.named_parameters(), strict=True):
        full = q[1] if p.shape == q[1].shape else q[1].chunk(model.moe.world_size)[model.moe.rank]
        assert relative_rms(p, full) < 1e-3, name
    assert all(equal_on_ranks(p) for p in replicated(model))
    if copies is not None:
        assert all(equal_on_ranks(p.detach(), copies) for _, p in parallel.expert_parameters(model))


def mesh() -> tuple[Any, Any]:
    """The groups that divide experts over two ranks, and their copies."""
    both = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "experts"))
    return both["experts"].get_group(), both["data"].get_group()


# of average_gradients


def different_heads() -> None:
    """Each rank trains another head: heads without a gradient get zeros, unless no rank has one."""
    ranks = dist.get_world_size()
    calls = [{"head": rank % 3} for rank in range(ranks)]
    model = Net(dist.group.WORLD)
    trained(model, calls)
    assert model.heads[3].weight.grad is None


def gates_of_a_list() -> None:
    """Ranks route by different gates of a list in the same forward."""
    gates = [TOP_ANY, {"type": "gated_multi_gate_t", "max_expert_num": E}]
    calls = [{"gate": rank % 2} for rank in range(dist.get_world_size())]
    trained(Net(dist.group.WORLD, gates), calls, gates=gates)


def a_slope_that_all_experts_share() -> None:
    """The parameter of an activation is on every rank: it is averaged as the dense ones are, and stays one."""
    slopes = [nn.PReLU(init=0.3) for _ in range(2)]
    model = Net(dist.group.WORLD, activation=slopes[0])
    assert not any(p is slopes[0].weight for _, p in parallel.expert_parameters(model))
    trained(model, [{}] * dist.get_world_size(), activations=slopes)
    assert float(slopes[0].weight.detach()) != 0.3


def heads_under_ddp() -> None:
    """DDP averages what is replicated, with unused heads on each rank; buffers of experts stay a rank's own."""
    model = Net(dist.group.WORLD)
    model.moe.experts.register_buffer("own", torch.full((1,), float(dist.get_rank())))
    parallel.ignore_experts_in_ddp(model)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    ranks = dist.get_world_size()
    trained(model, [{"head": rank % 2} for rank in range(ranks)], wrapped=wrapped)
    assert model.moe.experts.own == dist.get_rank()


def only_some_parameters() -> None:
    """`parameters=` leaves the others alone."""
    model = Net(dist.group.WORLD)
    loss(model, model.moe, batches(1)[0, dist.get_rank()]).backward()
    before = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    parallel.average_gradients(model, parameters=model.first.parameters())
    of_first = {id(p) for p in model.first.parameters()}
    for p, old in zip(model.parameters(), before, strict=True):
        assert (old is None) == (p.grad is None)
        assert old is None or torch.equal(p.grad, old) == (id(p) not in of_first)


def sparse_gradients() -> None:
    """Refused by name on every rank, also where one rank alone has one."""
    table = nn.Embedding(5, D, sparse=True)
    model = nn.Sequential(table, Net(dist.group.WORLD))
    if dist.get_rank() == 0:
        table(torch.tensor([1, 1])).sum().backward()
    assert "the gradient of 0.weight is sparse" in refusal(lambda: parallel.average_gradients(model))
    table(torch.tensor([1])).sum().backward()
    assert "the gradient of 0.weight is sparse" in refusal(lambda: parallel.grad_norm(model))
    assert "the gradient of 0.weight is sparse" in refusal(lambda: parallel.clip_grad_norm_(model, 1.0))


def wrong_groups() -> None:
    """An `expert_data_group` that is not of the experts' copies is refused, before anything is summed."""
    ranks = dist.get_world_size()
    whole = Net(dist.group.WORLD)
    average = parallel.average_gradients
    said = refusal(lambda: average(whole, None, dist.group.WORLD))
    assert f"expert_data_group has {ranks} ranks, and no expert has as many copies in group: leave it out" in said
    if ranks == 2:
        return
    experts_of, copies = mesh()
    pairs = Net(experts_of)
    said = refusal(lambda: average(pairs))
    assert f"expert_data_group is None, and divided experts have copies on {ranks // 2} ranks" in said
    said = refusal(lambda: average(pairs, None, dist.group.WORLD))
    assert f"expert_data_group has {ranks} ranks, and no expert has as many copies" in said
    both = nn.Sequential(pairs, whole)
    average(both, None, copies)
    average(both, None, copies, parameters=whole.parameters())
    assert "expert_data_group is None" in refusal(lambda: average(both))
    assert "group has 2 ranks, and a layer's experts are divided over 4" in refusal(lambda: average(whole, copies))
    average(pairs, experts_of)  # the mean over two ranks has no copies


# of grad_norm and clip_grad_norm_


def clipped_replicas() -> None:
    """Replicated weights stay bitwise equal, and the norm is that of one process, each expert once."""
    trained(Net(dist.group.WORLD), [{}] * dist.get_world_size())


def copies_of_experts() -> None:
    """Pairs of ranks that divide the experts: a copy on another pair does not count again. Also a layer over all."""
    experts_of, copies = mesh()
    if dist.get_world_size() == 2:
        copies = None
    trained(Net(experts_of), [{}] * dist.get_world_size(), copies=copies)
    model = nn.Sequential(Net(experts_of).moe, Net(dist.group.WORLD).moe)
    model(batches(1)[0, dist.get_rank()]).square().sum().backward()
    one = nn.Sequential(Net().moe, Net().moe)
    one(batches(1)[0].flatten(end_dim=1)).square().sum().div(dist.get_world_size()).backward()
    parallel.average_gradients(model, None, copies)
    expected = torch.nn.utils.get_total_norm([p.grad for p in one.parameters()])
    assert relative_rms(parallel.grad_norm(model), expected) < 1e-5


def kinds_of_norm() -> None:
    """p of 1, 2, 3 and inf, one by one or together; inf as the limit changes nothing."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for power in (1, 2.0, 3, math.inf, "inf"):
        for foreach in (None, False, True):
            model, one = Net(dist.group.WORLD), Net()
            for x in batches(1)[0]:
                loss(one, one.moe, x).div(ranks).backward()
            loss(model, model.moe, batches(1)[0, rank]).backward()
            parallel.average_gradients(model)
            before = model.first.weight.grad.clone()
            norm = parallel.clip_grad_norm_(model, math.inf, power, foreach=foreach)
            assert torch.equal(model.first.weight.grad, before)
            assert torch.equal(norm, parallel.clip_grad_norm_(model, 0.5, power, foreach=foreach))
            expected = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5, power, foreach=foreach)
            assert relative_rms(norm, expected) < 1e-5
            assert relative_rms(model.first.weight.grad, one.first.weight.grad) < 1e-5
            of_experts = one.moe.experts.batched_fc1_w.grad.chunk(ranks)[rank]
            assert relative_rms(model.moe.experts.batched_fc1_w.grad, of_experts) < 1e-5
            assert equal_on_ranks(norm)


def infinite_gradients() -> None:
    """One rank's expert has an inf: every rank sees it, raises if asked to, and goes on afterwards."""
    model = Net(dist.group.WORLD)
    loss(model, model.moe, batches(1)[0, dist.get_rank()]).backward()
    parallel.average_gradients(model)
    if dist.get_rank() == 1:
        model.moe.experts.batched_fc1_w.grad.view(-1)[0] = math.inf
    assert parallel.grad_norm(model).isinf()
    with pytest.raises(RuntimeError, match="the norm of order 2 of the gradients is inf"):
        parallel.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    parallel.clip_grad_norm_(model, math.inf)
    assert model.first.weight.grad.isfinite().all()


def low_precision() -> None:
    """bf16 gradients are summed in float32, and replicas stay bitwise equal."""
    model = Net(dist.group.WORLD).bfloat16()
    for batch in batches(3):
        model.zero_grad()
        loss(model, model.moe, batch[dist.get_rank()].bfloat16()).backward()
        parallel.average_gradients(model)
        experts = {id(p) for _, p in parallel.expert_parameters(model)}
        squares = [torch.zeros((), dtype=torch.double) for _ in range(2)]
        for p in model.parameters():
            if p.grad is not None:
                squares[id(p) in experts] += p.grad.double().square().sum()
        dist.all_reduce(squares[1])
        norm = parallel.clip_grad_norm_(model, 1.0)
        assert norm.dtype == torch.float32
        assert relative_rms(norm, (squares[0] + squares[1]).sqrt()) < 1e-6
        assert parallel.grad_norm(model) < 1.01
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
    assert all(equal_on_ranks(p.float()) for p in replicated(model))


def slices_of_one_expert() -> None:
    """Ranks that share a slot hold slices of it (Tutel's adaptive_r): each slice counts once."""
    ranks, rank = dist.get_world_size(), dist.get_rank()

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.placement = Placement.over(1, dist.group.WORLD)
            self.experts, self.gate = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    layer = Sliced()
    assert layer.placement.shards == ranks
    layer.gate.weight.grad = torch.full((2, 2), 2.0)
    layer.experts.weight.grad = torch.full((2, 2), 1.0 + rank)
    expected = (16 + sum(4 * (1 + other) ** 2 for other in range(ranks))) ** 0.5
    assert relative_rms(parallel.grad_norm(layer), expected) < 1e-6


def one_rank_without_gradients() -> None:
    """A rank whose parameters have no gradient takes part, and the norm there has the same bits."""
    model = Net(dist.group.WORLD)
    if dist.get_rank() == 0:
        model.first.weight.grad = torch.full((D, D), 2.0)
    norm = parallel.clip_grad_norm_(model, 1.0)
    assert norm == 2 * D
    assert equal_on_ranks(norm)


def sharded_dense_weights() -> None:
    """FSDP2 shards what is not an expert: the norm is that of whole gradients, and clipping scales all."""
    from torch.distributed.fsdp import fully_shard

    ranks, rank, x = dist.get_world_size(), dist.get_rank(), batches(1)[0]
    model, one = Net(dist.group.WORLD), Net()
    experts = {p for _, p in parallel.expert_parameters(model)}
    model.heads = model.heads[:1]
    wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)), ignored_params=experts)
    for part in x:
        loss(one, one.moe, part).div(ranks).backward()
    loss(wrapped, model.moe, x[rank]).backward()
    parallel.average_gradients(model, dense=False)
    norm = parallel.clip_grad_norm_(model, 1.0)
    assert relative_rms(norm, torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)) < 1e-5
    assert relative_rms(model.first.weight.grad.full_tensor(), one.first.weight.grad) < 1e-5
    of_experts = one.moe.experts.batched_fc1_w.grad.chunk(ranks)[rank]
    assert relative_rms(model.moe.experts.batched_fc1_w.grad, of_experts) < 1e-5


def shared_overflow() -> None:
    """torch's ShardedGradScaler: an overflow in one rank's expert skips the step and halves the scale on all."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    model, scaler = Net(dist.group.WORLD), ShardedGradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step, overflow in enumerate((False, True, False)):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss(model, model.moe, batches(3)[step, dist.get_rank()])).backward()
        parallel.average_gradients(model)
        if overflow and dist.get_rank() == 1:
            model.moe.experts.batched_fc1_w.grad.view(-1)[0] = math.inf
        scaler.unscale_(optimizer)
        norm = parallel.clip_grad_norm_(model, 1.0)
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert all(same) if overflow else not all(same)
        assert bool(norm.isfinite()) != overflow
    assert scaler.get_scale() == 512
    assert all(equal_on_ranks(p) for p in replicated(model))


AVERAGES: tuple[Callable[[], None], ...] = (
    different_heads,
    a_slope_that_all_experts_share,
    gates_of_a_list,
    heads_under_ddp,
    only_some_parameters,
    sparse_gradients,
    wrong_groups,
)
NORMS: tuple[Callable[[], None], ...] = (
    clipped_replicas,
    copies_of_experts,
    kinds_of_norm,
    infinite_gradients,
    low_precision,
    slices_of_one_expert,
    one_rank_without_gradients,
    sharded_dense_weights,
    shared_overflow,
)
