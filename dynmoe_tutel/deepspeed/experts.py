"""The experts of a drop-in layer: deep copies of the user's module, named and marked as DeepSpeed's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import CustomExperts
from ..experts.base import Experts
from ..routing import Routing
from ..validation import describe, has_no_data


class DeepSpeedExperts(CustomExperts):
    """`deepspeed_experts`, a list of `local_slots` deep copies of `expert`, each called with its rows.

    Rows come as [1, 1, n, D], with as many axes as DeepSpeed gives them, and n may be 0: every expert is called, so
    that each parameter has a gradient on every rank. An expert may return a tuple, whose first entry counts.
    """

    padded = False

    def __init__(self, model_dim: int, local_slots: int, expert: nn.Module, group_name: str) -> None:
        Experts.__init__(self, model_dim, local_slots)
        self.deepspeed_experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(local_slots))
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name  # type: ignore[attr-defined]

    @property
    def module(self) -> nn.ModuleList:  # type: ignore[override]
        """The copies, by the name of other custom experts."""
        return self.deepspeed_experts

    def forward(
        self, x_TD: Tensor, routing: Routing, gate_A: Tensor, token_shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """Expert rows [rows, D] times their gate values. The rows' counts go to the host, as modules take them."""
        rows = routing.dispatch(x_TD.to(self.compute_dtype(x_TD)))
        if has_no_data(rows):
            parts = rows.tensor_split(len(self.deepspeed_experts))
        else:
            counts = routing.counts.tolist()
            parts = rows[: sum(counts)].split(counts)
        if self.skip_expert:
            outs = list(parts)
        else:
            outs = [_called(e, expert, part) for e, (expert, part) in enumerate(zip(self.module, parts, strict=True))]
        out = torch.cat(outs)
        out = out * gate_A[: out.shape[0]].unsqueeze(1).to(out.dtype)
        behind = gate_A.shape[0] - out.shape[0]
        return out if behind == 0 else torch.cat([out, out.new_zeros(behind, out.shape[1])])

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As any module's."""
        return nn.Module.state_dict(self, *arguments, **options)

    def _load_from_state_dict(self, *arguments):  # type: ignore[no-untyped-def]
        nn.Module._load_from_state_dict(self, *arguments)


def _called(slot: int, expert: nn.Module, rows_ND: Tensor) -> Tensor:
    """What the expert of a slot makes of its rows, [n, D]; ValueError for another shape."""
    result = expert(rows_ND[None, None])
    if isinstance(result, tuple):
        result = result[0]
    if not isinstance(result, Tensor) or result.shape != (1, 1, *rows_ND.shape):
        raise ValueError(
            f"expert {slot} returned {describe(result)} for {[1, 1, *rows_ND.shape]}: return the same shape, or a "
            "tuple that begins with it"
        )
    return result[0, 0]
