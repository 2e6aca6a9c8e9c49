"""Trainings by DeepSpeed's engine on ranks of their own, which the tests beside start. Only ranks import DeepSpeed."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import GROUP_PATIENCE, spawn_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import MoELayer

WITHOUT = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'dynmoe_tutel[deepspeed]'",
)
D, E, TOKENS = 16, 4, 24
BF16 = {"bf16": {"enabled": True}}
COPIED = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}  # with ZeRO 1: BF16_Optimizer


def launch(function: Callable[..., Any], folder: Path, ranks: int = 2, *arguments: Any) -> list[Any]:
    """Run `function(rank, *arguments)` on each rank, with DeepSpeed over Gloo; its results by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn_ranks(_run, (ranks, str(folder), port, function, arguments), ranks)
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run(rank: int, ranks: int, folder: str, port: int, function: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=GROUP_PATIENCE
    )
    import deepspeed
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ for minutes
    logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    torch.save(function(rank, *arguments), f"{folder}/result{rank}.pt")
    dist.barrier()


class Expert(nn.Module):
    """An expert of two layers, for DeepSpeed's MoE."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Linear, MoE with a residual connection, Linear; its output is the loss with the auxiliary loss in it."""

    def __init__(self, ep_size: int | None = None, residual: bool = False, recompute: bool | None = None) -> None:
        """A native layer where `ep_size` is None. `recompute`: checkpointing, reentrant or not."""
        super().__init__()
        self.recompute = recompute
        self.inner, self.outer = nn.Linear(8, D), nn.Linear(D, 3)
        if ep_size is None:
            self.moe: nn.Module = MoELayer(
                {"type": "top_any", "max_expert_num": E},
                D,
                {"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 8, "activation_fn": F.gelu},
                seeds=(1, 2),
            )
        else:
            from dynmoe_tutel.deepspeed.moe.layer import MoE

            self.moe = MoE(D, Expert(), 2, ep_size, k=-1, use_residual=residual, max_expert_num=E)

    @property
    def layer(self) -> Any:
        return getattr(self.moe, "deepspeed_moe", self.moe)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden = self.inner(x)
        if self.recompute is None:
            y, l_aux = self._mixed(hidden)
        else:
            y, l_aux = checkpoint(self._mixed, hidden, use_reentrant=self.recompute)
        return F.cross_entropy(self.outer(hidden + y).float(), target) + 0.01 * l_aux

    def _mixed(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        found = self.moe(hidden)
        if not isinstance(found, Tensor):
            return found[:2]
        return found, getattr(found, "l_aux", self.moe.l_aux)  # ZeRO 3 wraps the output anew


def model_of(**options: Any) -> Model:
    """Always the same weights: those of the experts do not depend on how they are divided."""
    torch.manual_seed(1)
    model = Model(**options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "wg" not in name and ".gates." not in name and "deepspeed_experts" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for expert in getattr(model.layer.experts, "deepspeed_experts", ()):
            for number, parameter in enumerate(expert.parameters()):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model


def config_of(stage: int = 0, adaptive: Any = None, **options: Any) -> dict[str, Any]:
    """DeepSpeed's config; `adaptive` are the options of the controller."""
    base = {
        "train_micro_batch_size_per_gpu": TOKENS,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    return {**base, **({} if adaptive is None else {"dynmoe": adaptive}), **options}


def engine_of(model: nn.Module, config: dict[str, Any], optimizer: type = torch.optim.Adam, lr: float = 1e-2) -> Any:
    from dynmoe_tutel.deepspeed import initialize

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return initialize(model=model, optimizer=optimizer(trained, lr=lr), config=config)[0]


def batches(rank: int, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 * seed + 7 + rank)
    return [
        (torch.randn(TOKENS, 8, generator=generator), torch.randint(0, 3, (TOKENS,), generator=generator))
        for _ in range(count)
    ]


def train(engine: Any, data: list[tuple[Tensor, Tensor]], **flags: bool) -> list[float]:
    """The losses of one micro-batch after another."""
    losses = []
    dtype = next(engine.module.parameters()).dtype
    for x, target in data:
        loss = engine(x.to(dtype), target, **flags)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def whole(model: Any) -> dict[str, Tensor]:
    """Parameters and mask of a model, in fp32, with the experts of all ranks."""
    import deepspeed

    found, layer = {}, model.layer
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for name, parameter in model.named_parameters():
            value = parameter.detach().float().clone()
            if ".deepspeed_experts." not in name:
                found[name] = value
                continue
            before, _, after = name.partition(".deepspeed_experts.")
            local, _, rest = after.partition(".")
            parts = [torch.empty_like(value) for _ in range(layer.placement.ranks)]
            if len(parts) > 1:
                dist.all_gather(parts, value, group=layer.group)
            else:
                parts = [value]
            for rank, part in enumerate(parts):
                found[f"{before}.{rank * layer.placement.local + int(local)}.{rest}"] = part
    return {**found, "mask": layer.held_gates[0].experts_mask.float().clone()}


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of an entry."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
