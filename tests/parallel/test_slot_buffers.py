"""Buffers of an expert travel with its slot, in one process and between ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import ranks
import slot_buffers
import torch
import torch.distributed as dist
from helpers import GROUP_PATIENCE, spawn_ranks
from slot_buffers import KINDS, E, Normed, layer_of, local_state, marked, same, slot_state
from torch import nn

from dynmoe_tutel import ExpertController, MoELayer
from dynmoe_tutel.checkpoint import distributed

D = slot_buffers.D


@pytest.mark.parametrize("processes", [2, 4])
def test_between_ranks(processes: int, tmp_path: Path) -> None:
    spawn_ranks(ranks.run, (processes, str(tmp_path), slot_buffers.CHECKS), processes)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_copy_is_exact_and_a_mean_is_a_mean(kind: str) -> None:
    layer, before = marked(kind), marked(kind)
    layer.experts.copy_slot(5, [1])  # type: ignore[operator]
    layer.experts.copy_slot(2, [0, 3])  # type: ignore[operator]
    assert same(slot_state(layer, 5), slot_state(before, 1))
    assert len(slot_state(layer, 5)) == {"modules": 7, "batched": 4}[kind]
    for found, first, second in zip(
        *(slot_state(a, s) for a, s in ((layer, 2), (before, 0), (before, 3))), strict=True
    ):
        expected = torch.stack([first, second]).double().mean(0).to(found.dtype)
        assert torch.allclose(found, expected)
    for slot in (0, 1, 3, 4, 6, 7):
        assert same(slot_state(layer, slot), slot_state(before, slot))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("init", ["nearest", "mean"])
def test_a_grown_expert_computes_what_its_sources_say(kind: str, init: str) -> None:
    layer = marked(kind).train()
    controller = ExpertController(layer, torch.optim.SGD(layer.parameters(), lr=0.01), schedule=3, init=init)
    x = torch.randn(200, D)
    with torch.no_grad():
        layer.gates[0].gates.fill_(0.3)  # type: ignore[union-attr,operator]
    grown = []
    for _ in range(3):
        layer(x).square().mean().backward()
        before = copy.deepcopy(layer)
        grown += [event.slot for event in controller.step() if event.action == "grown"]
    assert grown
    sources = before.gates[0].active().nonzero().flatten().tolist()  # type: ignore[operator]
    of_sources = [slot_state(before, source) for source in sources]
    if init == "nearest":
        assert any(same(slot_state(layer, grown[0]), source) for source in of_sources)
    else:
        for i, found in enumerate(slot_state(layer, grown[0])):
            mean = torch.stack([source[i] for source in of_sources]).double().mean(0).to(found.dtype)
            assert torch.allclose(found, mean, atol=1e-6)


def test_a_fresh_expert_has_fresh_statistics() -> None:
    layer = marked("modules")
    layer.experts.reset_slot(2, torch.Generator().manual_seed(1))  # type: ignore[operator]
    norm: Any = layer.experts.module[2][1]  # type: ignore[union-attr,index]
    assert (norm.running_mean.tolist(), int(norm.num_batches_tracked)) == ([0.0] * D, 0)


def test_statistics_without_weights_are_fresh_too() -> None:
    class Plain(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(D, D), nn.BatchNorm1d(D, affine=False))

    experts = {"type": "custom", "module": Plain, "num_experts_per_device": 3}
    layer = MoELayer({"type": "top_any", "max_expert_num": E}, D, experts, seeds=(1, 2))
    layer(torch.randn(200, D) + 3)
    layer.experts.reset_slot(0, torch.Generator().manual_seed(1))  # type: ignore[operator]
    assert layer.experts.module[0][1].running_mean.tolist() == [0.0] * D  # type: ignore[union-attr,index]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("first", [0, 4])
def test_a_block_keeps_its_buffers(kind: str, first: int) -> None:
    layer, whole = marked(kind), marked(kind)
    layer.experts.keep_slots(first, 4)  # type: ignore[operator]
    for slot in range(4):
        assert same(local_state(layer.experts, slot), slot_state(whole, first + slot))
    persistent = {name for name in layer.experts.state_dict() if "frozen" in name}
    assert not persistent


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_state_dict_of_other_slots_brings_them(kind: str) -> None:
    saved = marked(kind)
    experts = {"type": "custom", "module": KINDS[kind], "num_experts_per_device": 3}
    larger = MoELayer({"type": "top_any", "max_expert_num": 12}, D, experts, seeds=(4, 5)).eval()
    larger.load_state_dict(saved.state_dict())
    x = torch.randn(40, D)
    assert torch.equal(larger(x), saved(x))


def test_a_distributed_checkpoint_brings_them(tmp_path: Path) -> None:
    """Saved on two ranks, loaded on two and on one."""
    spawn_ranks(_save, (str(tmp_path),), 2)
    whole, expected = layer_of("batched", None), marked("batched")
    distributed.load(tmp_path / "saved", whole)
    for name, tensor in expected.state_dict().items():
        if not name.startswith(("gates", "_")):
            assert torch.equal(tensor, whole.state_dict()[name]), name


def _save(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=GROUP_PATIENCE)
    layer, other = marked("batched", dist.group.WORLD, 2), layer_of("batched", dist.group.WORLD, 2)
    distributed.save(Path(folder) / "saved", layer)
    distributed.load(Path(folder) / "saved", other)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    dist.barrier()
    dist.destroy_process_group()


def test_modules_count_their_own_statistics() -> None:
    """Each slot has statistics of its own rows."""
    layer = layer_of("modules", None)
    layer(torch.randn(300, D))
    means = [expert[1].running_mean for expert in layer.experts.module]  # type: ignore[union-attr,index]
    assert isinstance(layer.experts.module[0], Normed)  # type: ignore[union-attr,index]
    assert not torch.equal(means[0], means[1])
