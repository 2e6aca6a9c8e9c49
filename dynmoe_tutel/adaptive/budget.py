"""Holds a budget's `target_k`: after each optimizer step it sets the shift at which the last tokens meet the target.

A gate keeps a sample of the tokens of its last training forward (`TopAnyGate.keep_sample`). `Budgets.step` computes
their margins cos - G under the weights as they now are, gathers them over the ranks, and moves the shift towards the
quantile that gives `target_k` assignments a token. All of it stays on the device: the host never waits.

Other gates with state that moves after a step count in their forwards (`Gate.step_counts`); `Budgets.step` sums these
counts over the ranks and hands them back (`Gate.after_step`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..gates import Gate, TopAnyGate
from ..gates.samples import sampled_rows
from ..parallel.collectives import gathered, sum_over_ranks
from .slots import AdaptiveExperts

RATE = 0.5  # the part of the way to the sample's quantile that a shift goes in one step; the rest averages samples
FARTHEST = 0.1  # the largest change of a shift in one step
LOOK_EVERY = 100  # steps after which the model is searched for layers anew: a walk over all of its modules
MOST_SPLIT = 8  # from so many ranks on, each sends an eighth of its sample


def kept_margins(margin_SE: Tensor, max_k: int | None, training: bool = True) -> Tensor:
    """Margins [S, E] so that a token has as many experts at a shift as entries above it; inactive ones are -inf.

    The best expert of a token that passes a threshold of its own stays at any shift, in eval that of every token: its
    margin becomes +inf. Those that `max_k` cuts become -inf.
    """
    largest_SK, slot_SK = margin_SE.topk(min(max_k or margin_SE.shape[1], margin_SE.shape[1]), dim=1)
    best_S1 = largest_SK[:, :1]
    stays_S1 = best_S1 > (0 if training else -torch.inf)
    largest_SK[:, :1] = torch.where(stays_S1, torch.inf, best_S1)
    return torch.full_like(margin_SE, -torch.inf).scatter(1, slot_SK, largest_SK)


def shift_for(margins: Tensor, tokens: Tensor, target_k: float) -> Tensor:
    """The shift [] at which `tokens` tokens with these kept margins (any shape) have `target_k` experts on average.

    It lies midway between the margins of the last expert that stays and the first that goes: -2 if none goes, 2 if
    only best experts stay.
    """
    sorted_N = torch.cat([margins.flatten().sort(descending=True).values, margins.new_full((1,), -torch.inf)])
    rank = (tokens * target_k).round().long().clamp(1, margins.numel())
    stays, goes = sorted_N.gather(0, torch.stack([rank - 1, rank])).unbind()  # sorted_N[rank] would wait for the device
    middle = (stays + goes) / 2
    return torch.where(goes == -torch.inf, -2.0, torch.where(stays == torch.inf, 2.0, middle)).clamp(-2, 2)


class Budgets:
    """The gates of a model; `step()`, once after each optimizer step, moves the state of those that hold a target.

    That is the shift of a top-any gate with `target_k`, and what the gates `relu`, `top_p`, `expert_threshold`,
    `null_experts` and `quantile_top_k` keep.

    `group` is the data-parallel process group over which samples are gathered; None: each layer's `record_group`.
    `ExpertController` and the callbacks call it: it is for training without them.

    Raises ValueError where layers that share one target have different ones: here, and in `step` for what changed since
    (layers of the model that are new or gone are noticed after at most LOOK_EVERY steps).
    """

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        self._model, self._group, self._steps = model, group, 0
        self._layers = self._layers_of_model()
        self._gates()

    @torch.no_grad()
    def step(self) -> None:
        """Move every gate's state, and give it to averages of the weights (see `Lineage`).

        A gate that saw no token since the last step keeps its own.
        """
        self._steps += 1
        if self._steps % LOOK_EVERY == 0:
            self._layers = self._layers_of_model()
        gates_of = self._gates()
        self._step_counting(gates_of)
        of_model: list[tuple[TopAnyGate, Tensor, Tensor]] = []
        for group, gates in gates_of.items():
            held = [gate for gate in gates if isinstance(gate, TopAnyGate) and gate.budget_shift is not None]
            for gate, (margins, tokens) in zip(held, _margins_of_ranks(held, group), strict=True):
                if gate.scope == "model":
                    of_model.append((gate, margins, tokens))
                else:
                    _move([gate], margins, tokens)
        if of_model:
            device = of_model[0][1].device
            every = torch.cat([margins.flatten().to(device) for _, margins, _ in of_model])
            tokens = torch.stack([tokens.to(device) for *_, tokens in of_model]).sum()
            _move([gate for gate, *_ in of_model], every, tokens)
        for layer in self._layers:
            layer.lineage.follow(layer, by_value=False)

    def _layers_of_model(self) -> list[AdaptiveExperts]:
        return [module for module in self._model.modules() if isinstance(module, AdaptiveExperts)]

    def _gates(self) -> dict[Any, list[Gate]]:
        """The gates of the layers as they are now, by process group; ValueError for targets that differ."""
        gates: dict[Any, list[Gate]] = {}
        for layer in self._layers:
            gates.setdefault(layer.record_group if self._group is None else self._group, []).extend(layer.held_gates)
        _refuse_unlike_targets([gate for of_group in gates.values() for gate in of_group])
        return gates

    def _step_counting(self, gates_of: Mapping[Any, list[Gate]]) -> None:
        """One collective a process group; gates of one class and scope "model" share the sum of their counts."""
        of_model: dict[type[Gate], list[tuple[Gate, Tensor]]] = {}
        for group, gates in gates_of.items():
            found = [(gate, counts) for gate in gates if (counts := gate.step_counts()) is not None]
            if found and dist.is_available() and dist.is_initialized():
                sum_over_ranks([counts for _, counts in found], group)
            for gate, counts in found:
                if gate.scope == "model":
                    of_model.setdefault(type(gate), []).append((gate, counts))
                else:
                    gate.after_step(counts)
        for shared in of_model.values():
            total = torch.stack([counts.to(shared[0][1].device) for _, counts in shared]).sum(dim=0)
            for gate, counts in shared:
                gate.after_step(total.to(counts.device))


def _refuse_unlike_targets(gates: list[Gate]) -> None:
    """ValueError if gates of one kind and of scope "model" have different targets."""
    targets: dict[str, set[float]] = {}
    for gate in gates:
        if gate.scope == "model" and gate.target_k is not None:
            name = "gate_type['budget']" if isinstance(gate, TopAnyGate) else f"gate_type of a {type(gate).__name__}"
            targets.setdefault(name, set()).add(gate.target_k)
    for name, found in targets.items():
        if len(found) > 1:
            raise ValueError(f"{name} of scope 'model': layers have target_k {sorted(found)}: give one")


def _move(gates: list[Any], margins: Tensor, tokens: Tensor) -> None:
    """Move the shifts of gates that share one target."""
    wanted = shift_for(margins, tokens, gates[0].target_k)
    for gate in gates:
        way = (RATE * (wanted.to(gate.budget_shift.device) - gate.budget_shift)).clamp(-FARTHEST, FARTHEST)
        gate.budget_shift.add_(way.masked_fill(tokens.to(way.device) == 0, 0))


def _margins_of_ranks(gates: list[TopAnyGate], group: Any) -> list[tuple[Tensor, Tensor]]:
    """For each gate the kept margins of the sampled tokens of all ranks of `group`, and the number of these tokens.

    One collective for all gates. Each of R ranks sends a part of its sample, so that a message stays small.
    """
    kept = [kept_margins(gate.sample_margins(), gate.budget.max_k) for gate in gates]  # type: ignore[union-attr]
    for gate in gates:
        gate.forget_sample()
    if dist.is_available() and dist.is_initialized() and gates:
        group = dist.group.WORLD if group is None else group
        ranks, device = dist.get_world_size(group), kept[0].device
        parts = [_part(margins, min(ranks, MOST_SPLIT)).to(device) for margins in kept]
        sizes = [part.numel() for part in parts]
        of_ranks = gathered(torch.cat([part.flatten() for part in parts]).unsqueeze(0), group).split(sizes, dim=1)
        kept = [flat.reshape(-1, part.shape[1]) for flat, part in zip(of_ranks, parts, strict=True)]
    return [(margins, (margins > -torch.inf).any(dim=1).sum()) for margins in kept]


def _part(margins: Tensor, ranks: int) -> Tensor:
    """One of each `ranks` rows, in another place each time."""
    return margins[sampled_rows(len(margins), -(-len(margins) // ranks), margins.device)]
