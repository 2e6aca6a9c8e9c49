"""An expert's rows in optimizer state: reset when the expert changes, moved when it moves.

Uses nothing of an optimizer but its `state` mapping.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("dynmoe_tutel.adaptive.controller")

# State that holds parameter values (averages or copies of the parameter), not sums of gradients.
_COPIES = ("ax", "z", "slow_buffer", "slow_param", "slow_weights", "shadow")
_MOMENTS = (
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "exp_avg_slow", "exp_inf"),
    *("sum", "square_avg", "grad_avg", "acc_delta", "prev", "variance"),
)

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None


def optimizer_list(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    """One optimizer, several or None as a list; ValueError for anything else."""
    if optimizer is None:
        return []
    several: list[Any] = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    for each in several:
        if not isinstance(getattr(each, "state", None), Mapping):
            raise ValueError(f"optimizer must be a torch optimizer, a list of them or None, got {each!r}")
    return several


class OptimizerRows:
    """The state tensors of all `optimizers` that have their parameter's shape.

    State of another shape (factored, quantised) is left alone, with one warning a kind: it is unknown which entries
    belong to an expert.
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

    def of(self, parameter: nn.Parameter) -> list[Tensor]:
        """The state tensors of the parameter's shape, sorted by optimizer and name: the same order on every rank."""
        return [value for _, value in sorted(self._state(parameter, "moved"), key=lambda entry: entry[0])]

    @torch.no_grad()
    def reset(self, parameter: nn.Parameter, index: tuple[Any, ...]) -> None:
        """Zero moments at `index`; copies and averages of the parameter ("master" in the name, ...) take its value.

        State of an unknown name becomes zero too, with a warning.
        """
        for (_, name), value in self._state(parameter, "reset"):
            if "master" in name or name in _COPIES:
                value[index] = parameter.detach()[index].to(value.dtype)
                continue
            if name not in _MOMENTS:
                self._warn_once(
                    f"optimizer state {name!r} is unknown: a changed expert's entries in it are set to zero, like "
                    "moments"
                )
            value[index] = 0

    def _state(self, parameter: nn.Parameter, verb: str) -> Iterator[tuple[tuple[int, str], Tensor]]:
        for number, optimizer in enumerate(self.optimizers):
            # `.get`: indexing the defaultdict would add an empty entry, which counts as initialised state
            for name, value in (optimizer.state.get(parameter) or {}).items():
                if not isinstance(value, Tensor) or value.dim() == 0:
                    continue
                if value.shape == parameter.shape:
                    yield (number, str(name)), value
                else:
                    self._warn_once(
                        f"optimizer state {name!r} of shape {tuple(value.shape)} for a parameter of shape "
                        f"{tuple(parameter.shape)}: the entries of one expert are unknown and not {verb}"
                    )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)
