"""`tutel.moe.moe_layer` for unedited scripts: the same result whether Tutel is installed or not."""

from __future__ import annotations

from dataclasses import replace

from .. import moe
from ..gates import TUTELS_OWN
from ..layer_config import MoEConfig
from ..validation import environment_number

__all__ = ["MOELayer", "moe_layer"]


class MOELayer(moe.MOELayer):
    """A `dynmoe_tutel.moe.MOELayer` whose Tutel gates have Tutel's default capacity factor: CAP_FACTOR, else 1.0.

    Layers that Tutel does not know, with top-any gates or an avg-k gate, stay dropless, as when registered with it.
    """

    @staticmethod
    def _meant(config: MoEConfig) -> MoEConfig:
        config = moe.MOELayer._meant(config)
        avg_k = config.one_score_gate or config.normalize_one_score_gate
        gates = config.gates
        if avg_k or config.capacity not in (None, "exact") or any(gate.get("type") not in TUTELS_OWN for gate in gates):
            return config
        factor = environment_number("CAP_FACTOR", 1.0)
        return replace(config, gate_type=[{"capacity_factor": factor, **gate} for gate in gates])


moe_layer = MOELayer
