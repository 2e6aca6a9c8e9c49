"""A user-defined gate: a module that returns a `Routing`, or logits as Tutel's custom gates do."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..initialization import drawn_from, reset_modules, seed_of, seeded
from ..kernels import gate_dtype
from ..parts import compute_dtype
from ..routing import Capacity, Routing
from ..validation import positive_int
from .base import gate_type
from .top_k import FixedKGate


@gate_type("custom", keys=None)
class CustomGate(FixedKGate):
    """Wraps `module`: an nn.Module, or a class or function that builds one from model_dim, num_global_experts, options.

    The module's forward takes tokens [T, D] in the dtype of its parameters (autocast is off). It returns a `Routing`
    (any assignment: `Routing.from_assignments`), or logits [T, E] for softmax and top-k, with k from the module's
    `top_k` or gate_type['k']. A `Routing` brings its auxiliary terms in `aux`; a missing GShard term is computed from
    its scores.
    """

    def __init__(
        self,
        *,
        module: Any = None,
        k: int | None = None,
        gate_noise: float = 0.0,
        capacity_factor: float | None = None,
        **options: Any,
    ) -> None:
        names = (
            "model_dim",
            "num_experts",
            "slots",
            "aux_names",
            "normalize_gate",
            "one_score_gate",
            "normalize_one_score_gate",
        )
        common = {name: options.pop(name) for name in names if name in options}
        generator = options.pop("generator", None)
        for accepted in ("max_expert_num", "fp32_gate", "adaptive_experts"):
            options.pop(accepted, None)
        if not isinstance(module, nn.Module) and not callable(module):
            raise ValueError(
                f"gate_type of type 'custom': 'module' = {module!r}: give an nn.Module, or a class that makes one"
            )
        if k is not None:
            k = positive_int("gate_type['k']", k)
        if not isinstance(module, nn.Module):
            given = options if k is None else {"k": k, **options}
            with drawn_from(generator):
                module = _built(module, common["model_dim"], common["slots"], given)
        elif options:
            raise ValueError(
                f"gate_type of type 'custom': {sorted(options)} are for a class, but 'module' is built already"
            )
        top_k = k if k is not None else getattr(module, "top_k", 1)
        super().__init__(
            k=top_k,
            gate_noise=getattr(module, "gate_noise", gate_noise),
            capacity_factor=getattr(module, "capacity_factor", capacity_factor),
            **common,
        )
        self.module = module
        self.seed = seed_of(generator)

    def reset_parameters(self) -> None:
        """Call `reset_parameters()` of all modules that hold tensors, drawn as at construction; ValueError without."""
        with drawn_from(seeded(self.seed)):
            reset_modules("a custom gate", self.module.modules())

    def logits(self, x_TD: Tensor) -> Tensor:
        raise NotImplementedError("a custom gate is called, not asked for logits")

    def forward(
        self,
        x_TD: Tensor,
        capacity: Capacity = "exact",
        top_k: int | None = None,
        token_mask: Tensor | None = None,
    ) -> Routing:
        """Route tokens [T, D] by the user's module; it sees zeros where `token_mask` is False."""
        result = self.module(x_TD.to(compute_dtype(self.module, x_TD)))
        if isinstance(result, Routing):
            return self._adopted(result, x_TD.shape[0], capacity, token_mask)
        if not isinstance(result, Tensor) or result.shape != (x_TD.shape[0], self.slots):
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"a custom gate must return a Routing or logits [T, E] = [{x_TD.shape[0]}, {self.slots}], got {got}"
            )
        return self.route_logits(result.to(gate_dtype(result)), capacity, top_k, token_mask)

    def _adopted(self, own: Routing, num_tokens: int, capacity: Capacity, token_mask: Tensor | None) -> Routing:
        """A checked copy of the user's routing, within the layer's capacity and with the auxiliary terms."""
        if own.num_experts != self.slots or own.num_tokens != num_tokens:
            raise ValueError(
                f"the custom gate routed {own.num_tokens} tokens to {own.num_experts} experts; "
                f"the layer has {num_tokens} and {self.slots}"
            )
        routing = dataclasses.replace(own, aux=dict(own.aux))
        if capacity != "exact" or token_mask is not None:
            bits, unrouted = own.bits, own.unrouted
            if token_mask is not None:
                bits, unrouted = bits.masked_fill(~token_mask.unsqueeze(1), 0), unrouted & token_mask
            routing = Routing.from_bits(
                bits,
                own.scores,
                unrouted=unrouted,
                thresholds=own.thresholds,
                weights=own.weights,
                token_mask=token_mask,
                capacity=capacity,
            )
            routing.aux = dict(own.aux)
        for name in self.aux_names:
            if name not in routing.aux and name != "gshard":
                raise ValueError(f"aux_losses: the Routing of the custom gate has no {name!r} in its aux")
            if name not in routing.aux:
                assigned_TE = own.assigned
                first_T = own.scores.detach().masked_fill(~assigned_TE, -torch.inf).argmax(dim=1)
                first_TE, score_TE = F.one_hot(first_T, self.slots) * assigned_TE, own.scores
                if token_mask is not None:
                    first_TE, score_TE = (a * token_mask.unsqueeze(1) for a in (first_TE, score_TE))
                routing.aux[name] = losses.gshard_loss(score_TE, first_TE, num_tokens=routing.real_tokens)
        return routing


def _built(cls: Any, model_dim: int, slots: int, options: dict[str, Any]) -> nn.Module:
    """The gate that `cls` makes; ValueError if it takes other arguments or makes no nn.Module."""
    given = {"model_dim": model_dim, "num_global_experts": slots, **options}
    try:
        inspect.signature(cls).bind(**given)
    except TypeError as error:
        raise ValueError(f"gate_type of type 'custom': 'module' must take {', '.join(given)}: {error}") from None
    module = cls(**given)
    if not isinstance(module, nn.Module):
        raise ValueError(f"gate_type of type 'custom': 'module' made a {type(module).__name__}, not an nn.Module")
    return module
