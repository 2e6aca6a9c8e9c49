"""Tutel's module classes: built as in Tutel, they compute what the layer's own parts do; and they recognise those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FP32, relative_rms

from dynmoe_tutel import moe
from dynmoe_tutel.tutel_stand_in.modules import CosineTopKGate, FusedExpertsNetwork, LinearTopKGate

D, H, E = 8, 6, 3
EXPERTS = {"type": "ffn", "num_experts_per_device": E, "hidden_size_per_expert": H, "activation_fn": F.gelu}


@pytest.mark.parametrize(
    ("gate", "module", "other"),
    [
        ({"type": "top", "k": 2}, LinearTopKGate, CosineTopKGate),
        ({"type": "cosine_top", "k": 2, "proj_dim": 4}, CosineTopKGate, LinearTopKGate),
    ],
)
def test_a_layer_of_tutels_modules_equals_the_layer(gate: dict[str, Any], module: Any, other: Any) -> None:
    layer = moe.moe_layer(gate, D, EXPERTS)
    assert isinstance(layer.gates[0], module)
    assert not isinstance(layer.gates[0], other)
    assert isinstance(layer.experts, FusedExpertsNetwork)
    options = {key: value for key, value in gate.items() if key != "type"}
    custom = {**EXPERTS, "type": "custom", "module": FusedExpertsNetwork}
    built = moe.moe_layer({"type": "custom", "module": module, **options}, D, custom)
    assert not isinstance(built.experts, FusedExpertsNetwork)  # it holds one
    built.load_state_dict(
        {name.replace("gates.0.", "gates.0.module."): value for name, value in layer.state_dict().items()}
    )
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(0))
    y, expected = built(x), layer(x)
    assert relative_rms(y, expected) < 3 * FP32
    assert relative_rms(y.l_aux, expected.l_aux) < 3 * FP32


def test_gates_give_logits_by_tutels_arguments() -> None:
    x = torch.randn(5, D)
    gate = LinearTopKGate(D, E, 9, True, capacity_factor=1.0, gate_noise=0.5)
    assert (gate.top_k, gate.capacity_factor, gate.gate_noise) == (E, 1.0, 0.5)
    torch.testing.assert_close(gate(x), x @ gate.wg.weight.T)
    cosine = CosineTopKGate(D, E, 1, False, 4, 0.25)
    projected = F.normalize(cosine.cosine_projector(x), dim=1)
    torch.testing.assert_close(cosine(x), 4 * projected @ F.normalize(cosine.sim_matrix, dim=0))
    with pytest.raises(TypeError, match="max_expert_num"):
        LinearTopKGate(D, E, max_expert_num=3)


def test_a_class_of_ones_own_recognises_its_instances_alone() -> None:
    class Own(FusedExpertsNetwork):
        pass

    assert isinstance(Own(D, H, E), FusedExpertsNetwork)
    assert not isinstance(FusedExpertsNetwork(D, H, E), Own)
    assert not isinstance(moe.moe_layer("top_any", D, EXPERTS).experts, Own)


def test_experts_over_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="sharded_count = 2: an expert split over devices needs Tutel itself"):
        FusedExpertsNetwork(D, H, 1, 2)


def test_skip_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIP_EXPERT", "1")
    x = torch.randn(E, 2, D)
    assert FusedExpertsNetwork(D, H, E)(x, None) is x
