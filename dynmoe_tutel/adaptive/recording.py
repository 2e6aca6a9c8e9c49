"""`RecordsRouting`: the record window of a layer, with upstream's method names; Tutel's own layers get it too."""

from __future__ import annotations

from collections.abc import Sized
from functools import cached_property
from typing import Any

from torch import Tensor

from .records import RoutingRecord


class RecordsRouting:
    """A window over a layer's forwards, and one `RoutingRecord` a gate. The layer's forward adds to the records.

    A class that has it is an nn.Module with `gates`, `model_dim`, `max_num_global_experts` and a buffer
    `_num_global_experts`. Nothing is allocated before the first use.
    """

    gates: Any
    model_dim: int
    max_num_global_experts: Any
    _num_global_experts: Tensor
    record_routing = False  # a window is open
    record_eval = False  # forwards in eval are recorded too
    record_window = 0  # number of the last window, which tells it from one that was opened later

    @cached_property
    def records(self) -> list[RoutingRecord]:
        """The record of each gate."""
        gates: Sized = self.gates
        made = [RoutingRecord(self.max_num_global_experts, self.model_dim) for _ in range(len(gates))]
        if not self._num_global_experts.is_meta:  # else tensors are put in its place one by one, with no call to follow
            for record in made:
                record.move(self._num_global_experts.device)
        return made

    @property
    def record(self) -> RoutingRecord:
        """The record of the first gate; `records` has one for each."""
        return self.records[0]

    def begin_record_routing(self, record_eval: bool = False) -> None:
        """Open an empty record window. Only training forwards are recorded, unless `record_eval`: those in train mode
        that a backward can follow. Recomputes of gradient checkpointing never are."""
        self.reset_record_routing()
        self.record_routing, self.record_eval = True, record_eval
        self.record_window += 1

    def end_record_routing(self) -> None:
        """Close the window; the record can still be read."""
        self.record_routing = False

    def reset_record_routing(self) -> None:
        """Empty the records of all gates."""
        for record in self.records:
            record.reset(self._num_global_experts.device)

    def get_routing_records(self) -> Tensor:
        """The first gate's assignments of each slot in the window, [E] int64."""
        return self.record.counts.clone()

    def get_sample_records(self) -> Tensor | None:
        """Sum of the window's unrouted tokens, [D] fp32, or None if there was none."""
        return self.record.unrouted_sum.clone() if int(self.record.unrouted_tokens) else None

    def _move_records(self) -> None:
        """Follow the layer to its device: records are not buffers, to stay out of the state dict."""
        for record in self.__dict__.get("records", ()):
            record.move(self._num_global_experts.device)

    def _adaptive_gate(self, gate_index: int) -> Any:
        """The gate; ValueError unless its experts can grow and be pruned."""
        gate = self._gate(gate_index)
        if not getattr(gate, "adaptive", False):
            raise ValueError(
                f"gate {gate_index} is a {type(gate).__name__}, whose number of experts is fixed: experts grow and are "
                "pruned with gates of type top_any, gated_multi_gate or gated_multi_gate_t"
            )
        return gate

    def _gate(self, gate_index: int) -> Any:
        if type(gate_index) is not int or not 0 <= gate_index < len(self.gates):
            raise ValueError(f"gate_index = {gate_index!r}: this layer has gates 0 to {len(self.gates) - 1}")
        return self.gates[gate_index]
