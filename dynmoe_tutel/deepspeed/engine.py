"""`initialize`: DeepSpeed's, for models with MoE layers whose experts grow and are pruned.

The engine that it returns has a controller, which counts the engine's optimizer steps; its checkpoints hold the
controller's state, and its forward takes upstream's flags.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from ..adaptive.controller import ExpertController, ExpertEvent, records_of, with_records
from ..adaptive.schedule import Schedule
from ..forwards import in_backward
from ..layer import MoELayer
from ..parallel import clip_grad_norm_
from .moe.layer import MoE
from .optimizer_states import optimizer_rows_of
from .preparation import prepared

logger = logging.getLogger("dynmoe_tutel")

OPTIONS = "dynmoe"  # the key of the controller's options in DeepSpeed's config
STATE = "dynmoe_tutel"  # the key of the adaptive process in a checkpoint's client state
BEGIN, END = "if_begin_record_routing", "if_end_record_routing"
SCHEDULE = Schedule(every=900, window=300, start=600)


_stock_initialize = deepspeed.initialize  # `register()` puts ours in its place


@functools.wraps(_stock_initialize)
def initialize(*arguments: Any, **options: Any) -> Any:
    """`deepspeed.initialize`, with its arguments and results; the engine is an `AdaptiveEngine` where experts adapt.

    The key "dynmoe" of DeepSpeed's config holds options of `ExpertController`: {"schedule": ..., "policy": ...,
    "init": ..., ...}. Without it, updates follow the optimizer steps 600, 1500, 2400, ..., each from the forwards of
    300 steps. {"schedule": None} leaves the windows to the flags of the forward.

    An optimizer without groups for the experts of a `MoE` gets them. `MoELayer`s become leaves of ZeRO 3.

    Raises ValueError, by name, for a `MoE` under ZeRO 3 and for layers under tensor or pipeline parallelism; also for
    optimizers whose copies of the parameters are not known.
    """
    call = inspect.signature(_stock_initialize).bind(*arguments, **options)
    call.apply_defaults()
    given = dict(call.arguments)
    model = given["model"]
    if not isinstance(model, nn.Module) or not any(isinstance(module, MoELayer) for module in model.modules()):
        return _stock_initialize(*arguments, **options)
    results = _stock_initialize(**prepared(given))
    if any(gate.adaptive for layer in _layers(model) for gate in layer.held_gates):
        _make_adaptive(results[0])
    return results


class AdaptiveEngine(DeepSpeedEngine):
    """DeepSpeed's engine, whose `controller` grows and prunes the experts of its model after optimizer steps.

    A step that the loss scaler skips is none; accumulated micro-batches are one step.
    """

    controller: ExpertController
    _ends = False  # a layer's own flag asks for the end of the window in the forward that runs

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The model's forward, which need not know the flags.

        `if_begin_record_routing` opens an empty record window before this forward. `if_end_record_routing` ends it
        after this forward, and experts are updated after the optimizer step that follows: the backward needs those
        of the forward. Both may come in one call; those of the micro-batches of one step are one window. With the
        first flag, True or False, the schedule stops to count. A model may hand its own flags to a `MoE`, which count
        for all layers. Raises ValueError where a window ends that none began.
        """
        flags = {name: bool(options.pop(name)) for name in (BEGIN, END) if name in options}
        if flags:
            self.controller.leave_schedule()
            options |= {
                name: value for name, value in flags.items() if name in _signature(type(self.module)).parameters
            }
        if flags.get(BEGIN):
            self.controller.begin_window()
        self._ends = flags.get(END, False)
        output = super().forward(*inputs, **options)
        if self._ends:
            self.controller.end_window()
        return output

    def step(self, *arguments: Any, **options: Any) -> None:
        """DeepSpeed's step, and then the controller's if the optimizer stepped."""
        super().step(*arguments, **options)
        if self._step_applied:
            with self._whole_parameters():
                self.controller.step()

    def clip_fp32_gradients(self) -> None:
        """Clip by the norm over all ranks; DeepSpeed's takes the mean of the ranks' norms where they divide experts."""
        clip_grad_norm_(self.module, self.gradient_clipping())

    @property
    def events(self) -> list[ExpertEvent]:
        """The grown and pruned experts, oldest first."""
        return self.controller.events

    def save_checkpoint(
        self, save_dir: Any, tag: Any = None, client_state: Mapping[str, Any] | None = None, *args: Any, **options: Any
    ) -> Any:
        """DeepSpeed's checkpoint, with the state of the adaptive process in its client state."""
        return super().save_checkpoint(save_dir, tag, {**(client_state or {}), STATE: self._state()}, *args, **options)

    def load_checkpoint(self, *arguments: Any, **options: Any) -> Any:
        """Load a checkpoint as DeepSpeed does, and the adaptive process with it unless only the module is loaded.

        On as many ranks as saved it, an open record window goes on as it was; else its sums do. A checkpoint without
        a state of the adaptive process, such as one of DynMoE's own DeepSpeed, lets it start anew.
        """
        call = inspect.signature(DeepSpeedEngine.load_checkpoint).bind(self, *arguments, **options)
        path, client_state = super().load_checkpoint(*arguments, **options)
        if path is not None:
            saved = client_state.pop(STATE, None)
            if saved is not None and not call.arguments.get("load_module_only"):
                self._resume(saved)
            elif saved is None:
                logger.warning("%s has no state of the adaptive process, which starts anew", path)
        return path, client_state

    def _state(self) -> dict[str, Any]:
        """The controller's state, with the records of all ranks."""
        own = _on_cpu(self.controller.state_dict())
        records: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(records, records_of(own))
        return {"controller": own, "records": records}

    def _resume(self, saved: Mapping[str, Any]) -> None:
        state, records = saved["controller"], saved["records"]
        if len(records) == dist.get_world_size():
            own = records[dist.get_rank()]
        else:  # the first rank gets what all ranks saw
            seen = records if dist.get_rank() == 0 else []
            own = self.controller.merged_records({name: [each[name] for each in seen] for name in records[0]})
        self.controller.load_state_dict(with_records(state, own))

    def _whole_parameters(self) -> AbstractContextManager[Any]:
        """A context for the controller's step: where it changes experts, ZeRO 3 has the layers' parameters whole."""
        if self.zero_optimization_stage() < 3 or not self.controller.updates_next:
            return nullcontext()
        parameters = [parameter for layer in _layers(self.module) for parameter in layer.parameters()]
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _layers(model: nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def _make_adaptive(engine: Any) -> None:
    """Give the engine a controller and the methods of `AdaptiveEngine`."""
    options = {"schedule": SCHEDULE, **engine.config.get(OPTIONS, {})}
    by_hand = options["schedule"] is None
    engine.__class__ = _adaptive(type(engine))
    engine.controller = ExpertController(engine.module, optimizer_rows_of(engine.optimizer), **options)
    if by_hand:
        engine.controller.leave_schedule()
    for module in engine.module.modules():
        if isinstance(module, MoE) and module.is_dynmoe:
            module.updates_itself = False
            module.register_forward_pre_hook(_FlagsToEngine(engine), with_kwargs=True)


class _FlagsToEngine:
    """Hook of a `MoE`: the engine does what the flags of its forward say, for all layers at once."""

    def __init__(self, engine: AdaptiveEngine) -> None:
        self.engine = weakref.ref(engine)

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        call = _signature(type(layer)).bind(layer, *inputs, **options)
        begin, end = (bool(call.arguments.pop(name, False)) for name in (BEGIN, END))
        engine = self.engine()
        if engine is not None and (begin or end) and not in_backward():
            if begin:
                engine.controller.begin_window()
            engine._ends |= end
        return call.args[1:], call.kwargs


def _adaptive(kind: type) -> type:
    """The engine class `kind` with the methods of `AdaptiveEngine`."""
    return AdaptiveEngine if kind is DeepSpeedEngine else type(f"Adaptive{kind.__name__}", (AdaptiveEngine, kind), {})


def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    return {key: _on_cpu(item) for key, item in value.items()} if isinstance(value, dict) else value
