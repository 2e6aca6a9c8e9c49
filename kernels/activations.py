"""Activation functions that the fused expert kernel knows, each with its derivative, as in torch.

Any other Python callable takes the unfused path of the experts: same results, more memory.
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


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, lambda d, h: aten.gelu_backward(d, h)),
    "gelu_tanh": Activation(
        lambda h: F.gelu(h, approximate="tanh"), lambda d, h: aten.gelu_backward(d, h, approximate="tanh")
    ),
    "relu": Activation(torch.relu, lambda d, h: aten.threshold_backward(d, h, 0)),
    "silu": Activation(F.silu, lambda d, h: aten.silu_backward(d, h)),
    "squared_relu": Activation(lambda h: torch.relu(h).square_(), lambda d, h: d * torch.relu(h).mul_(2)),
    "identity": Activation(lambda h: h, lambda d, h: d),
}

_FUNCTIONS: list[tuple[object, str]] = [
    (F.gelu, "gelu"),
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.silu, "silu"),
]
_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}


def activation_name(activation: object) -> str | None:
    """The name in `ACTIVATIONS` of a function or plain module that is one of them, else None."""
    if isinstance(activation, nn.Module):
        if activation._forward_hooks or activation._forward_pre_hooks or activation._backward_hooks:
            return None
        if type(activation) is nn.GELU:
            return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
        return _MODULES.get(type(activation))
    return next((name for function, name in _FUNCTIONS if activation is function), None)
