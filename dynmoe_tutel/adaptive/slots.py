"""`AdaptiveExperts`: gates, experts, records and placement; it grows and prunes slots in place.

`policy` decides what changes, the controller owns the schedule and the optimizer rows, and `MoELayer` adds the forward.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..experts.base import Experts, SlotParameter
from ..gates import Gate
from ..kernels.norms import unit
from ..layer_state import fit_slots
from ..parallel.collectives import check_alike, copy_from_first, shared_seed
from ..parallel.exchange import Exchange, LocalExchange
from ..parallel.placement import Placement, slot_order, slot_to_grow, spread_swaps
from ..parallel.rank_exchange import RankExchange
from ..parallel.slots import SlotAccess
from ..parts import foreign_parameters, unwrapped, writable
from .events import announce
from .lineage import Lineage
from .policy import Decision, DynMoEPolicy, ExpertChange, unit_direction
from .recording import RecordsRouting

_log = logging.getLogger("dynmoe_tutel")
INITS = ("nearest", "mean", "fresh", "keep")


class AdaptiveExperts(RecordsRouting, nn.Module):
    """Gates [D -> Routing], the expert networks that they share, one record a gate, and the placement of slots.

    It uses `exchange` for the placement and for access to the slots. Buffers have upstream's names:
    `_num_global_experts` [], active experts, and `_max_num_global_experts` [], slots.

    It calls nn.Module's methods by name, not by super(): inside stock Tutel, super() is Tutel's own layer.
    """

    _num_global_experts: Tensor
    _max_num_global_experts: Tensor

    def __init__(
        self, gates: nn.ModuleList, experts: Any, exchange: Exchange, model_dim: int, record_group: Any = None
    ) -> None:
        nn.Module.__init__(self)
        self.model_dim, self.exchange = model_dim, exchange
        self.gates, self.experts = gates, experts
        self.register_buffer("_num_global_experts", torch.tensor(exchange.start))
        self.register_buffer("_max_num_global_experts", torch.tensor(self.slots))
        assert self.records  # made here: under FakeTensorMode they would be fake
        self.record_group = record_group  # ranks over which records are summed; None: all
        self.lineage = Lineage()
        self._marks: dict[str, dict[str, Any]] = {}
        self._mark_experts()
        self.register_load_state_dict_post_hook(_mark_loaded)

    def _mark_experts(self) -> None:
        """Set Tutel's mark on expert parameters, and on new ones the plain attributes of those that they replace.

        Optimizers and gradient reductions look for them, and torch drops them where it replaces a parameter.
        """
        for name, parameter in self.experts.named_parameters():
            for mark, value in self._marks.setdefault(name, {"_tutel_expert": True}).items():
                if not hasattr(parameter, mark):
                    setattr(parameter, mark, value)

    def _note_marks(self) -> None:
        """Remember plain attributes that users set on expert parameters, such as Tutel's `skip_allreduce`."""
        for name, parameter in self.experts.named_parameters():
            marks = self._marks.setdefault(name, {"_tutel_expert": True})
            for mark, value in vars(parameter).items():
                if not mark.startswith("_") and isinstance(value, int | float | str):
                    marks[mark] = value

    def train(self, mode: bool = True) -> Any:
        """Set the mode, as any module; loaders that replace parameters one by one end with it, so it marks them."""
        nn.Module.train(self, mode)
        self._mark_experts()
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set gates, experts, masks and counts as at construction, with an empty record.

        With `seeds` these are the bits of construction; without, they are drawn from the global random state. After
        `to_empty()` this initialises the layer. Raises ValueError if a module of one's own has no `reset_parameters`.
        """
        self.refuse_wrapped("reset_parameters")
        for gate in self.held_gates:
            gate.reset_parameters()
        self.exchange.reset_experts(self.experts)
        self._num_global_experts.fill_(self.exchange.start)
        self._max_num_global_experts.fill_(self.slots)
        self.reset_record_routing()
        self._mark_experts()
        self.lineage.trained = True

    @property
    def placement(self) -> Placement:
        """Which rank holds which slot."""
        return self.exchange.placement

    @property
    def expert_slots(self) -> SlotAccess:
        """Reads and writes expert slots on any rank."""
        return self.exchange.slots(self.experts)

    @property
    def slots(self) -> int:
        """E: expert slots, over all ranks."""
        return self.placement.slots

    @property
    def group(self) -> Any:
        """The process group over which the slots are divided; None in one process."""
        return self.placement.group

    @property
    def world_size(self) -> int:
        """Number of ranks over which the slots are divided."""
        return self.placement.ranks

    @property
    def rank(self) -> int:
        """This process's rank in `group`."""
        return self.placement.rank

    @property
    def sharded_count(self) -> int:
        """Ranks that share one expert."""
        return self.placement.shards

    @property
    def num_global_experts(self) -> int:
        """Number of experts that any gate has active."""
        return int(self._used_slots().sum())

    @property
    def max_num_global_experts(self) -> int:
        """E: slots."""
        return self.slots

    @property
    def num_local_experts(self) -> int:
        """Number of active experts on this rank."""
        first = self.placement.first
        return int(self._used_slots()[first : first + self.placement.local].sum())

    @property
    def max_num_local_experts(self) -> int:
        """Slots on this rank."""
        return self.placement.local

    def adaptive_update_experts(self, gate_index: int = 0) -> list[ExpertChange]:
        """Prune and grow by the default policy, from the record summed over the ranks of `record_group`.

        Recording goes on with an empty record: a window is used once. Returns the changes. Optimizers are not touched:
        if yours has state, use `ExpertController`. Raises ValueError if no window is open or the gate has no
        thresholds.
        """
        gate = self._adaptive_gate(gate_index)
        if not self.record_routing:
            raise ValueError("no record window is open: call begin_record_routing() before the forwards")
        self.check_written(gate_index)
        record = self.records[gate_index]
        record.all_reduce(self.record_group)
        active_E = gate.active()
        decision = DynMoEPolicy()(record, active_E, int((~active_E).sum()), [1] * gate.slots)
        load = record.counts.tolist()
        record.reset()
        changes = self.update_experts(decision, gate_index, load=load)
        after = int(gate.active().sum())
        message = f"adaptive update: from {int(active_E.sum())} to {after} experts{_summary(changes)}"
        if changes:
            announce(_log, message)
        else:
            _log.info("%s", message)
        return changes

    def update_experts(
        self,
        decision: Decision,
        gate_index: int = 0,
        init: str = "nearest",
        generator: torch.Generator | None = None,
        load: Sequence[int] | None = None,
    ) -> list[ExpertChange]:
        """Apply a policy's decision in place: prunes first, then growth into the lowest free slots.

        If slots are divided over ranks, growth takes the lowest free slot of the least loaded rank by `load`
        (assignments of each slot; None: none). An expert grown earlier in this update counts with the mean load.

        `init` fills the grown slot's expert: "nearest" (copy of the active expert whose w is nearest), "mean" (of the
        active experts), "fresh" (drawn anew from `generator`, then required), "keep" (as the slot is, like upstream).
        The last active expert is never pruned; without a free slot nothing grows. Call it after the optimizer's step.
        Averages of the weights follow (`Lineage`): they are the deep copies that are written to and not trained.
        """
        if init not in INITS:
            raise ValueError(f"init = {init!r}: allowed are {', '.join(INITS)}")
        if init == "fresh" and generator is None:
            raise ValueError("init = 'fresh' draws weights: give a torch.Generator as generator")
        gate = self._adaptive_gate(gate_index)
        for slot, _ in decision.prune:
            self._check_slot("the decision prunes slot", slot)
        grow = [(unit_direction(w_D, gate.sim_matrix[:, 0], "the layer"), why) for w_D, why in decision.grow]
        load_E = [0] * self.slots if load is None else list(load)
        if len(load_E) != self.slots:
            raise ValueError(f"load has {len(load_E)} entries: give one for each of {self.slots} slots")
        if grow:
            self.check_written(gate_index, init)
        changes = []
        for slot, reason in decision.prune:
            if int(gate.active().sum()) > 1 and bool(gate.active()[slot]):
                gate.deactivate(slot)
                load_E[slot] = 0
                changes.append(ExpertChange(slot, "pruned", reason))
        sources_E = gate.active()  # copy from experts that existed before this update
        mean_load = sum(load_E) // max(1, int(sources_E.sum()))
        for w_D, reason in grow:
            free = self._free_slot(load_E)
            if free is None:
                break
            load_E[free] = mean_load
            self._fill_slot(gate, free, w_D, init, sources_E, generator)
            gate.activate(free, w_D)
            changes.append(ExpertChange(free, "grown", reason))
        self._count_experts()
        self.lineage.trained = True
        self.lineage.follow(self, {(gate_index, change.slot) for change in changes})
        return changes

    def slot_parameters(self, slot: int, gate_index: int = 0) -> list[SlotParameter]:
        """The slot's entries as (parameter, index): routing vector, threshold, expert."""
        gate = self._adaptive_gate(gate_index)
        self._check_slot("slot", slot)
        router: list[SlotParameter] = [(gate.sim_matrix, (slice(None), slot)), (gate.gates, (slot,))]
        return router + self.expert_slots.slot_parameters(slot)

    @property
    def held_gates(self) -> list[Gate]:
        """The gates, without what tools wrapped around them: to ask and to write. Calls go to `gates`."""
        return [unwrapped(gate, Gate) for gate in self.gates]

    @property
    def held_experts(self) -> Any:
        """The expert networks, without what tools wrapped around them: to ask and to write. Calls go to `experts`."""
        return unwrapped(self.experts, Experts)

    def check_written(self, gate_index: int = 0, init: str = "nearest") -> None:
        """ValueError, by name, if growing or moving an expert would be lost on a parametrised or wrapped part."""
        gate, called = self._gate(gate_index), self.gates[gate_index]
        for name in ("sim_matrix", "gates"):
            writable(f"gate {gate_index}", gate, name)
        beside = foreign_parameters(called, gate)
        if beside and getattr(called, "itself", None) is not gate:
            raise ValueError(
                f"gate {gate_index} is wrapped by a {type(called).__name__} with the parameter {beside[0][0]}, which "
                "changes its routing vectors: experts cannot grow or move. Train the gate itself (PEFT: "
                "modules_to_save)"
            )
        self.expert_slots.check_written(init)

    def refuse_wrapped(self, name: str) -> None:
        """ValueError for an operation `name` that would pass by what tools put around gates and experts."""
        held = [*zip(self.gates, self.held_gates, strict=True), (self.experts, self.held_experts)]
        for part, inner in held:
            if foreign := foreign_parameters(part, inner):
                raise ValueError(
                    f"{name}: a {type(part).__name__} with the parameter {foreign[0][0]} wraps a part of the layer, "
                    "which would be passed by: unwrap it (PEFT: merge_and_unload) before"
                )

    def slot_axes(self) -> dict[int, int]:
        """The axis that counts slots, by the id of each parameter and buffer that has one."""
        axes: dict[int, int] = {}
        for gate in self.gates.modules():
            if isinstance(gate, Gate):
                tensors = {**dict(gate.named_parameters()), **dict(gate.named_buffers())}
                axes.update({id(tensors[name]): axis for name, axis in gate.slot_axes.items() if name in tensors})
        for tensor, index in self._local_tensors():
            if index[0] not in (..., slice(None)) and tensor.shape[:1] == (self.placement.local,):
                axes[id(tensor)] = 0
        return axes

    def _local_tensors(self) -> list[tuple[Tensor, Any]]:
        """Parameters and buffers that hold this rank's first slot, each with the index of its entries."""
        first, slots = self.placement.first, self.expert_slots
        parameters = slots.slot_parameters(first)
        return [*parameters, *slots.slot_tensors(first)[len(parameters) :]]

    def _gate(self, gate_index: int) -> Gate:
        return unwrapped(RecordsRouting._gate(self, gate_index), Gate)

    def _check_slot(self, name: str, slot: object) -> None:
        if type(slot) is not int or not 0 <= slot < self.slots:
            raise ValueError(f"{name} = {slot!r}: this layer has {self.slots} slots, 0 to {self.slots - 1}")

    def _used_slots(self) -> Tensor:
        """[E] bool: the slots that any gate has active; gates share the experts."""
        return torch.stack([gate.active() for gate in self.held_gates]).any(dim=0)

    @torch.no_grad()
    def _count_experts(self) -> None:
        """Set the counts from the masks, which an average of all buffers keeps at 0 and 1, unlike the counts."""
        count = self._num_global_experts
        devices = {gate.active().device for gate in self.held_gates}
        if (
            count.is_meta
            or devices != {count.device}
            or (count.is_inference() and not torch.is_inference_mode_enabled())
        ):
            return  # tensors are being replaced one by one, or cannot be written
        count.copy_(self._used_slots().sum())
        self._max_num_global_experts.fill_(self.slots)

    def _free_slot(self, load_E: Sequence[int]) -> int | None:
        """The slot to grow into: one that no gate uses."""
        free = (~self._used_slots()).nonzero().flatten().tolist()
        return slot_to_grow(free, load_E, self.placement.blocks)

    def _fill_slot(
        self, gate: Any, slot: int, w_D: Tensor, init: str, sources_E: Tensor, generator: torch.Generator | None
    ) -> None:
        if init == "nearest":
            cos_E = unit(gate.sim_matrix.detach().float(), 0).t() @ w_D.float()
            self.expert_slots.copy_slot(slot, [int(cos_E.masked_fill(~sources_E, -torch.inf).argmax())])
        elif init == "mean":
            self.expert_slots.copy_slot(slot, sources_E.nonzero().squeeze(1).tolist())
        elif init == "fresh":
            assert generator is not None
            self.expert_slots.reset_slot(slot, generator)

    def _share_seeds(self, seed: int) -> None:
        """Give gates and experts without a seed one that all ranks have: `reset_parameters` must agree on them."""
        experts = self.held_experts
        if experts.seed is None:
            experts.seed = seed
        for index, gate in enumerate(self.held_gates):
            if gate.seed is None:
                gate.seed = (seed + 1 + index) % 2**63

    @torch.no_grad()
    def bind(self, group: Any) -> None:
        """Divide the experts of this process over the ranks of `group`.

        Every rank takes over the experts and gates of rank 0 and keeps its block of slots, in new parameters: call it
        on all ranks, before you make an optimizer, hooks or ties. Active experts first move to other slots where ranks
        would get unequal numbers; the layer's function stays the same. Raises ValueError if the experts are divided
        already, a record window is open, the ranks' layers differ, or the slots cannot be divided.
        """
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise ValueError(f"group = {group!r}: give a process group of torch.distributed")
        if self.placement.ranks > 1:
            raise ValueError(f"group: the experts are divided over {self.placement.ranks} ranks already")
        if not isinstance(self.exchange, LocalExchange):
            raise ValueError("group: a layer inside Tutel is divided when it is made: give it the group there")
        if self.record_routing:
            raise ValueError("group: a record window is open: call end_record_routing() first")
        placement = Placement.over(self.slots, group)
        if placement.ranks == 1:
            return
        if placement.shards > 1:
            raise ValueError(
                f"group: {self.slots} slots cannot be divided over {placement.ranks} ranks: give a multiple of them"
            )
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        hooked = [name for name, parameter in self.experts.named_parameters() if parameter._backward_hooks]
        own = {
            "tensors": {name: f"{list(tensor.shape)} of {tensor.dtype}" for name, tensor in tensors.items()},
            "gates": [type(gate).__name__ for gate in self.gates],
            "budgets": [str(getattr(gate, "budget", None)) for gate in self.held_gates],
            "experts at start": self.exchange.start,
            "parameters with hooks": hooked,
        }
        check_alike("bind", own, group)
        if hooked:
            raise ValueError(
                f"group: experts.{hooked[0]} has hooks, which its new parameter would lack: add them after"
            )
        self.refuse_wrapped("bind")
        for index, gate in enumerate(self.held_gates):
            if gate.adaptive:
                self.check_written(index)
        self.expert_slots.check_written()
        copy_from_first(self.gates, group)
        copy_from_first(self.experts, group)
        with torch.random.fork_rng(devices=[]):
            self._share_seeds(shared_seed(group))
        self._count_experts()
        self._permute(slot_order(spread_swaps(self._used_slots().tolist(), placement.ranks), self.slots))
        start = self.placement.at_start(self.exchange.start)
        spread = [start[slot] for slot in slot_order(spread_swaps(start, placement.ranks), self.slots)]
        for gate in self.held_gates:
            if gate.adaptive:
                gate.start_with(spread)  # type: ignore[operator]
        self.held_experts.keep_slots(placement.first, placement.local)
        self.exchange = RankExchange(placement, self.exchange.start)
        self._mark_experts()

    def _permute(self, order: list[int]) -> None:
        """Move the expert and gate entries of slot order[i] to slot i."""
        if order == sorted(order):
            return
        if not all(gate.adaptive for gate in self.held_gates):
            raise ValueError("group: active experts of a layer with a fixed-k gate cannot be spread over the ranks")
        experts = self.held_experts
        old = [[t[index].clone() for t, index in experts.slot_tensors(slot)] for slot in range(self.slots)]
        for slot, source in enumerate(order):
            for (tensor, index), value in zip(experts.slot_tensors(slot), old[source], strict=True):
                tensor[index] = value
        for gate, record in zip(self.held_gates, self.records, strict=True):
            gate.permute_slots(order)  # type: ignore[operator]
            record.permute_slots(order)

    def _apply(self, *args: Any, **options: Any) -> Any:
        self._note_marks()
        rests = self.lineage.rests(self)
        moved = nn.Module._apply(self, *args, **options)
        self._mark_experts()
        if rests:
            self.lineage.settle(self)
        self._move_records()
        return moved

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        self._count_experts()
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if isinstance(self.exchange, RankExchange) and hasattr(destination, "_metadata"):
            # records which slots these are: any rank's block would fit by shape
            first = self.placement.first
            destination._metadata[prefix[:-1]]["slots"] = (first, first + self.placement.local)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):  # type: ignore[no-untyped-def]
        self._note_marks()
        fit_slots(self, state_dict, prefix, local_metadata.get("slots"))
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Process groups cannot be copied: the copy uses the same ones."""
        memo[id(self.record_group)] = self.record_group
        memo[id(self)] = copied = type(self).__new__(type(self))
        self._note_marks()
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        self.lineage.add(copied)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As nn.Module's; ValueError for a layer that was pickled before layers had an exchange."""
        if "exchange" not in state:
            raise ValueError(
                "the pickled layer is of an older version of dynmoe_tutel, whose layers cannot be unpickled: make the "
                "layer anew and load its state_dict(), saved with that version"
            )
        nn.Module.__setstate__(self, {"lineage": Lineage(), **state})
        self._mark_experts()


def _mark_loaded(layer: AdaptiveExperts, incompatible: Any) -> None:
    """After `load_state_dict`, which replaces parameters with `assign`."""
    layer._mark_experts()
    layer.lineage.settle(layer)


def _summary(changes: list[ExpertChange]) -> str:
    return "".join(f", slot {change.slot} {change.action}" for change in changes)
