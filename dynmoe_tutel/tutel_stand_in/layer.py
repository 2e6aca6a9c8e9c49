"""The stand-in's layer: `dynmoe_tutel.MoELayer` on one rank. Tutel's divides experts over all ranks by default."""

from __future__ import annotations

from typing import Any

from ..layer import MoELayer
from .net import get_world_size

__all__ = ["MOELayer"]


class MOELayer(MoELayer):
    """`dynmoe_tutel.MoELayer` on one rank."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        ranks = get_world_size(self.group)
        if ranks > 1:
            raise ValueError(
                f"moe_layer over {ranks} ranks needs Tutel itself, which divides the experts over them and is not "
                "installed (https://github.com/microsoft/Tutel). dynmoe_tutel.moe.moe_layer divides them where it is "
                "given group=; without it, every rank has all experts: all-reduce their gradients too"
            )
