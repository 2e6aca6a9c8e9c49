"""`calibrate`: the shifts at which a trained model activates a wanted number of experts a token, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..gates import TopAnyGate
from ..gates.budget import Budget, checked_scope, checked_target
from ..gates.samples import sampled_rows
from ..parallel.collectives import gathered
from ..validation import positive_int
from .budget import kept_margins, shift_for
from .slots import AdaptiveExperts

SWEEPS = 4  # a layer's tokens change with the shifts of the layers below it
MOST_TOKENS = 8192  # of a gate, over all batches


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    target_k: float,
    *,
    max_k: int | None = None,
    scope: str = "layer",
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, float]:
    """Set the shifts of every top-any gate so that tokens activate `target_k` experts on average in eval.

    Args:
        model: a trained model; its weights and modes stay as they are.
        batches: inputs without labels, read several times: a list or a DataLoader, not a generator.
        target_k: from 1 (in eval every token has an expert) to the active experts of each gate, or `max_k`.
        max_k: at most so many experts a token; None: as the gate's budget has it, or no limit.
        scope: "layer": each gate holds `target_k`; "model": their mean does, with one shift for all.
        call: `call(model, batch)` runs a batch. None: model(batch), model(*batch) for a tuple or list, model(**batch)
            for a dict.

    The gates then have a budget of `target_k`, `max_k` and `scope` in place of their own: a training that goes on holds
    `target_k` and not what it held before. Calibrate a deep copy of a model that is to be trained further.

    Returns the mean k of each gate on these batches, by its name, after calibration. The shifts are in the model's
    state dict (`budget_shift`); a model that loads it needs a `budget` with a target, or its own calibration. Where
    several processes hold the model, all must call it, each with batches of its own.

    Raises ValueError for a target out of range, a model without top-any gates, batches that end after one reading, and
    gates that no token of the batches reaches. After an error the model has the budgets and shifts that it had.
    """
    max_k, scope = None if max_k is None else positive_int("max_k", max_k), checked_scope("scope", scope)
    layers = [module for module in model.modules() if isinstance(module, AdaptiveExperts)]
    groups = {gate: layer.record_group for layer in layers for gate in layer.held_gates if isinstance(gate, TopAnyGate)}
    gates = {name: gate for name, gate in model.named_modules() if isinstance(gate, TopAnyGate) and gate in groups}
    if not gates:
        raise ValueError("model has no gate of type top_any, gated_multi_gate or gated_multi_gate_t to calibrate")
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        once = "can be read only once" if isinstance(batches, Iterator) else f"= {batches!r} cannot be read"
        raise ValueError(f"batches {once}: give a list or a DataLoader")
    budgets = {}
    for name, gate in gates.items():
        most = gate.limit_of_call(max_k)
        active = int(gate.active().sum())
        target = checked_target("target_k", target_k, active if most is None else min(active, most))
        budgets[name] = Budget(target, most, scope)
    with _as_before_after_an_error(gates.values()):
        for name, gate in gates.items():
            gate.hold_budget(budgets[name], 0.0 if gate.budget_shift is None else None)
        run = _called if call is None else call
        for _ in range(SWEEPS):
            pools = _margins(model, gates, batches, run)
            every = {name: _of_all_ranks(pool, groups[gates[name]]) for name, pool in pools.items()}
            kept = {name: kept_margins(pool, budgets[name].max_k, False) for name, pool in every.items()}
            for names in [list(gates)] if scope == "model" else [[name] for name in gates]:
                joined = torch.cat([kept[name].flatten() for name in names])
                tokens = torch.stack([(kept[name] > -torch.inf).any(dim=1).sum() for name in names])
                _refuse_unreached(names, tokens)
                shift = float(shift_for(joined, tokens.sum(), target))
                for name in names:
                    gates[name].hold_budget(budgets[name], shift)
        return _mean_k(model, gates, batches, run)


def _refuse_unreached(names: list[str], tokens: Tensor) -> None:
    unreached = [name for name, count in zip(names, tokens.tolist(), strict=True) if not count]
    if unreached:
        raise ValueError(
            f"no finite token of batches reaches {', '.join(unreached)}, so that nothing says its shift: give batches, "
            "at least one, and a call, which run every top-any gate"
        )


@contextmanager
def _as_before_after_an_error(gates: Iterable[TopAnyGate]) -> Iterator[None]:
    """The budgets and shifts of the gates back as they were, if the body raises."""
    before = [(gate, gate.budget, None if gate.budget_shift is None else gate.budget_shift.clone()) for gate in gates]
    try:
        yield
    except BaseException:
        for gate, budget, shift in before:
            gate.budget = budget
            if shift is None or gate.budget_shift is None:
                gate.budget_shift = shift
            else:
                gate.budget_shift.copy_(shift)
        raise


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    """The model in eval, each of its modules back in its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _run(model: nn.Module, gates: Mapping[str, TopAnyGate], batches: Iterable[Any], run: Any, hook: Any) -> None:
    """Run the batches in eval, with hook(name, gate, arguments, routing) after each forward of a gate."""
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for name, gate in gates.items():
            handle = gate.register_forward_hook(lambda g, args, routing, name=name: hook(name, g, args, routing))
            stack.callback(handle.remove)
        for batch in batches:
            run(model, batch)


def _margins(model: nn.Module, gates: Mapping[str, TopAnyGate], batches: Iterable[Any], run: Any) -> dict[str, Tensor]:
    """Margins [MOST_TOKENS, E] of each gate's tokens, an even part of every batch; rows without a token are -inf."""
    found: dict[str, list[Tensor]] = {name: [] for name in gates}

    def keep(name: str, gate: TopAnyGate, args: tuple[Any, ...], routing: Any) -> None:
        margin_TE = gate.margins(args[0], routing.token_mask)
        found[name].append(margin_TE[(margin_TE > -torch.inf).any(dim=1)])

    _run(model, gates, batches, run, keep)
    return {name: _pool(gate, found[name]) for name, gate in gates.items()}


def _pool(gate: TopAnyGate, parts: list[Tensor]) -> Tensor:
    pool = torch.full((MOST_TOKENS, gate.slots), -torch.inf, device=gate.experts_mask.device)
    if parts:
        every = torch.cat(parts)
        every = every[sampled_rows(len(every), MOST_TOKENS, every.device)]
        pool[: len(every)] = every
    return pool


def _of_all_ranks(pool: Tensor, group: Any) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return pool
    return gathered(pool, dist.group.WORLD if group is None else group)


def _mean_k(model: nn.Module, gates: Mapping[str, TopAnyGate], batches: Iterable[Any], run: Any) -> dict[str, float]:
    sums = {name: [0, 0] for name in gates}

    def count(name: str, gate: TopAnyGate, args: tuple[Any, ...], routing: Any) -> None:
        sums[name][0] += int(routing.num_assignments)
        sums[name][1] += int(routing.real_tokens)

    _run(model, gates, batches, run, count)
    return {name: assignments / max(tokens, 1) for name, (assignments, tokens) in sums.items()}
