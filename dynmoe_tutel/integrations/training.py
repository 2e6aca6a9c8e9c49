"""`MoECallback` and `MoETraining`: what the callbacks of all hosts share while a model trains.

One state covers the controller, the auxiliary loss's gradient and the scalars. Nothing here knows a host.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_tutel import metrics
from dynmoe_tutel.adaptive.budget import Budgets
from dynmoe_tutel.adaptive.controller import ExpertController, ExpertEvent, Schedule
from dynmoe_tutel.adaptive.optimizer_state import OptimizerRows
from dynmoe_tutel.integrations.auxiliary_gradient import AuxiliaryGradient
from dynmoe_tutel.integrations.divided_experts import DividedGradients, has_divided_experts
from dynmoe_tutel.integrations.optimizer_steps import OptimizerSteps
from dynmoe_tutel.parallel.collectives import world_size

logger = logging.getLogger(__name__)

PREFIX = "moe"
_CONTROLLER_OPTIONS = tuple(inspect.signature(ExpertController).parameters)[2:]  # after model and optimizer


def checked_options(aux_weight: float, options: Mapping[str, Any]) -> None:
    """ValueError if `aux_weight` is not a finite number of at least 0, an option is not one of `ExpertController`'s, or
    the schedule is invalid."""
    if isinstance(aux_weight, bool) or not isinstance(aux_weight, int | float) or not 0 <= aux_weight < math.inf:
        raise ValueError(f"aux_weight must be a number of at least 0, got {aux_weight!r}")
    unknown = [name for name in options if name not in _CONTROLLER_OPTIONS]
    if unknown:
        allowed = ", ".join(("aux_weight", *_CONTROLLER_OPTIONS, "expert_data_group"))
        raise ValueError(f"unknown option {unknown[0]!r}: allowed are {allowed}")
    Schedule.of(options.get("schedule"))


def refuse_without_layers(model: nn.Module) -> None:
    """ValueError if the model has no MoE layer."""
    if not metrics.moe_layers(model):
        raise ValueError(
            f"model must have a dynmoe_tutel.MoELayer for DynMoECallback, got a {type(model).__name__} without one"
        )


Callback = TypeVar("Callback", bound="MoECallback")


class MoECallback:
    """The base of all hosts' callbacks: options, and access to the last training."""

    def __init__(self, aux_weight: float, options: Mapping[str, Any], expert_data_group: Any = None) -> None:
        checked_options(aux_weight, options)
        self._aux_weight = aux_weight
        self._options = dict(options)
        self._expert_data_group = expert_data_group
        self._training: MoETraining | None = None
        self._gradients: DividedGradients | None = None  # while a model with divided experts trains

    @property
    def controller(self) -> ExpertController | None:
        """The controller of the last training; None before training, or if no gate is adaptive."""
        return None if self._training is None else self._training.controller

    @property
    def events(self) -> list[ExpertEvent]:
        """The grown and pruned experts, oldest first."""
        return [] if self.controller is None else self.controller.events

    def close(self) -> None:
        """Detach from the model's layers, as after training. The next training of these layers does the same.

        Only needed where the host does not report an interrupted training and the model is used otherwise then. The
        end of a `with callback:` block calls it.
        """
        if self._training is not None:
            self._training.close()
        if self._gradients is not None:
            self._gradients.close()
            self._gradients = None

    def _gradients_of(self, model: nn.Module, wrapped: nn.Module) -> DividedGradients | None:
        """What averages and clips the gradients of this training; None where no experts are divided over ranks."""
        return DividedGradients(model, wrapped, self._expert_data_group) if has_divided_experts(model) else None

    def __enter__(self: Callback) -> Callback:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class MoETraining:
    """One training of one model, from its start until `close`; a layer belongs to one training at a time.

    It closes what an earlier, interrupted training left at the layers; that one must not go on. Copies of the model
    belong to no training.

    The host's callback calls `set_factor` before the forwards of a step, `step` after them, and `scalars` when the
    host logs. A model without an adaptive gate has no controller; what its routers hold moves all the same.
    """

    controller: ExpertController | None

    def __init__(self, model: nn.Module, optimizer: Any, aux_weight: float, options: Mapping[str, Any]) -> None:
        model = getattr(model, "_orig_mod", model)  # keep torch.compile's prefix out of names
        refuse_without_layers(model)
        layers = metrics.moe_layers(model)
        adaptive = [layer for layer in layers.values() if any(gate.adaptive for gate in layer.held_gates)]
        self._group = options.get("group")
        self.controller = ExpertController(model, optimizer, **options) if adaptive else None
        self._budgets = None if adaptive else Budgets(model, self._group)
        if not adaptive and options.get("schedule") is not None:
            logger.warning("schedule is ignored: no gate of the %s grows or prunes experts", type(model).__name__)
        self.auxiliary = AuxiliaryGradient(layers, aux_weight, owner=self)  # ends an earlier training of these layers
        self.meter = metrics.RoutingMeter(model, training_only=True)
        counted = None if isinstance(optimizer, OptimizerRows) else optimizer  # rows have no steps: the host counts
        self._steps = OptimizerSteps(adaptive or layers.values(), counted)
        self._batches, self._taken = 0, 0  # batches, and optimizer steps that counted
        self._warned = False
        self._new_events: list[ExpertEvent] = []

    def set_factor(self, factor: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """Set the host's factor on a batch's mean loss for the next forwards: `factor`, times the scale of `scaler`."""
        self._check_in_charge()
        self._batches += 1
        self.auxiliary.set_factor(factor, scaler)

    def step(self, otherwise: int = 1) -> int:
        """Count the optimizer steps since the last call, and return their number.

        Only steps of optimizers that own a parameter of an adaptive layer count (of any MoE layer, where none is
        adaptive). If several optimizers took turns, the one with most steps counts. `otherwise` is the number by the
        host's account; it is used where no optimizer is one of torch.
        """
        self._check_in_charge()
        steps = self._steps.take(otherwise)
        self._taken += steps
        for _ in range(steps):
            if self.controller is not None:
                self._new_events += self.controller.step()
            if self._budgets is not None:
                self._budgets.step()
        return steps

    def warn_without_steps(self) -> None:
        """At the end of an epoch: warn, once, if no expert can grow because no optimizer step was seen so far."""
        if self.controller is not None and self._batches and not self._taken and not self._warned:
            self._warned = True
            logger.warning(
                "no optimizer step was counted in this epoch, so no expert grows or is pruned: none of the optimizers "
                "that the trainer knows has stepped and owns a parameter of an adaptive MoE layer. Give the trainer "
                "the optimizer that you step (in Lightning, return it from configure_optimizers), and the layers' "
                "parameters to that optimizer"
            )

    def _check_in_charge(self) -> None:
        if not self.auxiliary.attached:
            raise RuntimeError(
                "this training of the MoE layers has ended: another DynMoECallback has taken over the layers since, or "
                "close() was called. Train a model with one callback at a time; a copy.deepcopy of it can train beside "
                "it"
            )

    def scalars(self) -> dict[str, float]:
        """Numbers of the layers' training since the last call, over all ranks; every rank must call it.

        By layer: those of `metrics.layer_scalars`, `aux` (mean unweighted l_aux), `grown` and `pruned`; also the sum of
        `aux`. Waits for the device.
        """
        for sums in (self.meter, self.auxiliary):
            sums.all_reduce(self._group)
        aux = self.auxiliary.means()
        values: dict[str, float] = dict(metrics.layer_scalars(self.meter.read()))
        values |= {f"{name}/aux": value for name, value in aux.items()}
        if self.controller is not None:
            values |= {f"{name}/{action}": 0 for name in self.meter.layers for action in ("grown", "pruned")}
            for event in self._new_events:
                key = f"{event.layer}/{event.action}"
                values[key] = values.get(key, 0) + 1
        values["aux"] = sum(aux.values())
        self._new_events.clear()
        for sums in (self.meter, self.auxiliary):
            sums.reset()
        return {f"{PREFIX}/{name.lstrip('/')}": float(value) for name, value in values.items()}

    def close(self) -> None:
        """Detach from the model's layers and the optimizers; events and state can still be read."""
        for hooks in (self.meter, self.auxiliary, self._steps):
            hooks.close()
        if self.controller is not None:
            self.controller.close()

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks for a resumed training; every rank must call it. Tensors are copies on the CPU."""
        own = _on_cpu(
            {
                "controller": None if self.controller is None else self.controller.state_dict(),
                "meter": self.meter.state_dict(),
                "auxiliary": self.auxiliary.state_dict(),
                "new_events": len(self._new_events),
            }
        )
        ranks = [own] * world_size()
        if len(ranks) > 1:
            dist.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`; ValueError if it does not fit the model.

        If another number of ranks wrote it, the open record window starts anew.
        """
        ranks = state.get("ranks")
        if not isinstance(ranks, list) or not ranks:
            raise ValueError("the state to load is not one of DynMoECallback: it has no list 'ranks'")
        same = len(ranks) == world_size()
        own = ranks[dist.get_rank() if same and len(ranks) > 1 else 0]
        if (own["controller"] is None) != (self.controller is None):
            have, found = ("none", "one") if self.controller is None else ("one", "none")
            raise ValueError(f"the state to load has {found} of a controller, the model's gates need {have}")
        if self.controller is not None:
            self.controller.load_state_dict(own["controller"] if same else _window_closed(own["controller"]))
            self._new_events = self.controller.events[len(self.controller.events) - own["new_events"] :]
        if not same:
            logger.warning(
                "the state was written by %d ranks and is read by %d: its record window is left out",
                len(ranks),
                world_size(),
            )
            return
        self.meter.load_state_dict(own["meter"])
        self.auxiliary.load_state_dict(own["auxiliary"])


def _window_closed(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state, "values": {**state["values"], "window_open": False}}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return value
