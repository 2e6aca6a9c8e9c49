"""Two-layer expert networks, Tutel's `ffn`: y = act(x W1^T + b1) W2 + b2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..initialization import fill_linear
from ..validation import flag, positive_int
from .base import Activation, activation_function, check_activation, expert_kind
from .mlp import MLP_KEYS, GroupedMLP

_KEYS = ("activation_fn_with_self", "output_dim", "has_fc1_bias", "has_fc2_bias")


@expert_kind("ffn", (*MLP_KEYS, *_KEYS))
class FFNExperts(GroupedMLP):
    """E slots of D -> H -> output_dim.

    `batched_fc1_w` [E, H, D], `batched_fc1_bias` [E, H], `batched_fc2_w` [E, H, output_dim] (y = a @ w),
    `batched_fc2_bias` [E, output_dim]; each slot is drawn like two nn.Linear, as in Tutel 0.3. `activation_fn` takes
    the pre-activations of all rows, [rows, H]; the default is relu, as in Tutel. gelu, relu, silu (functions or
    modules) and the names in `kernels.ACTIVATIONS` (such as "squared_relu") run fused. `recompute` and `engine`: see
    `GroupedMLP`.
    """

    dense_names: ClassVar[dict[str, str]] = {
        "up": "batched_fc1_w",
        "up_bias": "batched_fc1_bias",
        "down": "batched_fc2_w",
        "down_bias": "batched_fc2_bias",
    }
    slot_names = tuple(dense_names.values())
    batched_fc1_bias: nn.Parameter | None
    batched_fc2_bias: nn.Parameter | None

    def __init__(
        self,
        model_dim: int,
        local_slots: int,
        *,
        hidden_size_per_expert: int = 0,
        activation_fn: Activation | str | None = None,
        activation_fn_with_self: Callable[[Tensor, Any], Tensor] | None = None,
        output_dim: int | None = None,
        has_fc1_bias: bool = True,
        has_fc2_bias: bool = True,
        recompute: str = "none",
        engine: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        hidden = positive_int("experts['hidden_size_per_expert']", hidden_size_per_expert)
        if activation_fn is not None and activation_fn_with_self is not None:
            raise ValueError("experts: give one of activation_fn and activation_fn_with_self, not both")
        check_activation("activation_fn_with_self", activation_fn_with_self)
        activation = activation_function("activation_fn", activation_fn, F.relu)
        if activation_fn_with_self is not None:
            activation = partial(_with_self, activation_fn_with_self, self)
        super().__init__(model_dim, local_slots, activation, recompute, engine)
        self.output_dim = model_dim if output_dim is None else positive_int("experts['output_dim']", output_dim)
        self.hidden_size_per_expert = hidden
        self.batched_fc1_w = nn.Parameter(torch.empty(local_slots, hidden, model_dim))
        self.batched_fc2_w = nn.Parameter(torch.empty(local_slots, hidden, self.output_dim))
        has_fc1_bias, has_fc2_bias = (
            flag(f"experts['has_fc{i}_bias']", value) for i, value in ((1, has_fc1_bias), (2, has_fc2_bias))
        )
        for name, width, wanted in (
            ("batched_fc1_bias", hidden, has_fc1_bias),
            ("batched_fc2_bias", self.output_dim, has_fc2_bias),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(local_slots, width)) if wanted else None)
        self.draw(generator)

    def reset_slot(self, slot: int, generator: torch.Generator | None) -> None:
        """Draw a slot's weights anew: the bits of an nn.Linear(D, H), then of an nn.Linear(H, output_dim)."""
        self.check_written()
        b1, b2 = (None if b is None else b.detach()[slot] for b in (self.batched_fc1_bias, self.batched_fc2_bias))
        fill_linear(self.batched_fc1_w.detach()[slot], b1, generator)
        fill_linear(self.batched_fc2_w.detach()[slot], b2, generator, transposed=True)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Views in the kernels' order."""
        w1 = self.batched_fc1_w.transpose(1, 2)
        return w1, self.batched_fc1_bias, None, None, self.batched_fc2_w, self.batched_fc2_bias

    def mean_keys(self, value_norm_weighted: bool) -> Tensor:
        """The mean of fc1_w over H, [E, D] fp32, optionally weighted by the norms of fc2_w's rows."""
        fc1_w = self.batched_fc1_w.float()
        if not value_norm_weighted:
            return fc1_w.mean(dim=1)
        norm_EH1 = torch.linalg.vector_norm(self.batched_fc2_w.float(), dim=2, keepdim=True)
        return (fc1_w * F.normalize(norm_EH1, p=1, dim=1)).sum(dim=1)

    def extra_repr(self) -> str:
        return (
            f"model_dim={self.model_dim}, hidden_size={self.hidden_size_per_expert}, output_dim={self.output_dim}, "
            f"slots={self.local_slots}, activation={self.activation or self.activation_fn}"
        )


def _with_self(function: Callable[[Tensor, Any], Tensor], experts: FFNExperts, h: Tensor) -> Tensor:
    return function(h, experts)
