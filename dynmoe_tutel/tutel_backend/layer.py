"""Tutel's layer with a top-any gate: a subclass that replaces Tutel's `MOELayer`.

For Tutel's own gate types it behaves as that class. `exchange` dispatches rows to the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import tutel.impls.moe_layer
from torch import Tensor

from ..gates import GATE_TYPES, gate_config
from ..layer import MoELayer
from ..layer_config import MoEConfig
from .exchange import PaddedExchange, tutel_exchange

TUTELS_OWN = ("top", "cosine_top", "custom")  # gate types that stay Tutel's
TOP_ANY = tuple(name for name in GATE_TYPES if name not in TUTELS_OWN)
_UPSTREAM_OPTIONS = {
    "one_score_gate": False,
    "normalize_one_score_gate": False,
    "value_norm_weighted": False,
    "update_momentum": 0.0,
}
_Stock: Any = tutel.impls.moe_layer.MOELayer


def _is_ours(gate_type: Any, options: Mapping[str, Any]) -> bool:
    """Whether a layer needs this package: for a top-any gate or EMoE's one_score_gate, which Tutel lacks."""
    if options.get("one_score_gate"):
        return True
    for gate in gate_type if isinstance(gate_type, list) else [gate_type]:
        config = gate_config(gate) if isinstance(gate, str | Mapping) else {}
        if config.get("type") in GATE_TYPES and config["type"] not in TUTELS_OWN:
            return True
    return False


class MOELayer(_Stock):
    """Tutel's layer; with a top-any gate, a `TopAnyMOELayer`."""

    def __new__(cls, gate_type: Any = None, *arguments: Any, **options: Any) -> Any:
        """The class that `gate_type` needs."""
        ours = cls is MOELayer and _is_ours(gate_type, options)
        return super().__new__(TopAnyMOELayer if ours else cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        for name, default in _UPSTREAM_OPTIONS.items():
            if options.get(name) == default:
                del options[name]
        super().__init__(*arguments, **options)


class TopAnyMOELayer(MoELayer, MOELayer):
    """A `dynmoe_tutel.MoELayer` that is a Tutel `MOELayer` too, over the ranks of `group`.

    `max_expert_num` slots are divided over the ranks: slots / ranks on each, or, with fewer slots than ranks, one
    expert on ranks / slots ranks (Tutel's sharded experts). `num_experts_per_device` of each rank's slots are active
    at start; 1 / n or -n means one expert on n devices. Arguments: Tutel's, those of `dynmoe_tutel.MoELayer`, and

        layout: "packed", "padded", or "auto": packed if possible.
    """

    _experts_first = True

    def __init__(self, gate_type: Any, model_dim: int, experts: Any = None, *arguments: Any, **options: Any) -> None:
        options.pop("pad_samples", None)  # deprecated and without effect in Tutel
        exchange = partial(tutel_exchange, layout=options.pop("layout", "auto"))
        named = MoEConfig.named(gate_type, model_dim, experts, *arguments)
        options = {**named, **options}
        seeds = tuple(options.get("seeds") or ())
        options["seeds"] = seeds[:2] or None
        super().__init__(**options, exchange=exchange)
        self.record_group = None  # all ranks train the same gates, also beyond the experts' group
        if len(seeds) > 2 and seeds[2] is not None:
            torch.manual_seed(seeds[2])  # Tutel's contract: the caller asks to reseed

    @property
    def layout(self) -> str:
        """ "packed" or "padded"."""
        return "padded" if isinstance(self.exchange, PaddedExchange) else "packed"

    @property
    def dispatch_count(self) -> Tensor | None:
        """[E], the rows of each expert in the last forward of padded rows, as Tutel's layer has it."""
        return getattr(self.exchange, "dispatch_count", None)

    @staticmethod
    def global_expert_count(num_local_experts: float, group: Any = None) -> int:
        """As in Tutel."""
        return _Stock.global_expert_count(num_local_experts, group)
