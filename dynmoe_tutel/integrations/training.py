"""`MoECallback` and `MoETraining`: what the callbacks of all hosts share while a model trains.

One state covers the controller, the auxiliary loss's gradient and the scalars. Nothing here knows a host.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_tutel import metrics
from dynmoe_tutel.adaptive.controller import ExpertController, ExpertEvent, Schedule
from dynmoe_tutel.integrations.auxiliary_gradient import AuxiliaryGradient

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
        raise ValueError(f"unknown option {unknown[0]!r}: allowed are aux_weight, {', '.join(_CONTROLLER_OPTIONS)}")
    Schedule.of(options.get("schedule"))


def refuse_without_layers(model: nn.Module) -> None:
    """ValueError if the model has no MoE layer."""
    if not metrics.moe_layers(model):
        raise ValueError(
            f"model must have a dynmoe_tutel.MoELayer for DynMoECallback, got a {type(model).__name__} without one"
        )


class MoECallback:
    """The base of all hosts' callbacks: options, and access to the last training."""

    def __init__(self, aux_weight: float, options: Mapping[str, Any]) -> None:
        checked_options(aux_weight, options)
        self._aux_weight = aux_weight
        self._options = dict(options)
        self._training: MoETraining | None = None

    @property
    def controller(self) -> ExpertController | None:
        """The controller of the last training; None before training, or if every gate has a fixed k."""
        return None if self._training is None else self._training.controller

    @property
    def events(self) -> list[ExpertEvent]:
        """The grown and pruned experts, oldest first."""
        return [] if self.controller is None else self.controller.events

    def close(self) -> None:
        """Detach from the model's layers, as after training; only needed if the host did not report its end."""
        if self._training is not None:
            self._training.close()


class MoETraining:
    """One training of one model, from its start until `close`.

    The host's callback calls `set_factor` before the forwards of a step, `step` after each optimizer step, and
    `scalars` when the host logs. A model whose gates all have a fixed k has no controller; the rest is the same.
    """

    controller: ExpertController | None

    def __init__(self, model: nn.Module, optimizer: Any, aux_weight: float, options: Mapping[str, Any]) -> None:
        model = getattr(model, "_orig_mod", model)  # keep torch.compile's prefix out of names
        refuse_without_layers(model)
        self.meter = metrics.RoutingMeter(model, training_only=True)
        self.auxiliary = AuxiliaryGradient(self.meter.layers, aux_weight)
        self._group = options.get("group")
        self._new_events: list[ExpertEvent] = []
        try:
            self.controller = self._make_controller(model, optimizer, options)
        except ValueError:
            self.close()
            raise

    def _make_controller(self, model: nn.Module, optimizer: Any, options: Mapping[str, Any]) -> ExpertController | None:
        if any(gate.adaptive for layer in self.meter.layers.values() for gate in layer.held_gates):
            return ExpertController(model, optimizer, **options)
        if options.get("schedule") is not None:
            logger.warning("schedule is ignored: every gate of the %s has a fixed k", type(model).__name__)
        return None

    def set_factor(self, factor: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """Set the host's factor on a batch's mean loss for the next forwards: `factor`, times the scale of `scaler`."""
        self.auxiliary.set_factor(factor, scaler)

    def step(self) -> None:
        """Count one optimizer step."""
        if self.controller is not None:
            self._new_events += self.controller.step()

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
        """Detach from the model's layers; events and state can still be read."""
        self.meter.close()
        self.auxiliary.close()
        for layer in self.meter.layers.values():
            layer.end_record_routing()

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
        ranks = [own] * _world_size()
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
        same = len(ranks) == _world_size()
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
                _world_size(),
            )
            return
        self.meter.load_state_dict(own["meter"])
        self.auxiliary.load_state_dict(own["auxiliary"])


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _window_closed(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state, "values": {**state["values"], "window_open": False}}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return value
