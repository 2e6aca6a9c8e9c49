"""An unedited script's layer has Tutel's defaults; what Tutel does not know stays as in `dynmoe_tutel.moe`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe_tutel import moe
from dynmoe_tutel.tutel_stand_in.layer import MOELayer

D = 8
EXPERTS = {"type": "ffn", "num_experts_per_device": 4, "hidden_size_per_expert": 4}


class OwnGate(nn.Module):
    """Of Tutel's kind; with `bounded`, it brings a capacity factor."""

    def __init__(self, model_dim: int, num_global_experts: int, bounded: bool = False) -> None:
        super().__init__()
        self.wg = nn.Linear(model_dim, num_global_experts)
        if bounded:
            self.capacity_factor = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.wg(x)


@pytest.mark.parametrize(
    ("gate", "options", "factors"),
    [
        ("Top1Gate", {}, [1.0]),
        ({"type": "top", "k": 2}, {}, [1.0]),
        ({"type": "top", "capacity_factor": 0}, {}, [0.0]),
        ({"type": "cosine_top", "proj_dim": 4}, {}, [1.0]),
        ({"type": "custom", "module": OwnGate}, {}, [1.0]),
        ({"type": "custom", "module": OwnGate, "bounded": True}, {}, [0.5]),
        ([{"type": "top"}, {"type": "cosine_top", "capacity_factor": -2.0}], {}, [1.0, -2.0]),
        ({"type": "top"}, {"capacity": 2.0}, [0.0]),
        ({"type": "top"}, {"one_score_gate": True}, [0.0]),
        ("top_any", {}, [0.0]),
        ("gated_multi_gate", {}, [0.0]),
    ],
    ids=str,
)
def test_the_default_capacity_factor_is_tutels(gate: Any, options: dict[str, Any], factors: list[float]) -> None:
    layer = MOELayer(gate, D, EXPERTS, **options)
    assert [each.capacity_factor for each in layer.gates] == factors
    assert layer(torch.randn(6, D)).shape == (6, D)


def test_the_environment_comes_before_tutels_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAP_FACTOR", "2.5")
    assert MOELayer("Top1Gate", D, EXPERTS).gates[0].capacity_factor == 2.5
    assert moe.moe_layer("Top1Gate", D, EXPERTS).gates[0].capacity_factor == 2.5


def test_it_is_the_layer_of_the_drop_in_with_a_bound() -> None:
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    layer, drop_in = (cls({"type": "top", "k": 1}, D, EXPERTS, seeds=(1, 2)) for cls in (MOELayer, moe.moe_layer))
    assert int(drop_in.route(x).counts.max()) > 10
    assert torch.equal(layer(x), drop_in(x, capacity_factor=1.0))
    assert int(layer.dropped_assignments) > 0
    assert repr(layer) == repr(drop_in)
