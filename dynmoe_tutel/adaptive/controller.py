"""ExpertController: opens and closes record windows, updates experts and resets their optimizer state.

The policy (policy.py) decides and the layer (slots.py) applies the decision. The controller counts optimizer steps,
sums records over ranks, resets optimizer state, logs events, and saves the state with which a resumed run is bitwise
equal to an uninterrupted one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..validation import number
from .averages import Average, averaged_layers
from .budget import Budgets
from .events import announce
from .gate_history import GateHistory, gate_histories
from .optimizer_state import OptimizersOrRows, optimizer_rows
from .policy import SAMPLED_TOKENS, Decision, DynMoEPolicy, ExpertChange, Policy, checked_decision, make_policy
from .rebalance import RebalanceReport, rebalance_layer
from .schedule import Schedule
from .slots import INITS
from .window import RecordWindow

logger = logging.getLogger(__name__)

STATE_VERSION = 1


@dataclass(frozen=True)
class ExpertEvent:
    """One slot that was grown or pruned after optimizer step `step`.

    `layer` is the layer's qualified name in the model, without wrapper prefixes; `gate` is the index of the gate;
    `experts` is that gate's number of active experts after the change.
    """

    step: int
    layer: str
    gate: int
    slot: int
    action: str
    reason: str
    experts: int

    def __str__(self) -> str:
        where = self.layer or "the layer"
        gate = f", gate {self.gate}" if self.gate else ""
        return (
            f"step {self.step}: {self.action} expert {self.slot} of {where}{gate}, "
            f"now {self.experts} active: {self.reason}"
        )


class ExpertController:
    """Grows and prunes the experts of every adaptive MoE layer of a model while it trains.

    Call `step()` once after every `optimizer.step()`: gradient accumulation then counts once. The model may be
    wrapped by DistributedDataParallel or torch.compile: layer names omit the wrappers' prefixes, so that state
    moves between wrapped and plain models. `model` keeps its parameters: slots are storage, shapes never change.

    * `optimizer`: one, a list of them, or None. A grown or pruned slot's rows are reset in it, to what a fresh
      parameter's state holds; an fp32 master copy (a state key with "master" in it) takes the parameter's new value;
      step counters stay. This suits torch's optimizers and those of timm, factored state (Adafactor) too. State of
      another shape or type (quantised) is left alone, with a warning. An `OptimizerRows` stands for optimizers that
      keep their state elsewhere.
    * `schedule`: `Schedule`, a dict with its fields, or an int (`every`).
    * `policy`: "dynmoe" with `max_new_experts`, `min_experts` and `patience` (see `DynMoEPolicy`); a dict with the
      "type" of a registered policy and its options; or a callable (record, active bool [E], free_slots,
      silent_windows) -> `Decision`. With a callable, `max_new_experts` > 1 only makes the records keep unrouted
      tokens.
    * `init`: how the network of a grown expert starts: "nearest" (a copy of the active expert whose direction is
      nearest), "mean" (of the active experts), "fresh" (drawn anew, from `seed`), "keep" (as the slot is).
    * `group`: the data-parallel process group over which records are summed; None: the layer's `record_group`.
    * `averages`: averages of the model's weights that follow growth and pruning: modules (AveragedModel, ModelEmaV3)
      or dicts from the names of the model's state dict to tensors. They get the masks and the grown experts, and
      `rebalance` moves their experts too. None: the layers' deep copies that are averages, see `Lineage`.

    Raises ValueError if the model has no adaptive MoE layer or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizersOrRows = None,
        schedule: Schedule | Mapping[str, Any] | int | None = None,
        policy: str | Mapping[str, Any] | Policy = "dynmoe",
        *,
        max_new_experts: int = 1,
        min_experts: int = 1,
        patience: int = 1,
        init: str = "nearest",
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        averages: Iterable[Average] | None = None,
    ) -> None:
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        if type(seed) is not int or abs(seed) >= 2**63:
            raise ValueError(f"seed must be an integer below 2**63, got {seed!r}")
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise ValueError(f"group must be a process group of torch.distributed or None, got {group!r}")
        self.schedule = Schedule.of(schedule)
        self.policy = _configured_policy(policy, max_new_experts, min_experts, patience)
        self.init = init
        self.group = group
        self.events: list[ExpertEvent] = []
        self._rows = optimizer_rows(optimizer)
        self._histories = gate_histories(model)
        self._layers = list({id(history.layer): history.layer for history in self._histories}.values())
        self._budgets = Budgets(model, group)
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0
        self._window = RecordWindow(self._layers)
        self._by_hand = False  # `begin_window` was called: the schedule counts no more
        self._model: nn.Module | None = model  # None once it was looked at, in the first update
        self._averages: dict[str, list[Any]] = {}  # layers that share a dict's tensors live here alone
        if averages is not None:
            self._averages = averaged_layers({h.name: h.layer for h in self._histories}, averages)

        floor = getattr(self.policy, "min_experts", 1)
        most = max(max_new_experts, getattr(self.policy, "max_new_experts", 1))
        keeps = max(getattr(self.policy, "keeps_tokens", 0), SAMPLED_TOKENS if most > 1 else 0)
        for history in self._histories:
            history.check_whole(init)
            if floor > len(history.silent_windows):
                raise ValueError(
                    f"min_experts must be at most the slots of every layer, got {floor} "
                    f"and {history.key} has {len(history.silent_windows)}"
                )
            history.record.keep_at_least(keeps)
            if averages is not None:
                history.layer.lineage.choose(self._averages[history.name])
        if not self._rows.optimizers and any(p.requires_grad for p in model.parameters()):
            logger.warning("no optimizer given: moments of grown and pruned experts will not be reset")
        self._window.set(self.schedule.opens_at(0))

    @property
    def steps(self) -> int:
        """Optimizer steps counted so far."""
        return self._step

    @property
    def updates_next(self) -> bool:
        """Whether the next `step` is one that updates experts."""
        return self._window.ended if self._by_hand else self.schedule.updates_at(self._step + 1)

    @torch.no_grad()
    def step(self) -> list[ExpertEvent]:
        """Count one optimizer step: move budgets' shifts, open and close windows, update experts as scheduled.

        Returns the events of this step, oldest first; they are also in `events` and logged at level INFO. All
        ranks of `group` must call it equally often. Raises ValueError, and changes no expert, if a custom policy's
        decision does not fit its layer; RuntimeError, and counts nothing, if its record window is not there any more,
        because another controller has opened one of its own.
        """
        self._window.check()
        updates = self.updates_next
        self._step += 1
        self._budgets.step()
        events: list[ExpertEvent] = []
        if updates:
            if self._window.open:
                events = self._update()
            else:
                logger.warning("step %d: no update, the loaded state had no open record window", self._step)
            self._window.set(False)
        if not self._by_hand and self.schedule.opens_at(self._step):
            self._window.set(True)
        return events

    def begin_window(self) -> None:
        """Open an empty record window now. From here on `begin_window` and `end_window` decide, not the schedule.

        A second call before the next `step` goes on in the same window: in each micro-batch of a step, say.
        """
        self.leave_schedule()
        self._window.begin(self._step)

    def end_window(self) -> None:
        """Record no further forwards; the next `step` updates the experts from the window of `begin_window`.

        Raises ValueError if none is open.
        """
        if not self._by_hand or not self._window.open:
            raise ValueError("no record window is open that could end: call begin_window() before the forwards")
        self._window.end()

    def leave_schedule(self) -> None:
        """Close the schedule's record window and follow it no more: `begin_window` opens the next."""
        if not self._by_hand:
            self._by_hand = True
            self._window.set(False)

    def close(self) -> None:
        """Stop recording; for a controller that will not step again. Events and state can still be read.

        The state is that of the open window, so that a resumed training goes on in it. A window that another
        controller has opened since stays open.
        """
        self._window.close()

    @torch.no_grad()
    def rebalance(self, threshold: float = 1.2) -> RebalanceReport:
        """Swap experts between ranks to even out the load of the last window.

        A layer is rebalanced if its most loaded rank had more than `threshold` (at least 1) times the ranks' mean
        load. A greedy search swaps few slots between ranks: expert weights, optimizer rows, gate columns, records
        and counts of silent windows. The layer's function stays the same up to the order of sums. A layer stays as it
        is on one rank, without a gain, or if it also has fixed-k gates. All ranks must make this call, after `step()`.

        Returns the moves, the load before and the load expected after them; also logged at level INFO.
        """
        threshold = number("threshold", threshold, 1)
        for history in self._histories:
            history.check_whole()
        layers = [
            rebalance_layer([history for history in self._histories if history.layer is layer], self._rows, threshold)
            for layer in self._layers
        ]
        report = RebalanceReport(self._step, tuple(layers))
        for line in str(report).splitlines():
            logger.info("%s", line)
        return report

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The state that a resumed run needs beside those of model and optimizer, even in the middle of a window.

        `{"tensors": {name: Tensor}, "values": {...}}`: "tensors" fits safetensors, "values" fits JSON (numbers,
        strings, lists, dicts). Tensors are copies.
        """
        tensors: dict[str, Tensor] = {"generator": self._generator.get_state()}
        gates: dict[str, Any] = {}
        for history in self._histories:
            record: dict[str, Any] = {}
            for name, value in history.record.state_dict().items():
                if isinstance(value, Tensor):
                    tensors[f"{history.key}:{name}"] = value
                else:
                    record[name] = value
            gates[history.key] = {**history.state_values(), "record": record}
        values = {
            "version": STATE_VERSION,
            "step": self._step,
            "window_open": self._window.open,
            "by_hand": {"begun": self._window.begun, "ended": self._window.ended} if self._by_hand else None,
            "events": [asdict(event) for event in self.events],
            "gates": gates,
        }
        return {"tensors": tensors, "values": values}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from a `state_dict()`; model and optimizer load their own states.

        Raises ValueError, and changes nothing, if the state is incomplete or its layers or slot counts differ.
        """
        values, records, events, generator = self._checked_state(state)
        self._step, self.events, self._generator = int(values["step"]), events, generator
        by_hand = values.get("by_hand")  # older versions had the schedule alone
        self._by_hand = by_hand is not None
        # Under another schedule this step may lie outside all windows: an open window would get no update.
        is_open = bool(values["window_open"]) and (self._by_hand or self.schedule.records_at(self._step))
        self._window.set(is_open, by_hand["begun"] if by_hand else -1)
        if is_open and by_hand and by_hand["ended"]:
            self._window.end()
        for history in self._histories:
            history.load_state_values(values["gates"][history.key])
            history.record.load_state_dict(records[history.key])

    def check_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise ValueError if `load_state_dict` would; change nothing."""
        self._checked_state(state)

    def record_groups(self) -> dict[str, Any]:
        """For each gate, the process group over which its record is summed."""
        return {history.key: self._record_group(history) for history in self._histories}

    def merged_records(self, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
        """For each gate, merge the record states of several ranks into one; no states give an empty record."""
        return {history.key: history.record.merged(records[history.key]) for history in self._histories}

    def _record_group(self, history: GateHistory) -> Any:
        return history.layer.record_group if self.group is None else self.group

    def _update(self) -> list[ExpertEvent]:
        for history in self._histories:
            history.check_whole(self.init)
        self._warn_of_what_does_not_learn()
        # Reduce before deciding: a rank that saw no token must take part too.
        for history in self._histories:
            history.record.all_reduce(self._record_group(history))
        decisions = [self._decide(history) for history in self._histories]
        events = []
        for history, decision in zip(self._histories, decisions, strict=True):
            events += self._apply(history, decision)
        for layer in self._layers:
            layer.lineage.follow(layer)
        self.events += events
        for event in events:
            announce(logger, str(event))
        return events

    def _warn_of_what_does_not_learn(self) -> None:
        """In the first update: layers that are no longer the model's, and experts or gates without an optimizer."""
        if self._model is None:
            return
        model, self._model = self._model, None
        inside = {id(module) for module in model.modules()}
        for history in self._histories:
            layer = history.layer
            if id(layer) not in inside:
                logger.warning(
                    "%s was replaced in the model after the controller was made, which still steps the old layer: make "
                    "the controller (and the optimizer) afterwards",
                    history.name or "the layer",
                )
                continue
            for part, module in (("experts", layer.experts), (f"gates.{history.gate}", layer.gates[history.gate])):
                if self._rows.lack(module.parameters(), model):
                    logger.warning(
                        "the optimizer has none of the parameters of %s: they do not learn. Make the optimizer after "
                        "the layer is in the model, call add_param_group, or freeze them by requires_grad_(False)",
                        f"{history.name}.{part}".lstrip("."),
                    )

    def _load(self, layer: nn.Module) -> list[int]:
        """Assignments of each slot in the last window, summed over the layer's adaptive gates."""
        loads = [history.load for history in self._histories if history.layer is layer]
        return [sum(counts) for counts in zip(*loads, strict=True)]

    def _decide(self, history: GateHistory) -> Decision:
        record, active = history.record, history.active
        if int(record.tokens) == 0:
            logger.info("step %d: no token in the window of %s", self._step, history.key)
            return Decision()
        busy, alive = (record.counts > 0).tolist(), active.tolist()
        free = int((~active.cpu() & ~history.used_elsewhere).sum())
        history.silent_windows = [
            n + 1 if alive[slot] and not busy[slot] else 0 for slot, n in enumerate(history.silent_windows)
        ]
        history.load = record.counts.tolist()
        decision = self.policy(record, active, free, list(history.silent_windows))
        return checked_decision(decision, alive, record.unrouted_sum, history.key)

    def _apply(self, history: GateHistory, decision: Decision) -> list[ExpertEvent]:
        if not decision.prune and not decision.grow:
            return []
        experts = int(history.active.sum())
        changes: list[ExpertChange] = history.layer.update_experts(
            decision, gate_index=history.gate, init=self.init, generator=self._generator, load=self._load(history.layer)
        )
        events = []
        for change in changes:
            experts += 1 if change.action == "grown" else -1
            events.append(
                ExpertEvent(self._step, history.name, history.gate, change.slot, change.action, change.reason, experts)
            )
        for slot in sorted({change.slot for change in changes}):
            history.silent_windows[slot] = history.load[slot] = 0
            for param, index in history.reset_parameters(slot):
                self._rows.reset(param, index)
        return events

    def _checked_state(
        self, state: Mapping[str, Mapping[str, Any]]
    ) -> tuple[Mapping[str, Any], dict[str, dict[str, Any]], list[ExpertEvent], torch.Generator]:
        """Plain values, record states by gate, events and generator; ValueError if the state does not fit."""
        parts = [state.get(name) if isinstance(state, Mapping) else None for name in ("tensors", "values")]
        if not all(isinstance(part, Mapping) for part in parts):
            raise ValueError("state must be a controller's state_dict() with the dicts 'tensors' and 'values'")
        tensors, values = state["tensors"], state["values"]
        missing = {"version", "step", "window_open", "events", "gates"} - set(values)
        if missing or "generator" not in tensors:
            raise ValueError(f"state lacks {', '.join(sorted(missing)) or 'the tensor generator'}")
        if values["version"] != STATE_VERSION:
            raise ValueError(f"state has version {values['version']!r}, this package reads {STATE_VERSION}")
        if type(values["step"]) is not int or values["step"] < 0:
            raise ValueError(f"state has step {values['step']!r}, must be an integer of at least 0")
        gates = values["gates"]
        unexpected = sorted(set(gates) - {history.key for history in self._histories})
        absent = sorted({history.key for history in self._histories} - set(gates))
        if unexpected or absent:
            raise ValueError(f"state does not fit the model: only it has {unexpected}, only the model has {absent}")
        records = {history.key: history.checked_state(gates[history.key], tensors) for history in self._histories}
        try:
            events = [ExpertEvent(**event) for event in values["events"]]
            generator = torch.Generator()
            generator.set_state(tensors["generator"].cpu())
        except (TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"state has events or a generator that cannot be read: {error}") from error
        return values, records, events, generator


def records_of(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records in a controller's `state_dict()`, by gate."""
    records = {key: dict(gate["record"]) for key, gate in state["values"]["gates"].items()}
    for name, tensor in state["tensors"].items():
        key, _, field = name.rpartition(":")
        if key in records:
            records[key][field] = tensor
    return records


def with_records(
    state: Mapping[str, Mapping[str, Any]], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """A copy of a controller's `state_dict()` with the given gates' records replaced."""
    tensors, gates = dict(state["tensors"]), dict(state["values"]["gates"])
    for key, record in records.items():
        if key in gates:
            plain = {name: value for name, value in record.items() if not isinstance(value, Tensor)}
            gates[key] = {**gates[key], "record": plain}
            tensors |= {f"{key}:{name}": value for name, value in record.items() if isinstance(value, Tensor)}
    return {"tensors": tensors, "values": {**state["values"], "gates": gates}}


def _configured_policy(
    policy: str | Mapping[str, Any] | Policy, max_new_experts: int, min_experts: int, patience: int
) -> Policy:
    options = {"max_new_experts": max_new_experts, "min_experts": min_experts, "patience": patience}
    DynMoEPolicy(**options)  # refuses values out of range
    if policy == "dynmoe":
        return make_policy(policy, **options)
    for name, value in options.items():
        if value != 1 and not (name == "max_new_experts" and callable(policy)):
            raise ValueError(f"{name}={value} configures policy 'dynmoe'; give it to {policy!r} itself")
    return make_policy(policy)
