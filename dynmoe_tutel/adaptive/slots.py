"""The adaptive process as methods of the layer: record windows, and slots grown and pruned in place.

The base of `MoELayer`, by upstream's method names. What a window decides is in `policy`; the schedule and the
optimizer's rows are the controller's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..experts import Experts, FFNExperts
from ..experts.base import SlotParameter
from ..gates import Gate, TopKGate
from ..parallel.collectives import Wire, gathered
from ..parallel.placement import slot_to_grow
from .policy import Decision, DynMoEPolicy, ExpertChange, unit_direction
from .records import RoutingRecord

_log = logging.getLogger("dynmoe_tutel")
INITS = ("nearest", "mean", "fresh", "keep")


class AdaptiveExperts(nn.Module):
    """Recording, growing and pruning of a layer with `gates`, `experts` and `records`."""

    gates: nn.ModuleList
    experts: Experts
    records: list[RoutingRecord]
    record_routing: bool
    record_eval: bool
    slots: int
    group: Any  # the ranks that divide the slots, where they do
    world_size: int
    sharded_count: int
    wire: Wire | None
    record_group: Any
    expert_slots: Any
    one_score_gate: bool
    normalize_one_score_gate: bool
    value_norm_weighted: bool
    update_momentum: float
    _num_global_experts: Tensor

    @property
    def record(self) -> RoutingRecord:
        """The record of the first gate; `records` has one for each."""
        return self.records[0]

    def begin_record_routing(self, record_eval: bool = False) -> None:
        """Open an empty record window. Only training forwards are recorded, unless `record_eval`."""
        self.reset_record_routing()
        self.record_routing, self.record_eval = True, record_eval

    def end_record_routing(self) -> None:
        """Close the window; the record stays to be read."""
        self.record_routing = False

    def reset_record_routing(self) -> None:
        """Empty the records of all gates."""
        for record in self.records:
            record.reset(self._num_global_experts.device)

    def get_routing_records(self) -> Tensor:
        """Assignments of each slot in the window, [E] int64, of the first gate."""
        return self.record.counts.clone()

    def get_sample_records(self) -> Tensor | None:
        """Sum of the unrouted tokens of the window, [D] fp32, or None if there was none."""
        return self.record.unrouted_sum.clone() if int(self.record.unrouted_tokens) else None

    def adaptive_update_experts(self, gate_index: int = 0) -> list[ExpertChange]:
        """Prune and grow by the default policy from the record, summed over `record_group`'s ranks.

        Recording goes on with an empty record: a window is used once. Returns what changed. No optimizer is touched:
        with one that has state, use `ExpertController`. ValueError where no window is open, or the gate has no
        thresholds.
        """
        gate = self._adaptive_gate(gate_index)
        if not self.record_routing:
            raise ValueError("no record window is open: call begin_record_routing() before the forwards to judge by")
        record = self.records[gate_index]
        record.all_reduce(self.record_group)
        active_E = gate.active()
        decision = DynMoEPolicy()(record, active_E, int((~active_E).sum()), [1] * gate.slots)
        load = record.counts.tolist()
        record.reset()
        changes = self.update_experts(decision, gate_index, load=load)
        after = int(gate.active().sum())
        _log.info("adaptive update: from %d to %d experts%s", int(active_E.sum()), after, _summary(changes))
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

        Where ranks divide the slots, growth takes the lowest free slot of the rank that is least loaded by `load`
        (assignments of each slot; None: none), an expert grown before it in this update counting as the mean of all.

        `init` of a grown slot's expert: "nearest" (copy of the active expert whose w is nearest), "mean" (of the active
        ones), "fresh" (drawn anew from `generator`, which it needs), "keep" (what the slot held, as upstream). The last
        active expert is never pruned; growth without a free slot is left out. Call it after the optimizer's step.
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
        changes = []
        for slot, reason in decision.prune:
            if int(gate.active().sum()) > 1 and bool(gate.active()[slot]):
                gate.deactivate(slot)
                load_E[slot] = 0
                changes.append(ExpertChange(slot, "pruned", reason))
        sources_E = gate.active()  # not those grown a moment ago
        mean_load = sum(load_E) // max(1, int(sources_E.sum()))
        for w_D, reason in grow:
            free = self._free_slot(load_E)
            if free is None:
                break
            load_E[free] = mean_load
            self._fill_slot(gate, free, w_D, init, sources_E, generator)
            gate.activate(free, w_D)
            changes.append(ExpertChange(free, "grown", reason))
        self._num_global_experts.fill_(int(self._used_slots().sum()))
        return changes

    def slot_parameters(self, slot: int, gate_index: int = 0) -> list[SlotParameter]:
        """Every parameter that holds the slot, with the index of its entries: routing vector, threshold, expert."""
        gate = self._adaptive_gate(gate_index)
        self._check_slot("slot", slot)
        router: list[SlotParameter] = [(gate.sim_matrix, (slice(None), slot)), (gate.gates, (slot,))]
        return router + self.expert_slots.slot_parameters(slot)

    def _adaptive_gate(self, gate_index: int) -> Any:
        gate = self._gate(gate_index)
        if not gate.adaptive:
            raise ValueError(
                f"gate {gate_index} is a {type(gate).__name__}, whose number of experts is fixed: experts grow and are "
                "pruned with gates of type top_any, gated_multi_gate or gated_multi_gate_t"
            )
        return gate

    def _gate(self, gate_index: int) -> Gate:
        raise NotImplementedError

    def _check_slot(self, name: str, slot: object) -> None:
        if type(slot) is not int or not 0 <= slot < self.slots:
            raise ValueError(f"{name} = {slot!r}: this layer has {self.slots} slots, 0 to {self.slots - 1}")

    def _used_slots(self) -> Tensor:
        """[E] bool: slots that some gate has active; gates share the experts."""
        return torch.stack([gate.active() for gate in self.gates]).any(dim=0)  # type: ignore[operator]

    def _free_slot(self, load_E: Sequence[int]) -> int | None:
        """The slot to grow into, of those that no gate uses."""
        free = (~self._used_slots()).nonzero().flatten().tolist()
        return slot_to_grow(free, load_E, self.world_size if self.sharded_count == 1 else 1)

    def _fill_slot(
        self, gate: Any, slot: int, w_D: Tensor, init: str, sources_E: Tensor, generator: torch.Generator | None
    ) -> None:
        if init == "nearest":
            cos_E = F.normalize(gate.sim_matrix.detach().float(), dim=0).t() @ w_D.float()
            self.expert_slots.copy_slot(slot, [int(cos_E.masked_fill(~sources_E, -torch.inf).argmax())])
        elif init == "mean":
            self.expert_slots.copy_slot(slot, sources_E.nonzero().squeeze(1).tolist())
        elif init == "fresh":
            assert generator is not None
            self.expert_slots.reset_slot(slot, generator)

    @torch.no_grad()
    def update_one_score_gate(self) -> None:
        """EMoE's avg-k gate: wg.weight [E, D] becomes the mean over H of fc1_w, by the layer's options; on all ranks.

        `value_norm_weighted`: the mean is weighted by the norms of fc2_w's rows; `normalize_one_score_gate`: unit rows;
        `update_momentum` m: m * old + (1 - m) * new. Source: EMoE (arXiv 2310.10908).
        """
        gate, experts = self._gate(0), self.experts
        if not self.one_score_gate or not isinstance(gate, TopKGate) or not isinstance(experts, FFNExperts):
            raise ValueError(
                "update_one_score_gate needs one_score_gate = True, a gate of type 'top' and 'ffn' experts"
            )
        keys_ED = experts.mean_keys(self.value_norm_weighted)
        if self.normalize_one_score_gate:
            keys_ED = F.normalize(keys_ED, dim=1)
        if self.wire is not None:
            keys_ED = gathered(keys_ED, self.group)
        gate.set_keys(keys_ED, self.update_momentum)


def _summary(changes: list[ExpertChange]) -> str:
    return "".join(f", slot {change.slot} {change.action}" for change in changes)
