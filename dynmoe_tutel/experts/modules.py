"""Experts whose linear maps are nn.Linear modules, one FFN a slot: what replaces such modules, as quantizers do,
reaches them. The kernels take the stacked weights of `ffn` and `llama_ffn` alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..initialization import drawn_from
from ..kernels import ACTIVATIONS
from ..validation import flag, positive_int
from .base import Activation, activation_function, expert_kind
from .custom import CustomExperts


class DenseExpert(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) if gated: [n, D] to [n, D]."""

    def __init__(
        self, model_dim: int, hidden: int, activation: Activation, gated: bool, up_bias: bool, down_bias: bool
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(model_dim, hidden, bias=up_bias) if gated else None
        self.up = nn.Linear(model_dim, hidden, bias=up_bias)
        self.down = nn.Linear(hidden, model_dim, bias=down_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] to [n, D]; maps are called, never read: a quantizer may have put others in their place."""
        h = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        y: Tensor = self.down(h)
        return y


@expert_kind("modules", ("hidden_size_per_expert", "activation_fn", "gated", "bias", "has_fc1_bias", "has_fc2_bias"))
class ModuleExperts(CustomExperts):
    """E modules D -> H -> D of nn.Linear maps `up`, `down` and, with `gated`, `gate`.

    `activation_fn`: as for `ffn`; default gelu, silu if gated. `bias`: of all maps; `has_fc1_bias` of the maps into H,
    `has_fc2_bias` of that out of it. State dicts have the modules' names: `experts.module.0.up.weight`.
    """

    def __init__(
        self,
        model_dim: int,
        local_slots: int,
        *,
        hidden_size_per_expert: int = 0,
        activation_fn: Activation | str | None = None,
        gated: bool = False,
        bias: bool = True,
        has_fc1_bias: bool | None = None,
        has_fc2_bias: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        hidden = positive_int("experts['hidden_size_per_expert']", hidden_size_per_expert)
        gated, bias = flag("experts['gated']", gated), flag("experts['bias']", bias)
        default = ACTIVATIONS["silu" if gated else "gelu"].value
        function = activation_function("activation_fn", activation_fn, default)
        up_bias = bias if has_fc1_bias is None else flag("experts['has_fc1_bias']", has_fc1_bias)
        down_bias = bias if has_fc2_bias is None else flag("experts['has_fc2_bias']", has_fc2_bias)
        built = []
        for _ in range(local_slots):
            with drawn_from(generator):
                built.append(DenseExpert(model_dim, hidden, function, gated, up_bias, down_bias))
        super().__init__(model_dim, local_slots, module=built)

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """With the names of parameters, which loaders of transformers and quantizers look up."""
        return nn.Module.state_dict(self, *arguments, **options)

    def _expert_rows(self, expert: nn.Module, rows: Tensor) -> Any:
        """expert(rows); not called for no rows where it learns nothing: kernels of quantizers may end the process."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in expert.parameters())
        return expert(rows) if len(rows) or learns else rows.new_zeros(0, self.output_dim)

    def dense_view(self, role: str) -> list[Tensor] | None:
        """The tensors of a role of a dense FFN, one a slot, rows of H first: to read, or to fill in place."""
        name, _, is_bias = role.partition("_")
        maps = [getattr(expert, name) for expert in self._experts()]
        tensors: list[Any] = [None if m is None else m.bias if is_bias else m.weight for m in maps]
        if any(tensor is None for tensor in tensors):
            return None
        return [t.t() if role == "down" else t for t in tensors]

    def dense_parameters(self, role: str) -> list[nn.Parameter]:
        """The parameters that hold a role, one a slot; none for a role that these experts lack."""
        name, _, is_bias = role.partition("_")
        maps = [getattr(expert, name) for expert in self._experts()]
        found = [None if m is None else m.bias if is_bias else m.weight for m in maps]
        return [parameter for parameter in found if parameter is not None]

    @property
    def dense_names(self) -> dict[str, str]:
        """The roles that these experts have."""
        gated = any(expert.gate is not None for expert in self._experts())
        roles = ["up", "up_bias", *(("gate", "gate_bias") if gated else ()), "down", "down_bias"]
        return {role: role for role in roles}

    def check_written(self, init: str = "nearest") -> None:
        """ValueError, by name, if a map is quantised or packed: a slot cannot be set then."""
        super().check_written(init)
        for name, parameter in self.named_parameters():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                raise ValueError(
                    f"experts.{name} is a {type(parameter).__name__} of {parameter.dtype} (quantised or packed), so a "
                    "slot of it cannot be set: experts cannot grow, move or be reset"
                )

    def _experts(self) -> list[Any]:
        return list(cast(nn.ModuleList, self.module))

    def extra_repr(self) -> str:
        return f"model_dim={self.model_dim}, slots={self.local_slots}"
