"""What every expert network is: a module from tokens and a `Routing` to expert rows, with per-slot surgery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..routing import Routing

SlotParameter = tuple[nn.Parameter, tuple[Any, ...]]  # a parameter and the index of the slot's entries in it


class Experts(nn.Module):
    """Base of all expert networks: E slots of networks D -> output_dim."""

    def __init__(self, model_dim: int, slots: int) -> None:
        super().__init__()
        self.model_dim, self.slots = model_dim, slots
        self.output_dim = model_dim
        self.skip_expert = False  # Tutel's SKIP_EXPERT: experts are the identity

    def forward(self, x_TD: Tensor, routing: Routing, gate_A: Tensor) -> Tensor:
        """Expert rows [rows, output_dim] for tokens [T, D]; `gate_A` [rows] from `routing.row_gates`."""
        raise NotImplementedError

    def compute_dtype(self, x_TD: Tensor) -> torch.dtype:
        """autocast's dtype where it is on (fp64 stays), else that of the weights, as Tutel casts."""
        parameter = next(self.parameters(), None)
        dtype = x_TD.dtype if parameter is None else parameter.dtype
        device = x_TD.device.type
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return dtype

    def slot_parameters(self, slot: int) -> list[SlotParameter]:
        """The parameters that hold a slot, each with the index of its entries; all have the slots first."""
        return [(p, (slot,)) for p in self.parameters() if p.shape[:1] == (self.slots,)]

    @torch.no_grad()
    def copy_slot(self, target: int, sources: list[int]) -> None:
        """Fill slot `target` with the mean of the slots `sources`: one source is an exact copy."""
        of_sources = [self.slot_parameters(source) for source in sources]
        for i, (parameter, index) in enumerate(self.slot_parameters(target)):
            values = [params[i][0][params[i][1]] for params in of_sources]
            parameter[index] = values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)

    def reset_slot(self, slot: int, generator: torch.Generator) -> None:
        """Draw a slot's weights anew from `generator`, by the law of the start."""
        raise NotImplementedError


def check_activation(name: str, function: object) -> None:
    """ValueError unless `function` is None or can be called on pre-activations."""
    if function is not None and (not callable(function) or isinstance(function, type)):
        hint = " (an instance, not the class)" if isinstance(function, type) else ""
        raise ValueError(f"experts[{name!r}] = {function!r}: give a function or module, [rows, H] to [rows, H]{hint}")


@torch.no_grad()
def fill_uniform(p: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """U(-bound, bound) in place, drawn on the CPU where a private generator is given."""
    if p.is_meta:
        return
    if generator is None:
        p.uniform_(-bound, bound)
    else:
        p.copy_(torch.empty(p.shape, device="cpu").uniform_(-bound, bound, generator=generator))


class GroupedMLP(Experts):
    """The common forward of `ffn` and `llama_ffn`: fused where the activation is known, else by stages.

    `weights()` gives (w1 [E, D, H], b1, w3 or None, b3, w2 [E, H, O], b2).
    """

    def __init__(self, model_dim: int, slots: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model_dim, slots)
        self.activation_fn = activation

    @property
    def activation(self) -> str | None:
        """The name of `activation_fn` where it runs fused, else None."""
        return kernels.activation_name(self.activation_fn)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]:
        raise NotImplementedError

    def forward(self, x_TD: Tensor, routing: Routing, gate_A: Tensor) -> Tensor:
        """Rows [rows, output_dim], those of fixed-k gates times their weights."""
        dtype = self.compute_dtype(x_TD)
        apply_gate = routing.weights is not None
        x = x_TD.to(dtype)
        if self.skip_expert:
            rows = routing.dispatch(x)
            return rows * gate_A.unsqueeze(1).to(dtype) if apply_gate else rows
        w1, b1, w3, b3, w2, b2 = self.weights()
        activation = self.activation
        if activation is None:
            rows = routing.dispatch(x)
            w1, w2 = w1.to(dtype), w2.to(dtype)
            b1, w3, b3, b2 = (None if w is None else w.to(dtype) for w in (b1, w3, b3, b2))
            h = kernels.grouped_linear(rows, routing.expert_offsets, w1, b1)
            a = self.activation_fn(h)
            if a.shape != h.shape:
                raise ValueError(f"activation_fn made {list(a.shape)} of {list(h.shape)}: it must keep the shape")
            if w3 is not None:
                a = a * kernels.grouped_linear(rows, routing.expert_offsets, w3, b3)
            rows = kernels.grouped_linear(a, routing.expert_offsets, w2, b2)
            return rows * gate_A.unsqueeze(1).to(dtype)
        save = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, gate_A, w1, b1, w3, b3, w2, b2)
        )
        rows, _, _ = kernels.grouped_ffn(
            x,
            gate_A,
            routing.expert_offsets,
            routing.token_offsets,
            routing.token_of_row,
            routing.row_of_assignment,
            w1,
            b1,
            w3,
            b3,
            w2,
            b2,
            activation,
            apply_gate,
            save,
        )
        return rows
