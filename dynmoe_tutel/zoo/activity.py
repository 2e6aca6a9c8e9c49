"""How many experts each token activates: by layer, in the order of tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe_tutel.gates import TopAnyGate
from dynmoe_tutel.gates.budget import Budget
from dynmoe_tutel.metrics import moe_layers
from dynmoe_tutel.routing import Routing
from dynmoe_tutel.temporary_hooks import HookOwner, TemporaryHook


class _Keep(TemporaryHook):
    """Hook of a gate: keeps the k of each token."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, gate: nn.Module, inputs: Any, routing: Routing) -> None:
        self.kept.append(routing.k_per_token.detach().to(torch.int32, copy=True))


class TokenActivity(HookOwner):
    """Keeps the k of every token that a model sees, for one sequence: a prompt, then its answer token by token.

    Ends with `close` or a `with` block. In eval, a token has at least 1.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = moe_layers(model)
        self._kept: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._own(layer.gates[0].register_forward_hook(_Keep(self._kept[name])) for name, layer in self.layers.items())

    def reset(self) -> None:
        """Forget all tokens."""
        for kept in self._kept.values():
            kept.clear()

    def k_LT(self) -> Tensor:
        """k [layers, tokens], int32, on the CPU."""
        rows = [torch.cat(kept).cpu() if kept else torch.zeros(0, dtype=torch.int32) for kept in self._kept.values()]
        return torch.stack(rows)


def limit_k(model: nn.Module, max_k: int | None) -> None:
    """Let a token activate at most `max_k` experts from now on, those of largest margin; None: no limit.

    A gate's `target_k` stays. Raises ValueError, before any gate is changed, for one that cannot hold the limit.
    """
    budgets: list[tuple[TopAnyGate, Budget | None]] = []
    for layer in moe_layers(model).values():
        for gate in layer.held_gates:
            if not isinstance(gate, TopAnyGate):
                raise ValueError(f"limit_k: {type(gate).__name__} is no top-any gate")
            held = {} if gate.budget is None else {k: v for k, v in asdict(gate.budget).items() if v is not None}
            wanted = {**held, "max_k": max_k}
            limited = max_k is not None or "target_k" in held
            budgets.append((gate, Budget.of(wanted, layer.slots) if limited else None))
    for gate, budget in budgets:
        if budget is None:
            gate.budget = None
        else:
            gate.hold_budget(budget)
