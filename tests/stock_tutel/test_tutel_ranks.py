"""The registered layer over two Gloo processes against the native layer on the tokens of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FP32, GROUP_PATIENCE, make_case, relative_rms, spawn_ranks
from torch import Tensor, nn
from tutel_twin import draw

pytest.importorskip("tutel", reason="stock Tutel is not installed: its README says how")

D, H, RANKS = 16, 20, 2
ACTIVATION = F.gelu


def spawn(function: Any, folder: Path, *arguments: Any) -> list[Any]:
    """Run `function(rank, *arguments)` on each rank; return the results."""
    spawn_ranks(_rank, (str(folder), function, arguments), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _rank(rank: int, folder: str, function: Any, arguments: tuple[Any, ...]) -> None:
    from dynmoe_tutel import tutel_backend

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=GROUP_PATIENCE
    )
    tutel_backend.register()
    result = function(rank, *arguments)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def native(kind: str, slots: int, **options: Any) -> Any:
    activation = F.silu if kind == "llama_ffn" else ACTIVATION
    return make_case(T=24, D=D, H=H, E=slots, kind=kind, activation=activation, **options)


def fill(layer: Any, whole: Any, rank: int) -> None:
    """Copy the rank's part of the native layer's weights; splits a sharded expert's hidden units and output bias."""
    layer.gates.load_state_dict(whole.gates.state_dict())
    layer._num_global_experts.copy_(whole._num_global_experts)
    own, full = dict(layer.experts.named_parameters()), dict(whole.experts.named_parameters())
    with torch.no_grad():
        for name, value in full.items():
            if layer.sharded_count == 1:
                part = value.chunk(RANKS)[rank]
            elif name.startswith("W_"):
                part = value.flatten().chunk(RANKS)[rank]
            else:
                part = value.chunk(RANKS, dim=1)[rank]
            own[name].copy_(part.reshape(own[name].shape))


def exchange(rank: int, kind: str, slots: int, per_device: Any, tokens: list[int], options: dict, call: dict) -> Any:
    from tutel import moe

    case = native(kind, slots, combine_gradient="normalized")
    layer = moe.moe_layer(
        gate_type={"type": "top_any", "max_expert_num": slots},
        experts={
            "type": kind,
            "num_experts_per_device": per_device,
            "hidden_size_per_expert": H,
            "activation_fn": F.silu if kind == "llama_ffn" else ACTIVATION,
        },
        model_dim=D,
        combine_gradient="normalized",
        **options,
    )
    fill(layer, case.layer, rank)
    x = case.x.split(tokens)[rank].clone().requires_grad_()
    y = layer(x, **call)
    y.backward(case.dy.split(tokens)[rank])
    counts = layer.num_local_experts, layer.max_num_local_experts, layer.num_global_experts, layer.layout
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "gradients": gradients, "counts": counts}


def check(ranks: list[Any], kind: str, slots: int, sharded: bool) -> None:
    case = native(kind, slots, combine_gradient="normalized")
    x = case.x.clone().requires_grad_()
    y = case.layer(x)
    y.backward(case.dy)
    assert relative_rms(torch.cat([r["y"] for r in ranks]), y) < FP32
    assert relative_rms(torch.cat([r["x"] for r in ranks]), x.grad) < FP32
    for name, parameter in case.layer.named_parameters():
        parts = [r["gradients"][name] for r in ranks]
        found: Tensor
        if name.startswith("gates."):
            found = torch.stack(parts).sum(dim=0)
        elif not sharded or "W_" in name:
            found = torch.cat(parts)
        else:
            found = torch.cat(parts, dim=1)
        expected = parameter.grad
        assert relative_rms(found.reshape(expected.shape), expected) < 3 * FP32, name


@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
@pytest.mark.parametrize(
    ("options", "call", "tokens"),
    [
        ({}, {}, [12, 12]),
        ({}, {"a2a_ffn_overlap_degree": 2}, [12, 12]),
        ({"use_2dh": True}, {}, [12, 12]),
        ({"parallel_type": "data"}, {"inequivalent_tokens": True}, [20, 4]),
        ({}, {"inequivalent_tokens": True}, [24, 0]),
    ],
    ids=["plain", "overlap", "2dh", "unequal", "a rank without tokens"],
)
def test_experts_over_two_ranks(options: dict, call: dict, tokens: list[int], kind: str, tmp_path: Path) -> None:
    ranks = spawn(exchange, tmp_path, kind, 6, 3, tokens, options, call)
    assert [r["counts"] for r in ranks] == [(3, 3, 6, "padded")] * 2
    check(ranks, kind, 6, sharded=False)


@pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
@pytest.mark.parametrize("parallel_type", ["adaptive:0", "adaptive:1", "adaptive:2"])
@pytest.mark.parametrize("per_device", [-2, 0.5])
def test_a_sharded_expert(per_device: float, parallel_type: str, kind: str, tmp_path: Path) -> None:
    """One expert on two devices."""
    if kind == "llama_ffn" and parallel_type == "adaptive:2":
        with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="r = 2: Tutel's llama_ffn"):
            spawn(exchange, tmp_path, kind, 1, per_device, [12, 12], {"parallel_type": parallel_type}, {})
        return
    ranks = spawn(exchange, tmp_path, kind, 1, per_device, [12, 12], {"parallel_type": parallel_type}, {})
    assert [r["counts"] for r in ranks] == [(1, 1, 1, "padded")] * 2
    check(ranks, kind, 1, sharded=True)


def adapt(rank: int, init: str) -> Any:
    from tutel import moe

    from dynmoe_tutel import ExpertController

    torch.manual_seed(0)
    layer = moe.moe_layer(
        gate_type={"type": "top_any", "max_expert_num": 6},
        experts={"type": "ffn", "num_experts_per_device": 1, "hidden_size_per_expert": H},
        model_dim=D,
        seeds=(1, 10 + rank),
    )
    start = layer.gates[0].experts_mask.clone()
    draw(layer.experts, seed=20 + rank)
    with torch.no_grad():
        layer.gates[0].gates.fill_(0.2)
    before = [p.detach().clone() for p in layer.experts.parameters()]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, weight_decay=0.0)
    controller = ExpertController(layer, optimizer, 1, init=init)
    generator = torch.Generator().manual_seed(5 + rank)
    for step in range(3):
        x = torch.randn(20, D, generator=generator)
        if rank == step % 2:  # this rank has no unrouted token in the window
            x = layer.gates[0].sim_matrix.detach()[:, :1].t() * torch.rand(20, 1, generator=generator)
        optimizer.zero_grad()
        layer(x).sum().backward()
        dist.all_reduce(layer.gates[0].sim_matrix.grad)
        optimizer.step()
        controller.step()
    moments = [optimizer.state[p]["exp_avg"].abs().flatten(1).sum(1) for p in layer.experts.parameters()]
    return {
        "start": start,
        "events": [str(event) for event in controller.events],
        "slots": [event.slot for event in controller.events],
        "mask": layer.gates[0].experts_mask,
        "w": layer.gates[0].sim_matrix.detach(),
        "before": before,
        "after": [p.detach() for p in layer.experts.parameters()],
        "moments": moments[0],
        "counts": (layer.num_local_experts, layer.num_global_experts),
    }


@pytest.mark.parametrize("init", ["nearest", "mean", "fresh", "keep"])
def test_growing_over_two_ranks(init: str, tmp_path: Path) -> None:
    """The same events everywhere, and a slot that grows on one rank gets the expert of another."""
    one, two = spawn(adapt, tmp_path, init)
    assert one["start"].tolist() == two["start"].tolist() == [1, 0, 0, 1, 0, 0]
    assert one["events"] == two["events"] != []
    assert torch.equal(one["mask"], two["mask"])
    assert torch.equal(one["w"], two["w"])
    assert one["counts"][0] + two["counts"][0] == one["counts"][1] == int(one["mask"].sum())
    before, after = ([torch.cat(pair) for pair in zip(one[k], two[k], strict=True)] for k in ("before", "after"))
    first = one["slots"][0]
    for old, new in zip(before, after, strict=True):
        if init == "keep":
            assert torch.equal(old, new)
        elif init == "nearest":
            assert torch.equal(new[first], old[0]) or torch.equal(new[first], old[3])
        elif init == "mean":
            assert torch.allclose(new[first], (old[0] + old[3]) / 2)
        else:
            assert not any(torch.equal(new[first], expert) for expert in old)
        untouched = [slot for slot in range(6) if slot not in one["slots"]]
        assert torch.equal(new[untouched], old[untouched])


def refuse(rank: int) -> Any:
    from tutel import moe

    said = []
    for gate, per_device in (({"max_expert_num": 5}, 1), ({"max_expert_num": 4}, 3), ({}, 1 / 3)):
        try:
            moe.moe_layer(
                gate_type={"type": "top_any", **gate},
                experts={"type": "ffn", "num_experts_per_device": per_device, "hidden_size_per_expert": H},
                model_dim=D,
            )
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_cannot_be_divided(tmp_path: Path) -> None:
    for said in spawn(refuse, tmp_path):
        assert len(said) == 3
        for message, part in zip(said, ("5 slots", "max_expert_num'] = 4", "an expert on 3 devices"), strict=True):
            assert part in message


def swin_block(how: str, gate: dict[str, Any]) -> Any:
    """Attention and a mixture behind layer norms, as Swin-MoE's blocks: batch-prioritised, capacity 1.25, noise."""
    from tutel import moe as stock

    from dynmoe_tutel import moe as own

    torch.manual_seed(0)
    block = nn.ModuleDict({"norm1": nn.LayerNorm(D), "attention": nn.MultiheadAttention(D, 2, batch_first=True)})
    block["norm2"] = nn.LayerNorm(D)
    block["mlp"] = (own if how == "import" else stock).moe_layer(
        gate_type=dict(gate),
        experts={"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": H, "activation_fn": F.gelu},
        model_dim=D,
        scan_expert_func=lambda name, parameter: setattr(parameter, "skip_allreduce", True),
        seeds=(1, dist.get_rank() + 1, dist.get_rank() + 1),
        batch_prioritized_routing=True,
        normalize_gate=False,
        is_gshard_loss=False,
    )
    return block


def train_swin_block(rank: int, how: str, gate: dict[str, Any]) -> Any:
    """The losses of 8 AdamW steps, the first parameters and the last ones."""
    from dynmoe_tutel import tutel_backend

    if how == "stock":
        tutel_backend.unregister()
    block = swin_block(how, gate)
    first = {name: p.detach().clone() for name, p in block.named_parameters()}
    optimizer = torch.optim.AdamW(block.parameters(), 1e-3, foreach=False)
    generator = torch.Generator().manual_seed(5 + rank)
    losses = []
    for step in range(8):
        torch.manual_seed(100 * step + rank)  # of the gate noise
        x = torch.randn(2, 16, D, generator=generator)
        a = block["norm1"](x)
        h = x + block["attention"](a, a, a, need_weights=False)[0]
        y = h + block["mlp"](block["norm2"](h))
        loss = (y - x.roll(1, dims=1)).square().mean() + 0.01 * block["mlp"].l_aux
        optimizer.zero_grad()
        loss.backward()
        for p in block.parameters():
            if not hasattr(p, "skip_allreduce"):
                dist.all_reduce(p.grad)
                p.grad /= RANKS
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "first": first, "last": {n: p.detach() for n, p in block.named_parameters()}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["top", "cosine_top"])
def test_a_swin_like_block_trains_as_with_stock_tutel(kind: str, tmp_path: Path) -> None:
    """Registered: bit for bit. One-line import: the same start weights, and losses equal in 5 digits."""
    gate: dict[str, Any] = {"type": kind, "k": 1, "gate_noise": 1.0, "capacity_factor": 1.25, "fp32_gate": True}
    if kind == "cosine_top":
        gate["proj_dim"] = 8
    results = {}
    for how in ("stock", "registered", "import"):
        (tmp_path / how).mkdir()
        results[how] = spawn(train_swin_block, tmp_path / how, how, gate)
    for stock, registered, own in zip(*results.values(), strict=True):
        assert len({f"{loss:.5g}" for loss in stock["losses"]}) == 8
        assert registered["losses"] == stock["losses"]
        assert [f"{loss:.4e}" for loss in own["losses"]] == [f"{loss:.4e}" for loss in stock["losses"]]
        for name, value in stock["first"].items():
            assert torch.equal(own["first"][name], value), name
            assert torch.equal(registered["last"][name], stock["last"][name]), name
            if name.startswith("mlp."):  # attention's biases of keys have no gradient but rounding
                assert relative_rms(own["last"][name], stock["last"][name]) < 1e-4, name
