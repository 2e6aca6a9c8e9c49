"""A warning for a layer that trains nothing: its gate has routed no token for many forwards."""

from __future__ import annotations

import logging

from .capacity import LateCount
from .routing import Routing

__all__ = ["SILENT_FORWARDS", "SilenceWatch"]

SILENT_FORWARDS = 100  # training forwards without a routed token before the warning
GPU_STRIDE = 7  # on a GPU one forward of so many is looked at; a prime, for batches that take turns

_log = logging.getLogger("dynmoe_tutel")


class SilenceWatch:
    """Looks at a layer's training forwards and warns once; it never waits for a GPU, whose counts it reads late."""

    def __init__(self) -> None:
        self._forwards = self._silent = 0
        self._warned = False
        self._late = LateCount()

    def see(self, routing: Routing) -> None:
        """Count one training forward; one without tokens does not count."""
        if routing.num_tokens == 0:
            return
        device = routing.expert_offsets.device.type
        stride = 1 if device == "cpu" else GPU_STRIDE
        self._forwards += 1
        if self._warned or self._forwards % stride or device not in ("cpu", "cuda"):
            return
        count = routing.num_assignments
        routed = int(count) if device == "cpu" else self._late.value(count)
        if routed is None:
            return
        self._silent = 0 if routed else self._silent + stride
        if self._silent >= SILENT_FORWARDS:
            self._warned = True
            _log.warning(
                "a layer of %d slots has routed no token in its last %d training forwards: its output is 0 and nothing "
                "in it trains. Start with more experts (num_experts_per_device), let experts grow (ExpertController, "
                "or begin_record_routing() and adaptive_update_experts()), or lower the thresholds (gates[0].gates)",
                routing.num_experts,
                self._silent,
            )
