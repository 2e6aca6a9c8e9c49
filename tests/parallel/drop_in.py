"""`moe.moe_layer` without a group on several ranks, as Tutel's scripts call it; `test_drop_in` starts these checks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FP32, assert_margin, relative_rms
from ranks import D, E, H
from torch import Tensor, nn

from dynmoe_tutel import MoELayer, moe
from dynmoe_tutel.convert import convert
from dynmoe_tutel.parallel.placement import Placement

STEPS, TOKENS = 8, 24
GATES: tuple[dict[str, Any], ...] = (
    {"type": "top_any", "max_expert_num": 2 * E},
    {"type": "top", "k": 2},
    {"type": "cosine_top", "k": 2, "proj_dim": 8},
)


def experts(count: int) -> dict[str, Any]:
    return {"type": "ffn", "num_experts_per_device": count, "hidden_size_per_expert": H, "activation_fn": F.gelu}


def layer_of(gate: dict[str, Any], cls: Any = moe.moe_layer, count: int | None = None, **options: Any) -> Any:
    """A layer of E experts over all ranks; `count` experts on each rank at start."""
    count = E // dist.get_world_size() if count is None else count
    return cls(gate, D, experts(count), **{"seeds": (1, 2), **options})


def own_part(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def alike(tensor: Tensor) -> bool:
    """Whether it is bitwise equal on all ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach())
    return all(torch.equal(part, parts[0]) for part in parts)


def no_group_is_all_ranks() -> None:
    """Bitwise a `MoELayer` over all ranks: state, outputs, gradients; and Tutel's numbers for scripts."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for gate in GATES:
        layer, named = layer_of(gate), layer_of(gate, MoELayer, group=dist.group.WORLD)
        positional = moe.moe_layer(gate, D, experts(E // ranks), None, None, None, (1, 2))
        x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(rank))
        outputs = []
        for each in (layer, named, positional):
            y = each(x)
            (y.square().mean() + y.l_aux).backward()
            outputs.append(y)
        for each, y in ((named, outputs[1]), (positional, outputs[2])):
            assert torch.equal(outputs[0], y)
            for (name, a), b in zip(layer.named_parameters(), each.parameters(), strict=True):
                assert torch.equal(a, b), name
                assert torch.equal(a.grad, b.grad), name
        assert layer.state_dict().keys() == named.state_dict().keys()
        assert (layer.world_size, layer.num_local_experts, layer.num_global_experts) == (ranks, E // ranks, E)
        assert layer.global_expert_count(E // ranks) == E
        assert layer.group is dist.group.WORLD
        assert (layer.valid_rs, layer.adaptive_degree) == ([0, 1], 1)
        for r in layer.valid_rs:
            assert torch.equal(layer(x, adaptive_r=r), outputs[0])
    k = ranks * 2 + 3  # above the experts of all ranks, not of one
    assert layer_of({"type": "top", "k": k}, count=2).gates[0].top_k == ranks * 2


def unlike_seeds_are_each_ranks_own() -> None:
    """Tutel's examples give `seeds=(1, rank + 1, 1)`: each rank draws its experts from its own seed, slot by slot."""
    rank, local = dist.get_rank(), E // dist.get_world_size()
    for layer in (layer_of(GATES[1], seeds=(1, rank + 1, None)), layer_of(GATES[1], seeds=(1, rank + 1))):
        for drawn in range(2):
            torch.manual_seed(rank + 1)
            for slot in range(local):
                up, down = nn.Linear(D, H), nn.Linear(H, D)
                assert torch.equal(layer.experts.batched_fc1_w[slot], up.weight), drawn
                assert torch.equal(layer.experts.batched_fc2_w[slot], down.weight.t()), drawn
            torch.manual_seed(1)
            assert torch.equal(layer.gates[0].wg.weight, nn.Linear(D, E, bias=False).weight)
            layer.reset_parameters()
    layer = layer_of(GATES[1], seeds=(None, rank + 1))
    layer.reset_parameters()
    assert alike(layer.gates[0].wg.weight)
    said = refused(lambda: layer_of(GATES[1], seeds=(1, rank if rank else None)), ValueError)
    assert "seeds of the experts are [None, 1" in said


def ddp_users_hold_them_all() -> None:
    """`MoELayer` and `convert` keep every expert in each process, and so does a group of this process alone."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    gate = GATES[0]
    whole, given = layer_of(gate, MoELayer, E), layer_of(gate, group=alone, count=E)
    x = torch.randn(dist.get_rank() + 3, D)
    assert torch.equal(whole(x), given(x))
    model = nn.Sequential(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)))
    convert(model, "all", gate_type="top_any", num_experts=2)
    for layer in (whole, given, next(m for m in model.modules() if isinstance(m, moe.MOELayer))):
        assert (layer.wire, layer.world_size, layer.num_local_experts) == (None, 1, layer.num_global_experts)


def a_script_trains_like_one_process() -> None:
    """8 steps of Tutel's loop: it marks expert parameters, sums the others' gradients, and knows of no group."""
    for gate in GATES:
        losses: dict[str, list[float]] = {}
        models: dict[str, nn.Module] = {}
        for how in ("ranks", "one process"):
            torch.manual_seed(3)  # the same on all ranks, as in scripts
            cls, count = (moe.moe_layer, None) if how == "ranks" else (MoELayer, E)
            marked: list[str] = []

            def mark(name: str, parameter: nn.Parameter, marked: list[str] = marked) -> None:
                parameter.skip_allreduce = True  # type: ignore[attr-defined]
                marked.append(name)

            layer = layer_of(gate, cls, count, scan_expert_func=mark)
            with torch.no_grad():
                if gate["type"] == "top_any":
                    layer.gates[0].experts_mask.copy_(torch.arange(2 * E) % 2 == 0)
            model = nn.Sequential(nn.Linear(D, D), layer, nn.Linear(D, 1))
            assert marked == [name for name, _ in layer.experts.named_parameters()]
            unmarked = {n for n, p in model.named_parameters() if not hasattr(p, "skip_allreduce")}
            assert unmarked == {n for n, _ in model.named_parameters() if not n.startswith("1.experts.")}
            losses[how], models[how] = trained(model, whole=how == "one process"), model
        assert relative_rms(torch.tensor(losses["ranks"]), torch.tensor(losses["one process"])) < 1e-5, gate
        assert len({f"{loss:.5g}" for loss in losses["ranks"]}) > STEPS // 2, losses
        for (name, p), q in zip(models["ranks"].named_parameters(), models["one process"].parameters(), strict=True):
            if name.startswith("1.experts."):
                q = own_part(q)
            else:
                assert alike(p), name
            assert relative_rms(p, q) < 1e-5, name


def trained(model: nn.Module, whole: bool) -> list[float]:
    """The mean losses of the steps, over all tokens."""
    ranks, losses = dist.get_world_size(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(step))
        if model[1].gates[0].adaptive and whole:  # type: ignore[index, union-attr, operator]
            assert_margin(model[1], model[0](x), least=20 * FP32)  # type: ignore[index, operator]
        x = x if whole else own_part(x)
        loss = (model(x).squeeze(1) - x[:, 0] * x[:, 1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            if whole:
                continue
            p.grad /= ranks  # the loss is a mean over this rank's tokens
            if not hasattr(p, "skip_allreduce"):
                dist.all_reduce(p.grad)
        optimizer.step()
        if not whole:
            dist.all_reduce(loss := loss.detach() / ranks)
        losses.append(loss.item())
    return losses


def refused(action: Callable[[], Any], kind: type[Exception]) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was refused")


def what_cannot_be_divided_says_what_to_do() -> None:
    ranks = dist.get_world_size()
    said = refused(lambda: layer_of({"type": "top_any", "max_expert_num": 2 * ranks + 1}, count=1), ValueError)
    assert f"max_expert_num'] = {2 * ranks + 1} slots cannot be divided over the {ranks} ranks" in said
    assert f"give a multiple of {ranks} " in said
    assert "and dynmoe_tutel.MoELayer holds all slots in each process" in said
    said = refused(lambda: layer_of({"type": "top_any", "max_expert_num": 2 * ranks}, count=3), ValueError)
    assert f"{2 * ranks} is less than the {3 * ranks} experts at start (num_experts_per_device, summed over the" in said


def copies() -> None:
    """deepcopy and pickle: the copy computes the same over the same ranks, and a file goes back to its rank alone."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layer = layer_of(GATES[0])
    layer.experts.activation_fn = F.gelu
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(rank))
    layer.begin_record_routing()
    y = layer(x)
    (y.sum() + y.l_aux).backward()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert type(other) is moe.MOELayer
        assert torch.equal(other(x), layer(x))
        assert other.group is layer.group
        assert other.wire is not layer.wire
        assert all(p._tutel_expert for p in other.experts.parameters())
    files: list[Any] = [None] * ranks
    dist.all_gather_object(files, pickle.dumps(layer))
    said = refused(lambda: pickle.loads(files[(rank + 1) % ranks]), RuntimeError)
    assert f"that of rank {(rank + 1) % ranks} of {ranks}, and this is rank {rank} of {ranks}" in said
    some = dist.new_group(list(range(ranks)))  # as many ranks, but not the group that every process has
    said = refused(lambda: pickle.dumps(layer_of(GATES[0], group=some)), TypeError)
    assert "cannot be pickled: save its state_dict()" in said
    assert pickle.loads(pickle.dumps(Placement(6))) == Placement(6)


CHECKS = (
    no_group_is_all_ranks,
    unlike_seeds_are_each_ranks_own,
    ddp_users_hold_them_all,
    a_script_trains_like_one_process,
    what_cannot_be_divided_says_what_to_do,
    copies,
)
