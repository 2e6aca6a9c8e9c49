"""Tutel's layer with a top-any gate: a subclass that replaces Tutel's `MOELayer`.

For Tutel's own gate types it behaves as that class, with upstream's methods added. `exchange` dispatches rows to the
experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import tutel.impls.moe_layer
from torch import Tensor

from ..adaptive.policy import ExpertChange
from ..adaptive.recording import RecordsRouting
from ..forwards import in_backward, is_training
from ..gates import GATE_TYPES, TUTELS_OWN, gate_config
from ..layer import ONE_SCORE_NEEDS, MoELayer
from ..layer_config import MoEConfig
from ..validation import flag, number
from .dispatch import kept_routing, noting
from .exchange import PaddedExchange, tutel_exchange

TOP_ANY = tuple(name for name in GATE_TYPES if name not in TUTELS_OWN)
_UPSTREAM_OPTIONS = ("one_score_gate", "normalize_one_score_gate", "value_norm_weighted", "update_momentum")
_Stock: Any = tutel.impls.moe_layer.MOELayer


def _is_ours(gate_type: Any, options: Mapping[str, Any]) -> bool:
    """Whether a layer needs this package: for a top-any gate or EMoE's avg-k gate, which Tutel lacks."""
    if options.get("one_score_gate"):
        return True
    for gate in gate_type if isinstance(gate_type, list) else [gate_type]:
        config = gate_config(gate) if isinstance(gate, str | Mapping) else {}
        if config.get("type") == "top" and options.get("normalize_one_score_gate"):
            return True
        if config.get("type") in GATE_TYPES and config["type"] not in TUTELS_OWN:
            return True
    return False


class MOELayer(RecordsRouting, _Stock):
    """Tutel's layer, with upstream's additions; with a top-any gate, a `TopAnyMOELayer`.

    A layer that uses none of the additions has the outputs, state dict and random state of Tutel's class.
    """

    one_score_gate = normalize_one_score_gate = value_norm_weighted = False
    update_momentum = 0.0

    def __new__(cls, gate_type: Any = None, *arguments: Any, **options: Any) -> Any:
        """The class that `gate_type` needs."""
        ours = cls is MOELayer and _is_ours(gate_type, options)
        return super().__new__(TopAnyMOELayer if ours else cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        given = {name: options.pop(name) for name in _UPSTREAM_OPTIONS if name in options}
        super().__init__(*arguments, **options)
        for name, value in given.items():  # as attributes only: they are for an avg-k gate, which Tutel lacks
            checked = number(name, value, 0, 1) if name == "update_momentum" else flag(name, value)
            setattr(self, name, checked)

    @property
    def max_num_global_experts(self) -> int:
        """E: a fixed-k gate uses all experts."""
        return self.num_global_experts

    @property
    def max_num_local_experts(self) -> int:
        """Experts on this rank."""
        return int(self.num_local_experts)

    def forward(self, input: Tensor, gate_index: int = 0, *arguments: Any, **options: Any) -> Any:
        """As Tutel's; an open window records what the capacity keeps."""
        recorded = self.record_routing and (self.record_eval or is_training(self))
        if not recorded or in_backward() or self.skip_moe:
            return super().forward(input, gate_index, *arguments, **options)
        with noting() as noted:
            y = super().forward(input, gate_index, *arguments, **options)
        if len(noted) != 1:
            raise RuntimeError(
                "a record window is open, and Tutel's layer ran without dynmoe_tutel's functions: call "
                "tutel_backend.register() before it, or end_record_routing()"
            )
        self.records[gate_index].add(input.reshape(-1, self.model_dim), kept_routing(noted[0]))
        return y

    def adaptive_update_experts(self, gate_index: int = 0) -> list[ExpertChange]:
        """ValueError: the number of experts of Tutel's gates is fixed."""
        raise AssertionError(f"Tutel has an adaptive gate: {self._adaptive_gate(gate_index)}")

    def update_one_score_gate(self) -> None:
        """ValueError: the layer has no avg-k gate."""
        raise ValueError(ONE_SCORE_NEEDS)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):  # type: ignore[no-untyped-def]
        """As Tutel's; reads the number of slots that upstream and this package save beside the number of experts."""
        key = f"{prefix}_max_num_global_experts"
        if key in state_dict and (slots := int(state_dict.pop(key))) != self.num_global_experts:
            raise ValueError(
                f"the checkpoint has {slots} slots at {prefix or 'top level'} and this layer, whose gate is of fixed "
                f"k, {self.num_global_experts} experts: build it with as many"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        moved = super()._apply(*arguments, **options)
        self._move_records()
        return moved


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
