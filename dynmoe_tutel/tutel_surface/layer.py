"""The stand-in's layer: `dynmoe_tutel.MoELayer`, which does not divide its experts over ranks as Tutel's does."""

from __future__ import annotations

from typing import Any

from ..layer import MoELayer
from .net import get_world_size

__all__ = ["MOELayer"]


class MOELayer(MoELayer):
    """As `dynmoe_tutel.MoELayer`, on one rank."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        ranks = get_world_size(self.group)
        if ranks > 1:
            raise ValueError(
                f"moe_layer over {ranks} ranks needs Tutel itself, which divides the experts over them and is not "
                "installed (https://github.com/microsoft/Tutel). To have all experts on every rank, build the layer by "
                "dynmoe_tutel.moe and reduce the gradients of its experts too"
            )
