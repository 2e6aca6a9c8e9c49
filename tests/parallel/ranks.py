"""Checks that run inside a rank of a real process group; `test_expert_parallel` starts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FP32, GROUP_PATIENCE, assert_margin, make_case, relative_rms
from torch import Tensor

from dynmoe_tutel import MoELayer
from dynmoe_tutel.capacity import bounded_pairs
from dynmoe_tutel.parallel.rank_exchange import _Blocks

D, H, E = 16, 20, 8


def run(rank: int, ranks: int, folder: str, checks: Sequence[Callable[[], None]]) -> None:
    """Run `checks` on one rank, over a file store."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=GROUP_PATIENCE
    )
    for check in checks:
        try:
            check()
        except Exception as error:
            raise AssertionError(f"{check.__name__} on rank {rank}: {error!r}") from error
    dist.barrier()
    dist.destroy_process_group()


def load_block(layer: Any, whole: Any) -> None:
    """Load the whole layer's gates and this rank's block of its experts."""
    layer.gates.load_state_dict(whole.gates.state_dict())
    layer._num_global_experts.copy_(whole._num_global_experts)
    with torch.no_grad():
        for own, full in zip(layer.experts.parameters(), whole.experts.parameters(), strict=True):
            own.copy_(full.chunk(layer.world_size)[layer.rank])


def divided(whole_options: dict[str, Any], gate: Any, kind: str, activation: Any, slots: int = E) -> Any:
    experts = {"type": kind, "hidden_size_per_expert": H, "activation_fn": activation}
    count = slots // dist.get_world_size()
    return MoELayer(gate, D, {**experts, "num_experts_per_device": count}, group=dist.group.WORLD, **whole_options)


def tokens_of_ranks(T: int, how: str) -> list[int]:
    R = dist.get_world_size()
    if how == "equal":
        return [T // R] * R
    if how == "empty":
        return [0] * (R - 1) + [T]
    few = [i + 1 for i in range(1, R)]
    return [T - sum(few), *few]


def compare(
    layer: Any, whole: Any, x: Tensor, dy: Tensor, sizes: list[int], tolerance: float = FP32, **call: Any
) -> None:
    """Compare output and gradients of tokens, gates (summed over ranks) and experts with one process."""
    rank = dist.get_rank()
    assert_margin(whole, x)
    full = x.clone().requires_grad_()
    y_full = whole(full, **call)
    y_full.backward(dy)
    own = x.split(sizes)[rank].clone().requires_grad_()
    y = layer(own, **call)
    assert relative_rms(y, y_full.split(sizes)[rank]) < tolerance
    y.backward(dy.split(sizes)[rank])
    assert relative_rms(own.grad, full.grad.split(sizes)[rank]) < tolerance
    for (name, p), q in zip(layer.gates.named_parameters(), whole.gates.parameters(), strict=True):
        assert p.grad is not None, name
        dist.all_reduce(p.grad)
        assert relative_rms(p.grad, q.grad) < 4 * tolerance, name
    for (name, p), q in zip(layer.experts.named_parameters(), whole.experts.parameters(), strict=True):
        assert p.grad is not None, name
        assert relative_rms(p.grad, q.grad.chunk(layer.world_size)[layer.rank]) < tolerance, name
    layer.zero_grad(), whole.zero_grad()


def top_any() -> None:
    """Kinds, activations, combine gradients, training and eval, unequal and empty ranks, pruned ranks, chunks."""
    for kind, activation, mode, how, degree, active, training in (
        ("ffn", F.gelu, "mean", "equal", 1, None, True),
        ("ffn", F.gelu, "normalized", "unequal", 3, None, True),
        ("llama_ffn", F.silu, "normalized", "unequal", 2, None, True),
        ("ffn", torch.tanh, "mean", "empty", 2, None, True),
        ("ffn", F.gelu, "normalized", "empty", 1, [0, 1], True),  # every other rank is pruned
        ("ffn", F.relu, "mean", "unequal", 1, None, False),
    ):
        case = make_case(T=24, D=D, H=H, E=E, kind=kind, activation=activation, active=active, combine_gradient=mode)
        gate = {"type": "top_any", "max_expert_num": E}
        options = {"combine_gradient": mode, "a2a_ffn_overlap_degree": degree}
        layer = divided(options, gate, kind, activation)
        load_block(layer, case.layer)
        layer.train(training), case.layer.train(training)
        compare(layer, case.layer, case.x, case.dy, tokens_of_ranks(24, how))


def against_oracle() -> None:
    """Outputs and all gradients against the executable specification."""
    case = make_case(T=16, D=D, H=H, E=E, combine_gradient="normalized")
    layer = divided({"combine_gradient": "normalized"}, {"type": "top_any", "max_expert_num": E}, "ffn", F.gelu)
    load_block(layer, case.layer)
    sizes = tokens_of_ranks(16, "equal")
    rank, x = dist.get_rank(), case.x.split(sizes)[dist.get_rank()].clone().requires_grad_()
    y = layer(x)
    y.backward(case.dy.split(sizes)[rank])
    assert relative_rms(y, case.expected_output(True).split(sizes)[rank]) < FP32
    expected = case.expected_gradients(True, "normalized")
    assert relative_rms(x.grad, expected["x"].split(sizes)[rank]) < FP32
    for name, p in layer.gates.named_parameters():
        dist.all_reduce(p.grad)
        assert relative_rms(p.grad, expected[f"gates.{name}"]) < 4 * FP32, name
    for name, p in layer.experts.named_parameters():
        assert relative_rms(p.grad, expected[f"experts.{name}"].chunk(layer.world_size)[rank]) < FP32, name


def fixed_k() -> None:
    """Combine weights travel with the rows; equal seeds give the same layer on any number of ranks."""
    for how, capacity in (("unequal", "exact"), ("equal", "full")):
        gate, options = {"type": "top", "k": 3}, {"seeds": (3, 5), "capacity": capacity}
        layer = divided(options, gate, "ffn", F.gelu)
        whole = MoELayer(
            gate,
            D,
            {"type": "ffn", "hidden_size_per_expert": H, "activation_fn": F.gelu, "num_experts_per_device": E},
            **options,
        )
        for own, full in zip(layer.experts.parameters(), whole.experts.parameters(), strict=True):
            assert torch.equal(own, full.chunk(layer.world_size)[layer.rank])
        generator = torch.Generator().manual_seed(1)
        x, dy = torch.randn(2, 24, D, generator=generator)
        compare(layer, whole, x, dy, tokens_of_ranks(24, how))


def no_token_routed() -> None:
    """One rank's tokens are all unrouted, the others' routed: no deadlock, zeros and gradients everywhere."""
    layer = divided({"seeds": (1, 2)}, {"type": "top_any", "max_expert_num": E}, "ffn", F.gelu)
    x = layer.gates[0].sim_matrix.detach().t().sum(dim=0).expand(4, D).clone()
    if dist.get_rank() == 0:
        x = -x
    y = layer(x)  # no token requires a gradient
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert bool(y.any()) == (dist.get_rank() != 0)
    layer.gates.requires_grad_(False)
    again = layer(x.clone().requires_grad_(dist.get_rank() == 0))  # on one rank only
    again.sum().backward()
    assert torch.equal(again, y)


def bounded() -> None:
    """Enough room changes nothing; with little, each pair keeps its best assignments and the rest are counted."""
    case = make_case(T=24, D=D, H=H, E=E, combine_gradient="mean")
    gate, sizes = {"type": "top_any", "max_expert_num": E}, tokens_of_ranks(24, "equal")
    for capacity in (float(E), "full"):
        layer = divided({"capacity": capacity}, gate, "ffn", F.gelu)
        load_block(layer, case.layer)
        compare(layer, case.layer, case.x, case.dy, sizes)
        assert int(layer.dropped_assignments) == 0
    layer = divided({"capacity": 1.0}, gate, "ffn", F.gelu)
    load_block(layer, case.layer)
    x, R = case.x.split(sizes)[dist.get_rank()], dist.get_world_size()
    routing = layer.gates[0](x)
    kept = bounded_pairs(routing, R, 1.0)
    room = -(-len(x) // R)
    margin_TE, expected = routing.scores - routing.thresholds, 0
    for a, before, margin in zip(
        *(t.chunk(R, dim=1) for t in (kept.assigned, routing.assigned, margin_TE)), strict=True
    ):
        assert int(a.sum()) == min(int(before.sum()), room)
        if (before & ~a).any():
            assert margin[before & ~a].max() <= margin[a].min()
        expected += int(before.sum()) - int(a.sum())
    y = layer(x)
    assert 0 < expected <= int(layer.dropped_assignments)
    assert (kept.k_per_token == kept.assigned.sum(dim=1)).all()
    y.sum().backward()


def precisions_and_checkpointing() -> None:
    """bf16 and fp64 rows; recomputed forwards; autocast."""
    from torch.utils.checkpoint import checkpoint

    gate = {"type": "top_any", "max_expert_num": E}
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float64, 1e-13)):
        case = make_case(T=24, D=D, H=H, E=E, dtype=dtype)
        layer = divided({}, gate, "ffn", F.gelu).to(dtype)
        load_block(layer, case.layer)
        compare(layer, case.layer, case.x, case.dy, tokens_of_ranks(24, "unequal"), tolerance)
    case = make_case(T=24, D=D, H=H, E=E)
    layer = divided({"a2a_ffn_overlap_degree": 2}, gate, "ffn", F.gelu)
    load_block(layer, case.layer)
    x = case.x.split(tokens_of_ranks(24, "unequal"))[dist.get_rank()].clone().requires_grad_()
    grads = []
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        grads.append(torch.autograd.grad(forward(x).square().sum(), [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_rms(layer(x), layer(x).detach()) == 0


def traffic() -> None:
    """Bytes by hand: counts, bitmasks, rows, partial sums; the backward has the same rows and one number per pair."""
    case = make_case(T=24, D=D, H=H, E=E)
    layer = divided({}, {"type": "top_any", "max_expert_num": E}, "ffn", F.gelu)
    load_block(layer, case.layer)
    R, rank, sizes = dist.get_world_size(), dist.get_rank(), tokens_of_ranks(24, "equal")
    blocks = [layer.gates[0](x).assigned.view(len(x), R, E // R) for x in case.x.split(sizes)]
    rows = torch.stack([b.any(dim=2).sum(dim=0) for b in blocks]).fill_diagonal_(0)
    assignments = torch.stack([b.sum(dim=(0, 2)) for b in blocks]).fill_diagonal_(0)
    layer(case.x.split(sizes)[rank]).sum().backward()
    out, back = int(rows[rank].sum()), int(rows[:, rank].sum())
    found = layer.wire.traffic
    assert found.forward_bytes == 8 * (R - 1) + out * (8 + 4 * D) + back * 4 * D
    assert found.backward_bytes == (out + back) * 4 * D + 4 * int(assignments[:, rank].sum())
    assert found.rows == out


def slots() -> None:
    """Copies across ranks are exact, a drawn slot equals one process's, and a rank holds no other rank's parameters."""
    gate = {"type": "top_any", "max_expert_num": E}
    layer = divided({"seeds": (3, 5)}, gate, "ffn", F.gelu)
    whole = MoELayer(gate, D, {"type": "ffn", "hidden_size_per_expert": H, "num_experts_per_device": E}, seeds=(3, 5))
    for a in (layer, whole):
        a.expert_slots.copy_slot(E - 1, [0])
        a.expert_slots.copy_slot(1, [0, E - 2])
        generator = torch.Generator().manual_seed(7)
        a.expert_slots.reset_slot(E - 3, generator)
        a.expert_slots.reset_slot(2, generator)
    for own, full in zip(layer.experts.parameters(), whole.experts.parameters(), strict=True):
        assert torch.equal(own, full.chunk(layer.world_size)[layer.rank])
    held = [bool(layer.expert_slots.slot_parameters(slot)) for slot in range(E)]
    assert held == [slot // layer.placement.local == layer.rank for slot in range(E)]
    torch.manual_seed(dist.get_rank())  # without seeds, all ranks get the first one's gates, and different experts
    layer = divided({}, {"type": "top_any", "max_expert_num": 2 * E}, "ffn", F.gelu)
    w = layer.gates[0].sim_matrix.detach().clone()
    dist.broadcast(w, 0)
    assert torch.equal(w, layer.gates[0].sim_matrix)
    active = layer.gates[0].active().view(layer.world_size, -1)
    assert (active.sum(dim=1) == E // layer.world_size).all()
    assert layer.num_local_experts == E // layer.world_size


def blocks() -> None:
    """Pack to equal blocks and unpack."""
    x = torch.arange(1.0, 7.0)
    layout = _Blocks(torch.tensor([2, 0, 3]), 2 + 1)
    padded = torch.cat([x[:5], torch.zeros(4)])
    assert layout.spread(padded).tolist() == [1, 2, 0, 0, 0, 0, 3, 4, 5]
    assert layout.pack(layout.spread(padded)).tolist() == padded.tolist()


CHECKS = (
    blocks,
    top_any,
    against_oracle,
    fixed_k,
    no_token_routed,
    bounded,
    precisions_and_checkpointing,
    traffic,
    slots,
)
