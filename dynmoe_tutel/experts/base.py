"""What every expert network is: a module from tokens and a `Routing` to expert rows, with per-slot surgery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels.activations import has_hooks
from ..kernels.operation import ENGINES
from ..options import warn_once
from ..routing import Routing, describe

__all__ = ["Experts", "GroupedMLP", "has_hooks"]

Activation = Callable[[Tensor], Tensor]
RECOMPUTE = ("none", "up")
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

    def fuses(self, routing: Routing) -> bool:
        """Whether `mean` does in one operation what `routing.row_gates`, these experts and `routing.combine` do."""
        return False

    def mean(self, x_TD: Tensor, routing: Routing, combine_gradient: str) -> Tensor:
        """The mean of each token's experts, [T, output_dim], where `fuses`."""
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


def activation_function(name: str, value: Activation | str | None, default: Activation) -> Activation:
    """The function that the option `name` means: a callable, or a name of `kernels.ACTIVATIONS`; else ValueError."""
    if isinstance(value, str):
        if value not in kernels.ACTIVATIONS:
            names = ", ".join(kernels.ACTIVATIONS)
            raise ValueError(f"experts[{name!r}] = {value!r}: allowed names are {names}; or give a function or module")
        return kernels.ACTIVATIONS[value].value
    check_activation(name, value)
    return default if value is None else value


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


@contextmanager
def drawn_from(generator: torch.Generator | None) -> Iterator[None]:
    """The global random state seeded from `generator`, and given back as it was; None: as it is."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device="cpu")))
        yield


class GroupedMLP(Experts):
    """The common forward of `ffn` and `llama_ffn`: fused where the activation is known, else by stages.

    `weights()` gives (w1 [E, D, H], b1, w3 or None, b3, w2 [E, H, O], b2). The options that both share:

    * `recompute`: "none" keeps x and the pre-activations for the backward, "up" only x: the backward multiplies by the
      first weights (and the gated ones) again, for the same gradients bit by bit. Needs an activation that runs fused.
    * `engine`: "auto" (Triton's kernels on a GPU, a loop over the experts on a CPU), "triton", "grouped_mm"
      (torch.nn.functional.grouped_mm) or "torch" (the loop everywhere). float64 always takes the loop.
    """

    def __init__(
        self, model_dim: int, slots: int, activation: Activation, recompute: str = "none", engine: str = "auto"
    ) -> None:
        super().__init__(model_dim, slots)
        for name, value, allowed in (("recompute", recompute, RECOMPUTE), ("engine", engine, ENGINES)):
            if value not in allowed:
                raise ValueError(f"experts[{name!r}] = {value!r}: allowed are {', '.join(map(repr, allowed))}")
        if recompute == "up" and kernels.activation_name(activation) is None:
            function = getattr(activation, "__name__", type(activation).__name__)
            raise ValueError(
                f"experts['recompute'] = 'up' with the activation {function}, which does not run fused: give one of "
                f"{', '.join(kernels.ACTIVATIONS)}, or 'none' (and torch.utils.checkpoint, to save memory)"
            )
        self.activation_fn = activation
        self.recompute, self.engine = recompute, engine

    @property
    def activation(self) -> str | None:
        """The name of `activation_fn` where it runs fused, else None."""
        return kernels.activation_name(self.activation_fn)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]:
        raise NotImplementedError

    def _keeps(self, *tensors: Tensor | None) -> bool:
        """Whether a forward of `tensors` keeps pre-activations for its backward."""
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return learns and self.recompute == "none"

    def fuses(self, routing: Routing) -> bool:
        """A top-any gate and an activation that the kernels know."""
        return routing.router is not None and self.activation is not None and not self.skip_expert

    def mean(self, x_TD: Tensor, routing: Routing, combine_gradient: str) -> Tensor:
        """The mean of each token's experts, [T, output_dim]."""
        router, activation = routing.router, self.activation
        assert router is not None
        assert activation is not None
        weights = kernels.ExpertWeights(*self.weights())
        gate = kernels.Router(
            router.vectors,
            router.thresholds,
            router.scale,
            routing.scores.detach(),
            router.inv_norm,
            routing.unrouted,
            routing.bits,
        )
        y_TO, _, _ = kernels.top_any_ffn(
            x_TD,
            gate,
            routing.index,
            weights,
            activation,
            combine_gradient == "normalized",
            self.compute_dtype(x_TD),
            self._keeps(x_TD, router.vectors, router.thresholds, router.scale, *weights),
            self.engine,
        )
        return y_TO

    def forward(self, x_TD: Tensor, routing: Routing, gate_A: Tensor) -> Tensor:
        """Rows [rows, output_dim], those of fixed-k gates times their weights."""
        dtype = self.compute_dtype(x_TD)
        apply_gate = routing.weights is not None
        x = x_TD.to(dtype)
        if self.skip_expert:
            rows = routing.dispatch(x)
            return rows * gate_A.unsqueeze(1).to(dtype) if apply_gate else rows
        weights = kernels.ExpertWeights(*self.weights())
        activation = self.activation
        if activation is None:
            w1, b1, w3, b3, w2, b2 = weights
            if self.recompute != "none" and not torch.compiler.is_compiling():
                warn_once("experts['recompute'] is ignored: activation_fn was changed to one that does not run fused")
            rows = routing.dispatch(x)
            w1, w2 = w1.to(dtype), w2.to(dtype)
            b1, w3, b3, b2 = (None if w is None else w.to(dtype) for w in (b1, w3, b3, b2))
            h = kernels.grouped_linear(rows, routing.expert_offsets, w1, b1, self.engine)
            a = self.activation_fn(h)
            if not isinstance(a, Tensor) or a.shape != h.shape:
                raise ValueError(f"activation_fn made {describe(a)} of {list(h.shape)}: it must keep the shape")
            if w3 is not None:
                a = a * kernels.grouped_linear(rows, routing.expert_offsets, w3, b3, self.engine)
            rows = kernels.grouped_linear(a, routing.expert_offsets, w2, b2, self.engine)
            return rows * gate_A.unsqueeze(1).to(dtype)
        keeps = self._keeps(x, gate_A, *weights)
        rows, _, _ = kernels.grouped_ffn(x, gate_A, routing.index, weights, activation, apply_gate, keeps, self.engine)
        return rows
