"""Shared by the controller's tests: a small model whose slots answer to axes, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive.controller import ExpertController, ExpertEvent
from dynmoe_tutel.adaptive.policy import Decision

D, H, SLOTS = 8, 6, 6


def make_layer(experts: int = 2, slots: int = SLOTS, gate: Any = None) -> Any:
    """A layer whose slot e answers to the axis e of the token space, with thresholds at cosine 0.5."""
    layer = MoELayer(
        gate_type=gate or {"type": "top_any", "max_expert_num": slots},
        experts={
            "type": "ffn",
            "num_experts_per_device": experts,
            "hidden_size_per_expert": H,
            "activation_fn": torch.nn.functional.gelu,
        },
        model_dim=D,
    )
    with torch.no_grad():
        for each in layer.gates:
            if hasattr(each, "experts_mask"):
                each.sim_matrix.copy_(torch.eye(D)[:, : each.sim_matrix.shape[1]])
                each.gates.fill_(0.5)
    return layer


class Net(nn.Module):
    mlp: Any

    def __init__(self, **layer: Any) -> None:
        super().__init__()
        self.mlp = make_layer(**layer)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mlp(x))


def near(*axes: int, each: int = 4, sign: float = 1.0) -> Tensor:
    """`each` tokens around each of the axes, [each * len(axes), D], always the same ones."""
    generator = torch.Generator().manual_seed(len(axes) * 100 + sum(axes))
    noise = 0.05 * torch.randn(each * len(axes), D, generator=generator)
    return sign * (torch.eye(D)[list(axes)].repeat_interleave(each, 0) + noise)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, controller: ExpertController, *micro: Tensor
) -> list[ExpertEvent]:
    """One optimizer step over the micro-batches."""
    for x in micro:
        y = model(x)
        (y.float().square().mean() + 0.01 * layer_of(model).l_aux).backward()
    if optimizer is not None:
        optimizer.step()
    events = controller.step()
    model.zero_grad()
    return events


def layer_of(model: nn.Module) -> Any:
    return next(m for m in model.modules() if hasattr(m, "experts") and hasattr(m, "gates"))


def active_slots(layer: Any, gate: int = 0) -> list[int]:
    return layer.gates[gate].experts_mask.nonzero().flatten().tolist()


def slot_mask(name: str, parameter: Tensor, slots: list[int]) -> Tensor:
    """True at the entries of `slots`, by the shapes in the design; False for other parameters."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    if name.endswith("sim_matrix"):
        mask[:, slots] = True
    elif "batched_fc" in name or name.endswith("gates.0.gates"):
        mask[slots] = True
    return mask


def recording_policy(seen: list[tuple[int, list[int]]]) -> Callable[..., Decision]:
    """A policy that changes nothing and records (tokens, counts) of every window."""

    def note(record: Any, active: Tensor, free_slots: int, silent: list[int]) -> Decision:
        seen.append((int(record.tokens), record.counts.tolist()))
        return Decision()

    return note


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Bitwise equality of nested states, with the path of the first difference."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path
