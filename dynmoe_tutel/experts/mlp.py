"""The forward that `ffn` and `llama_ffn` experts share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..kernels import ACTIVATIONS, ExpertWeights, Router, activation_name, grouped_ffn, grouped_linear, top_any_ffn
from ..kernels.operation import ENGINES
from ..routing import Routing
from ..validation import describe, warn_once
from .base import Activation, Experts

RECOMPUTE = ("none", "up")
MLP_KEYS = ("hidden_size_per_expert", "activation_fn", "recompute", "engine")


class GroupedMLP(Experts):
    """The common forward of `ffn` and `llama_ffn`: fused if the activation is known, else in stages.

    `weights()` gives (w1 [E, D, H], b1, w3 or None, b3, w2 [E, H, O], b2). Shared options:

    * `recompute`: "none" keeps x and the pre-activations for the backward; "up" keeps only x, and the backward repeats
      the first (and gated) products, with bitwise equal gradients. Needs an activation that runs fused.
    * `engine`: "auto" (Triton's kernels on a GPU, a loop over the experts on a CPU), "triton", "grouped_mm"
      (torch.nn.functional.grouped_mm), "numba" (the loop on a CPU, with compiled passes; what "auto" takes there if
      numba is installed) or "torch" (the loop everywhere). float64 always takes torch's loop.
    """

    dense_names: ClassVar[dict[str, str]]  # gate, up, up_bias, down, down_bias of a dense FFN -> our parameter

    def __init__(
        self, model_dim: int, local_slots: int, activation: Activation, recompute: str = "none", engine: str = "auto"
    ) -> None:
        super().__init__(model_dim, local_slots)
        for name, value, allowed in (("recompute", recompute, RECOMPUTE), ("engine", engine, ENGINES)):
            if value not in allowed:
                raise ValueError(f"experts[{name!r}] = {value!r}: allowed are {', '.join(map(repr, allowed))}")
        if recompute == "up" and activation_name(activation) is None:
            function = getattr(activation, "__name__", type(activation).__name__)
            raise ValueError(
                f"experts['recompute'] = 'up' with the activation {function}, which does not run fused: give one of "
                f"{', '.join(ACTIVATIONS)}, or 'none' (and torch.utils.checkpoint, to save memory)"
            )
        self.activation_fn = activation
        self.recompute, self.engine = recompute, engine

    def dense_view(self, role: str) -> Tensor | None:
        """The tensor of a `role` in `dense_names`, to read or fill: [E, H, ...], a row a neuron; "down_bias" [E, O]."""
        name = self.dense_names.get(role)
        return None if name is None else getattr(self, name)

    def dense_parameters(self, role: str) -> list[nn.Parameter]:
        """The parameters that hold a `role`; none for a role that these experts lack."""
        parameter = getattr(self, self.dense_names.get(role, ""), None)
        return [] if parameter is None else [parameter]

    @property
    def activation(self) -> str | None:
        """The name of `activation_fn` if it runs fused, else None."""
        return activation_name(self.activation_fn)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]:
        raise NotImplementedError

    def _read_weights(self) -> ExpertWeights:
        """`weights()`, each read once: a parametrised one is computed at each reading."""
        weights = ExpertWeights(*self.weights())
        if not all(weight is None or weight.is_floating_point() for weight in weights):
            name = next(n for n in self.slot_names if not getattr(self, n).is_floating_point())
            tensor = getattr(self, name)
            raise ValueError(
                f"experts.{name} is {tensor.dtype} {list(tensor.shape)}: packed or quantised tensors cannot be read. "
                "Parametrise it by its dequantised value (torch.nn.utils.parametrize), or keep it in a float dtype"
            )
        return weights

    def _keeps(self, *tensors: Tensor | None) -> bool:
        """Whether a forward of `tensors` keeps pre-activations for its backward."""
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return learns and self.recompute == "none"

    def fuses(self, routing: Routing) -> bool:
        """Whether the gate is top-any and the kernels know the activation."""
        return routing.router is not None and self.activation is not None and not self.skip_expert

    def mean(self, x_TD: Tensor, routing: Routing, combine_gradient: str) -> Tensor:
        """The mean of each token's experts, [T, output_dim]."""
        router, activation = routing.router, self.activation
        assert router is not None
        assert activation is not None
        weights = self._read_weights()
        gate = Router(
            router.vectors,
            router.thresholds,
            router.scale,
            routing.scores.detach(),
            router.inv_norm,
            routing.unrouted,
            routing.bits,
            *router.unit,
        )
        y_TO, _, _ = top_any_ffn(
            x_TD,
            gate,
            routing.index,
            weights,
            activation,
            combine_gradient == "normalized",
            self.compute_dtype(x_TD, weights.w1_EDH),
            self._keeps(x_TD, router.vectors, router.thresholds, router.scale, *weights),
            self.engine,
        )
        return y_TO

    def forward(
        self, x_TD: Tensor, routing: Routing, gate_A: Tensor, token_shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """Expert rows [rows, output_dim]; for fixed-k gates times their weights."""
        apply_gate = routing.weights is not None
        if self.skip_expert:
            rows = routing.dispatch(x_TD.to(self.compute_dtype(x_TD)))
            return rows * gate_A.unsqueeze(1).to(rows.dtype) if apply_gate else rows
        weights = self._read_weights()
        dtype = self.compute_dtype(x_TD, weights.w1_EDH)
        x = x_TD.to(dtype)
        activation = self.activation
        if activation is None:
            w1, b1, w3, b3, w2, b2 = weights
            if self.recompute != "none" and not torch.compiler.is_compiling():
                warn_once("experts['recompute'] is ignored: activation_fn was changed to one that does not run fused")
            rows = routing.dispatch(x)
            w1, w2 = w1.to(dtype), w2.to(dtype)
            b1, w3, b3, b2 = (None if w is None else w.to(dtype) for w in (b1, w3, b3, b2))
            h = grouped_linear(rows, routing.expert_offsets, w1, b1, self.engine)
            a = self.activation_fn(h)
            if not isinstance(a, Tensor) or a.shape != h.shape:
                raise ValueError(f"activation_fn returned {describe(a)} for {list(h.shape)}: it must keep the shape")
            if w3 is not None:
                a = a * grouped_linear(rows, routing.expert_offsets, w3, b3, self.engine)
            rows = grouped_linear(a, routing.expert_offsets, w2, b2, self.engine)
            return rows * gate_A.unsqueeze(1).to(dtype)
        keeps = self._keeps(x, gate_A, *weights)
        rows, _, _ = grouped_ffn(x, gate_A, routing.index, weights, activation, apply_gate, keeps, self.engine)
        return rows
