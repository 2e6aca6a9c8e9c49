"""Tutel's gate and expert modules, with Tutel's arguments and forwards, for code that builds or recognises them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..experts import FFNExperts
from ..gates import CosineTopKGate as _CosineTopKGate
from ..gates import TopKGate
from ..kernels import gate_dtype
from ..validation import environment_flag, positive_int

__all__ = ["CosineTopKGate", "FusedExpertsNetwork", "LinearTopKGate"]


class _StandsFor(type):
    """`isinstance` against such a class also finds the parts of a layer: instances of the class that it extends."""

    def __instancecheck__(cls, instance: Any) -> bool:
        stands_for = cls.__mro__[1] if cls.__module__ == __name__ else None
        return super().__instancecheck__(instance) if stands_for is None else isinstance(instance, stands_for)


def _gate_options(num_global_experts: int, k: int, options: dict[str, Any]) -> dict[str, Any]:
    experts = positive_int("num_global_experts", num_global_experts)
    common = {"num_experts": experts, "slots": experts, "aux_names": (), "k": min(positive_int("k", k), experts)}
    return {**common, **options}


class LinearTopKGate(TopKGate, metaclass=_StandsFor):
    """`tutel.gates.top.Gate`: tokens [T, D] to logits [T, E], in fp32 (fp64 stays)."""

    def __init__(
        self, model_dim: int, num_global_experts: int, k: int = 1, fp32_gate: bool = False, **options: Any
    ) -> None:
        super().__init__(model_dim=model_dim, **_gate_options(num_global_experts, k, options))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Logits."""
        return self.logits(x.to(gate_dtype(x)))


class CosineTopKGate(_CosineTopKGate, metaclass=_StandsFor):
    """`tutel.gates.cosine_top.Gate`: tokens [T, D] to logits [T, E], in fp32 (fp64 stays)."""

    def __init__(
        self,
        model_dim: int,
        num_global_experts: int,
        k: int = 1,
        fp32_gate: bool = False,
        proj_dim: int = 256,
        init_t: float = 0.5,
        **options: Any,
    ) -> None:
        options |= {"proj_dim": proj_dim, "init_t": init_t}
        super().__init__(model_dim=model_dim, **_gate_options(num_global_experts, k, options))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Logits."""
        return self.logits(x.to(gate_dtype(x)))


class FusedExpertsNetwork(FFNExperts, metaclass=_StandsFor):
    """`tutel.experts.ffn.ExpertModule`: padded rows [E, C, D] to [E, C, output_dim], for a layer's `custom` experts."""

    def __init__(
        self,
        model_dim: int,
        hidden_size_per_expert: int,
        num_experts_per_device: int,
        sharded_count: int = 1,
        **options: Any,
    ) -> None:
        if sharded_count != 1:
            raise ValueError(f"sharded_count = {sharded_count}: an expert split over devices needs Tutel itself")
        super().__init__(model_dim, num_experts_per_device, hidden_size_per_expert=hidden_size_per_expert, **options)
        self.skip_expert = environment_flag("SKIP_EXPERT")

    def forward(self, x: Tensor, ctx: Any) -> Tensor:  # type: ignore[override]
        """Every expert on its rows; `ctx`, the layer's, is not read."""
        if self.skip_expert:
            return x
        h = torch.matmul(x, self.batched_fc1_w.transpose(1, 2))
        if self.batched_fc1_bias is not None:
            h = h + self.batched_fc1_bias.unsqueeze(1)
        y = torch.matmul(self.activation_fn(h), self.batched_fc2_w)
        return y if self.batched_fc2_bias is None else y + self.batched_fc2_bias.unsqueeze(1)
