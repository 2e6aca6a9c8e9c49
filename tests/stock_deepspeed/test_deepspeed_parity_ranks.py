"""Two ranks that divide the experts of a `MoE` compute what one holds; checkpoints of upstream's engine load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_jobs import WITHOUT, D, E, batches, config_of, engine_of, launch, model_of, train
from helpers import FP32, relative_rms
from torch import Tensor, nn

pytestmark = WITHOUT
STEM = "deepspeed_moe.experts.deepspeed_experts."


def moe(ep_size: int) -> Any:
    """A layer with all slots active, its experts unlike, in its group."""
    from dynmoe_tutel.deepspeed import MoE

    torch.manual_seed(0)
    layer = MoE(D, nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)), E, ep_size, -1, max_expert_num=E, use_residual=True)
    layer.set_deepspeed_parallelism()
    return layer


def different_experts(layer: Any) -> dict[str, Tensor]:
    """The state of a layer that holds all slots, with random numbers in its experts."""
    generator = torch.Generator().manual_seed(4)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator) if "expert" in name else value
        for name, value in layer.state_dict().items()
    }


def computed(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """Output, loss, counts and gradients; of experts by the slot's number among all."""
    x = x.clone().requires_grad_()
    output, l_aux, counts = layer(x)
    (output.square().sum() + l_aux).backward()
    first, found = layer.deepspeed_moe.placement.first, {"y": output, "l_aux": l_aux, "counts": counts, "x": x.grad}
    for name, parameter in layer.named_parameters():
        if name.startswith(STEM):
            slot, _, rest = name.removeprefix(STEM).partition(".")
            name = f"{STEM}{int(slot) + first}.{rest}"
        if parameter.grad is not None:
            found[name] = parameter.grad
    return {name: value.detach() for name, value in found.items()}


def divided(rank: int, kind: str) -> list[str]:
    """What differs between a divided layer and a whole one on the same tokens."""
    whole, part = moe(1), moe(2)
    state = different_experts(whole)
    whole.load_state_dict(state)
    part.load_state_dict(state)  # of all slots: each rank takes its own
    x = torch.randn(9 + rank, D, generator=torch.Generator().manual_seed(rank))
    if kind == "one rank without assignments" and rank == 1:
        x = -whole.deepspeed_moe.gate.wg.sim_matrix.detach().sum(dim=1).expand(4, D)
    own, want = computed(part, x), computed(whole, x)
    assert bool(want["counts"].sum()) == (kind == "random" or rank == 0)
    assert len([name for name in own if name.startswith(STEM)]) * 2 == len([n for n in want if n.startswith(STEM)])
    for name in sorted(want):
        if name.startswith(STEM):  # tokens of both ranks reach an expert
            dist.all_reduce(want[name])
    return [name for name, value in own.items() if not relative_rms(value.double(), want[name]) < FP32]


def loads_upstreams(rank: int, folder: str, ep_size: int) -> None:
    """The main file of upstream's engine has `experts_mask`, and none of its files a state of the adaptive process."""
    trained = engine_of(model_of(ep_size=ep_size, residual=True), config_of(1))
    train(trained, batches(rank, 3))
    mask = torch.tensor([0.0, 1.0, 1.0, 1.0])
    trained.module.moe.deepspeed_moe.gate.wg.experts_mask.copy_(mask)
    trained.save_checkpoint(folder, tag="upstream")
    dist.barrier()
    if rank == 0:
        path = f"{folder}/upstream/mp_rank_00_model_states.pt"
        saved = torch.load(path, weights_only=False)
        saved["module"]["moe.deepspeed_moe.gate.wg.experts_mask"] = saved["module"].pop(
            "moe.deepspeed_moe.gate.wg.active"
        )
        saved.pop("dynmoe_tutel", None)
        torch.save(saved, path)
    dist.barrier()
    loaded = engine_of(model_of(ep_size=ep_size, residual=True), config_of(1))
    path, _ = loaded.load_checkpoint(folder, tag="upstream")
    assert path is not None
    assert loaded.module.moe.deepspeed_moe.gate.wg.experts_mask.tolist() == mask.tolist()
    first, second = trained.module.state_dict(), loaded.module.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert train(trained, batches(rank, 2, seed=1)) == train(loaded, batches(rank, 2, seed=1))


def all_checks(rank: int, folder: str) -> dict[str, Any]:
    kinds = ("random", "one rank without assignments")
    found: dict[str, Any] = {kind: divided(rank, kind) for kind in kinds}
    for ep_size in (1, 2):
        loads_upstreams(rank, f"{folder}/{ep_size}", ep_size)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    check: Callable[..., Any] = all_checks
    return launch(check, folder, 2, str(folder))


@pytest.mark.parametrize("kind", ["random", "one rank without assignments"])
def test_divided_experts_compute_what_one_process_does(results: list[dict[str, Any]], kind: str) -> None:
    assert [found[kind] for found in results] == [[], []]
