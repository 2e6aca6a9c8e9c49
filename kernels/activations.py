"""The activation functions that the fused expert kernel knows, each with its derivative as in torch.

Experts with any other callable take the unfused path: same results, more memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """`value(h)` and `gradient(d_a, h) = d_a * act'(h)`, elementwise."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def gelu_tanh(h: Tensor) -> Tensor:
    """gelu in its tanh form."""
    return F.gelu(h, approximate="tanh")


def squared_relu(h: Tensor) -> Tensor:
    """max(h, 0)^2."""
    return torch.relu(h).square()


def identity(h: Tensor) -> Tensor:
    """h itself."""
    return h


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, lambda d, h: aten.gelu_backward(d, h)),
    "gelu_tanh": Activation(gelu_tanh, lambda d, h: aten.gelu_backward(d, h, approximate="tanh")),
    "relu": Activation(torch.relu, lambda d, h: aten.threshold_backward(d, h, 0)),
    "silu": Activation(F.silu, lambda d, h: aten.silu_backward(d, h)),
    "squared_relu": Activation(squared_relu, lambda d, h: d * torch.relu(h).mul_(2)),
    "identity": Activation(identity, lambda d, h: d),
}

_FUNCTIONS: list[tuple[object, str]] = [*((a.value, name) for name, a in ACTIVATIONS.items()), (F.relu, "relu")]
_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: it has hooks, or its own `forward`."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def activation_name(activation: object) -> str | None:
    """The name in `ACTIVATIONS` of a function or plain module, or None if it is not among them."""
    if isinstance(activation, nn.Module):
        if has_hooks(activation):
            return None
        if type(activation) is nn.GELU:
            return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
        return _MODULES.get(type(activation))
    return next((name for function, name in _FUNCTIONS if activation is function), None)


def hidden_rows(activation: Activation, h: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """act(h), and the input of the second product: act(h), or act(h) * u if gated, rounded once."""
    if u is None:
        a = activation.value(h)
        return a, a
    act_h = activation.value(h.to(_wide(h)))
    return act_h, (act_h * u).to(h.dtype)


def hidden_gradients(
    activation: Activation, d_a: Tensor, h: Tensor, u: Tensor | None, act_h: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of h and u, given the gradient of the second result of `hidden_rows`; each is rounded once."""
    if u is None:
        return activation.gradient(d_a, h), None
    wide = _wide(h)
    d_h = activation.gradient(d_a.to(wide) * u, h.to(wide))
    return d_h.to(h.dtype), (d_a * act_h).to(h.dtype)


def _wide(h: Tensor) -> torch.dtype:
    """fp32 for half precision."""
    return torch.promote_types(h.dtype, torch.float32)
