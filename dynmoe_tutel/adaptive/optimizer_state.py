"""An expert's rows in optimizer state: reset when the expert changes, moved when it moves.

Uses nothing of an optimizer but its `state` and `param_groups`. Libraries whose optimizers keep these elsewhere have a
subclass of `OptimizerRows`, which `ExpertController` takes in the place of an optimizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..experts.base import SlotTensor

logger = logging.getLogger("dynmoe_tutel.adaptive.controller")

Index = tuple[Any, ...]  # of a slot's entries in a parameter: all before one axis, a number on it; or (...,)

# State that holds parameter values (averages or copies of the parameter), not sums of gradients.
_COPIES = ("ax", "z", "x0", "slow_buffer", "lookahead_slow_buff", "slow_param", "slow_weights", "shadow")
_MOMENTS = (
    *("momentum_buffer", "momentum", "exp_avg", "exp_avg_diff", "exp_avg_slow", "exp_inf", "grad_avg", "prev", "s"),
    *("exp_avg_sq", "max_exp_avg_sq", "exp_avg_var", "max_exp_avg_var", "exp_hessian_diag_sq", "grad_sum_sq"),
    *("acc_delta", "variance", "row_var", "col_var"),
    *("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq_r", "exp_avg_sq_c"),
)
# State that is not zero in a fresh parameter, by the options of its group.
_FRESH: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "sum": lambda group: group.get("initial_accumulator_value", 0),  # Adagrad
    "step_size": lambda group: group["lr"],  # Rprop
    "square_avg": lambda group: 1 if "lr_in_momentum" in group else 0,  # timm's RMSpropTF, else RMSprop, Adadelta
}
_HISTORY = "old_dirs"  # L-BFGS: vectors over all parameters, under the first parameter

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None
OptimizersOrRows = Union[Optimizers, "OptimizerRows"]


def optimizer_list(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    """One optimizer, several or None as a list, with those that they wrap; ValueError for anything else."""
    if optimizer is None:
        return []
    several: list[Any] = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    for each in several:
        if not isinstance(getattr(each, "state", None), Mapping):
            raise ValueError(f"optimizer must be a torch optimizer, a list of them or None, got {each!r}")
    found = [inner for each in several for inner in _with_inner(each)]
    return list({id(each.state): each for each in found}.values())


def _with_inner(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The optimizer and those that it wraps: timm's Lookahead has no state of its own."""
    yield optimizer
    for value in list(getattr(optimizer, "__dict__", {}).values()):
        if isinstance(value, torch.optim.Optimizer):
            yield from _with_inner(value)


def optimizer_rows(optimizer: OptimizersOrRows) -> OptimizerRows:
    """The rows of experts in these optimizers; rows as they are."""
    return optimizer if isinstance(optimizer, OptimizerRows) else OptimizerRows(optimizer_list(optimizer))


class OptimizerRows:
    """The entries of experts in the state tensors of all `optimizers`.

    A state tensor has its parameter's shape, or is factored: it lacks an axis, or has one entry on it. Entries that all
    slots share are left alone. So is state of another shape or type (quantised), with one warning a kind: it is unknown
    which entries belong to an expert.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self._warned: set[str] = set()

    def lack(self, parameters: Iterable[nn.Parameter], model: nn.Module) -> bool:
        """Whether some of the parameters can be trained and no optimizer has one of these.

        False where the optimizers have no parameter of the model: they train copies, or say nothing of their own.
        """
        own = {id(p) for o in self.optimizers for g in getattr(o, "param_groups", ()) for p in g.get("params", ())}
        trained = [id(parameter) in own for parameter in parameters if parameter.requires_grad]
        return bool(trained) and not any(trained) and any(id(parameter) in own for parameter in model.parameters())

    def of(self, parameter: nn.Parameter, index: Index) -> list[SlotTensor]:
        """The state tensors with entries of the slot at `index` of `parameter`, each with the index of these entries.

        They are sorted by optimizer and name: the same order on every rank.
        """
        entries = sorted(self._state(parameter, index, "moved"), key=lambda entry: entry[0])
        return [(value, own) for _, value, own in entries]

    @torch.no_grad()
    def reset(self, parameter: nn.Parameter, index: Index) -> None:
        """Set the entries at `index` to what a fresh parameter's state holds; step counters stay, they are shared.

        Moments become zero, or what the optimizer starts from (Adagrad's accumulator, Rprop's step size). Copies and
        averages of the parameter ("master" in the name, ...) take its value. State of an unknown name becomes zero,
        with a warning. The history of L-BFGS, which is of all parameters, is dropped.
        """
        self.drop_histories()
        for (number, name), value, own in self._state(parameter, index, "reset"):
            if value.shape == parameter.shape and self.is_copy(name):
                value[own] = parameter.detach()[index].to(value.dtype)
            else:
                value[own] = self.fresh(name, self._group(number, parameter))

    @staticmethod
    def is_copy(name: str) -> bool:
        """Whether the state of this name holds a parameter's values, not sums of its gradients."""
        return "master" in name or name in _COPIES

    def fresh(self, name: str, group: Mapping[str, Any]) -> Any:
        """What the state of this name holds for a fresh parameter of `group`; 0, with a warning, if it is unknown."""
        if name not in _MOMENTS and name not in _FRESH:
            self._warn_once(
                f"optimizer state {name!r} is unknown: a changed expert's entries in it are set to zero, like moments"
            )
        return _FRESH[name](group) if name in _FRESH else 0

    def _group(self, number: int, parameter: nn.Parameter) -> Mapping[str, Any]:
        groups: list[dict[str, Any]] = self.optimizers[number].param_groups
        found = (group for group in groups if any(each is parameter for each in group["params"]))
        return next(found, self.optimizers[number].defaults)

    def drop_histories(self) -> None:
        """Let L-BFGS start anew: its history is of all parameters, as they were."""
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                if isinstance(state, dict) and _HISTORY in state:
                    state.clear()
                    self._warn_once(
                        f"{type(optimizer).__name__} has one history of all parameters: it starts anew when an expert "
                        "changes"
                    )

    def _state(
        self, parameter: nn.Parameter, index: Index, verb: str
    ) -> Iterator[tuple[tuple[int, str], Tensor, Index]]:
        for number, optimizer in enumerate(self.optimizers):
            # `.get`: indexing the defaultdict would add an empty entry, which counts as initialised state
            for name, value in (optimizer.state.get(parameter) or {}).items():
                if not isinstance(value, Tensor) or value.dim() == 0 or name == _HISTORY:
                    continue
                entries = _slot_entries(str(name), value, parameter, index)
                if entries is None:
                    self._warn_once(
                        f"optimizer state {name!r} of shape {tuple(value.shape)} and {value.dtype} for a parameter "
                        f"of shape {tuple(parameter.shape)}: the entries of one expert are unknown and not {verb}"
                    )
                    continue
                for own in entries:
                    yield (number, str(name)), value, own

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _slot_entries(name: str, value: Tensor, parameter: nn.Parameter, index: Index) -> list[Index] | None:
    """The index of a slot's entries in `value`, given that in `parameter`; [] if slots share them, None if unknown."""
    if not (value.is_floating_point() or value.is_complex()):
        return None
    if value.shape == parameter.shape or index == (...,):
        return [index]
    axis, whole = len(index) - 1, tuple(parameter.shape)
    if value.dim() == len(whole):
        if any(size not in (1, full) for size, full in zip(value.shape, whole, strict=True)):
            return None
        return [index] if value.shape[axis] == whole[axis] else []
    dropped = [k for k in range(len(whole)) if whole[:k] + whole[k + 1 :] == tuple(value.shape)]
    if len(dropped) > 1 and name.endswith(("_row", "_col")):  # means over the last axis, over the one before it
        dropped = [len(whole) - (1 if name.endswith("_row") else 2)]
    found = {None if k == axis else axis - (k < axis) for k in dropped}
    if len(found) != 1:
        return None
    at = found.pop()
    return [] if at is None else [(*[slice(None)] * at, index[axis])]
