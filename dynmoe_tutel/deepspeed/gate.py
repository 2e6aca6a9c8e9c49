"""The gate of a drop-in layer, with upstream's names: `gate.wg` has the tensors, `gate` the calls and the records.

In a state dict the mask is `active`: DeepSpeed's engine takes any key with "expert" in it for an expert's. Upstream's
name, `experts_mask`, is read too.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.sharded_moe import multiplicative_jitter
from torch import Tensor, nn

from ..adaptive.records import RoutingRecord
from ..gates import Gate, TopAnyGate
from ..kernels import gate_dtype
from ..parts import unwrapped
from ..routing import Capacity, Routing, is_active

JITTER = "Jitter"


class RoutingVectors(TopAnyGate):
    """A top-any gate with upstream's `temperature`, which is no trained parameter, and its mean of all columns' norms.

    Its "simplicity" averages over all slots, also inactive ones, whose columns therefore learn.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(init_t=1.0, **options)
        assert self.temperature is not None
        self.temperature.requires_grad_(False)

    def forward(self, *arguments: Any, **options: Any) -> Routing:
        """As any top-any gate's, with upstream's simplicity."""
        routing = super().forward(*arguments, **options)
        if "simplicity" in routing.aux:
            assert routing.router is not None
            w_DE = routing.router.vectors
            routing.aux["simplicity"] = torch.linalg.vector_norm(w_DE.to(gate_dtype(w_DE)), dim=0).mean()
        return routing

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}active"] = destination.pop(f"{prefix}experts_mask")

    def _load_from_state_dict(self, state_dict, prefix, *arguments):  # type: ignore[no-untyped-def]
        saved, own = f"{prefix}active", f"{prefix}experts_mask"
        if saved in state_dict:
            state_dict[own] = state_dict.pop(saved)
        mask = state_dict.get(own)
        if isinstance(mask, Tensor) and not mask.is_meta and not is_active(mask).any():
            raise ValueError(f"{saved} of the checkpoint has no active expert: a layer has at least one")
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class DynMoEGate(nn.Module):
    """Upstream's module `gate`: what the layer calls. `noisy_gate_policy` "Jitter" shakes the tokens in training.

    `routing_records` [E] fp32, `sample_records` [D] and `total_tokens` are those of the layer's record window, read
    inside a forward with that forward in them.
    """

    k = -1

    def __init__(self, wg: RoutingVectors, noisy_gate_policy: str | None = None) -> None:
        super().__init__()
        self.wg = wg
        self.max_expert_num = wg.slots
        self.noisy_gate_policy = noisy_gate_policy
        self.exp_counts = torch.zeros(wg.slots, dtype=torch.int64)  # of the last forward
        self.record: RoutingRecord | None = None
        self.is_recorded = False  # whether the layer will add the forward that runs to its record
        self._running: Routing | None = None  # a forward that is not in the record yet

    @property
    def itself(self) -> Gate:
        """The routing vectors, for `parts.unwrapped`."""
        return unwrapped(self.wg, Gate)

    def forward(
        self,
        x_TD: Tensor,
        capacity: Capacity = "exact",
        top_k: int | None = None,
        token_mask: Tensor | None = None,
        **limit: Any,
    ) -> Routing:
        """Route the tokens [T, D], shaken by up to one percent of each entry with "Jitter" in training."""
        if self.noisy_gate_policy == JITTER and self.training:
            x_TD = multiplicative_jitter(x_TD.to(gate_dtype(x_TD)), device=x_TD.device)
        routing: Routing = self.wg(x_TD, capacity, top_k, token_mask, **limit)
        self.exp_counts = routing.counts.long()
        self._running = routing if self.is_recorded else None
        return routing

    def end_forward(self) -> None:
        """The layer has recorded the forward, if it is recorded at all."""
        self._running = None

    @property
    def routing_records(self) -> Tensor:
        """Assignments of each slot in the record window, [E] fp32."""
        assert self.record is not None
        counts = self.record.counts.float()
        return counts if self._running is None else counts + self._running.counts

    @property
    def sample_records(self) -> Tensor:
        """Sum of the window's unrouted tokens up to the last forward, [D] fp32."""
        assert self.record is not None
        return self.record.unrouted_sum.clone()

    @property
    def total_tokens(self) -> int:
        """Tokens of the record window; it waits for the device."""
        assert self.record is not None
        running = 0 if self._running is None else int(self._running.real_tokens)
        return int(self.record.tokens) + running

    def __getstate__(self) -> dict[str, Any]:
        """Without a forward that was interrupted, whose graph cannot be copied."""
        return {**self.__dict__, "_running": None}
