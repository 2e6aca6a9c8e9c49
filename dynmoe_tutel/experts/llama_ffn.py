"""Gated (GLU) expert networks without bias, Tutel's `llama_ffn`: y = (act(x W1) * (x W2)) W3."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..validation import positive_int
from .base import Activation, activation_function, expert_kind
from .mlp import MLP_KEYS, GroupedMLP


@expert_kind("llama_ffn", MLP_KEYS)
class LlamaFFNExperts(GroupedMLP):
    """E slots of D -> H -> D: `W_fc1`, `W_fc2` [E, D, H], `W_fc3` [E, H, D], N(0, 0.01^2) at start; silu by default.

    `activation_fn`, `recompute` and `engine` as for `ffn` experts.
    """

    dense_names: ClassVar[dict[str, str]] = {"gate": "W_fc1", "up": "W_fc2", "down": "W_fc3"}
    slot_names = tuple(dense_names.values())

    def __init__(
        self,
        model_dim: int,
        local_slots: int,
        *,
        hidden_size_per_expert: int = 0,
        activation_fn: Activation | str | None = None,
        recompute: str = "none",
        engine: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        hidden = positive_int("experts['hidden_size_per_expert']", hidden_size_per_expert)
        super().__init__(
            model_dim, local_slots, activation_function("activation_fn", activation_fn, F.silu), recompute, engine
        )
        self.hidden_size_per_expert = hidden
        self.W_fc1 = nn.Parameter(torch.empty(local_slots, model_dim, hidden))
        self.W_fc2 = nn.Parameter(torch.empty(local_slots, model_dim, hidden))
        self.W_fc3 = nn.Parameter(torch.empty(local_slots, hidden, model_dim))
        self.draw(generator)

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None) -> None:
        """Draw all slots, one parameter after the other, as Tutel does."""
        self.check_written()
        first, end = self.first_slot, self.first_slot + self.local_slots
        for parameter in (self.W_fc1, self.W_fc2, self.W_fc3):
            if parameter.is_meta:
                continue
            # torch draws normal numbers in blocks of 16: only slots of whole blocks can be drawn one by one
            step = self.all_slots if parameter[0].numel() % 16 else 1
            for start in range(0, self.all_slots, step):
                drawn = _normal(step, *parameter.shape[1:], generator=generator)
                low, high = max(start, first), min(start + step, end)
                if low < high:
                    parameter[low - first : high - first] = drawn[low - start : high - start]

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator | None) -> None:
        """Draw a slot's weights anew."""
        self.check_written()
        for parameter in (self.W_fc1, self.W_fc2, self.W_fc3):
            if not parameter.is_meta:
                parameter[slot] = _normal(*parameter.shape[1:], generator=generator)

    def dense_view(self, role: str) -> Tensor | None:
        """The weights as views [E, H, D]."""
        tensor = super().dense_view(role)
        return tensor.transpose(1, 2) if tensor is not None and role in ("gate", "up") else tensor

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """The weights in the kernels' order."""
        return self.W_fc1, None, self.W_fc2, None, self.W_fc3, None

    def extra_repr(self) -> str:
        return (
            f"model_dim={self.model_dim}, hidden_size={self.hidden_size_per_expert}, slots={self.local_slots}, "
            f"activation={self.activation or self.activation_fn}"
        )


def _normal(*shape: int, generator: torch.Generator | None) -> Tensor:
    return torch.empty(shape, device="cpu").normal_(0, 0.01, generator=generator)
