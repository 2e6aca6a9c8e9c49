"""How replaced, wrapped and parametrised parts are found, asked for their dtype and refused a write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from dynmoe_tutel.gates import Gate, TopAnyGate
from dynmoe_tutel.parts import compute_dtype, foreign_parameters, own_tensors, unwrapped, writable


def gate() -> TopAnyGate:
    return TopAnyGate(model_dim=4, num_experts=2, slots=3, aux_names=())


class Copies(nn.Module):
    """Two copies, of which it calls the second and passes attributes on to it, as PEFT's modules_to_save."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = gate(), gate()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("second"), name)


def test_what_is_called_in_a_wrapper_is_found() -> None:
    inner, copies = gate(), Copies()
    assert unwrapped(inner, Gate) is inner
    assert unwrapped(nn.Sequential(nn.Identity(), inner), Gate) is inner
    assert unwrapped(copies, Gate) is copies.second
    other = nn.Linear(2, 2)
    assert unwrapped(other, Gate) is other  # type: ignore[comparison-overlap]


def test_parameters_of_a_wrapper_alone() -> None:
    inner = gate()
    assert foreign_parameters(inner, inner) == []
    assert [name for name, _ in foreign_parameters(nn.Sequential(inner, nn.PReLU()), inner)] == ["1.weight"]


def test_the_dtype_is_of_the_first_float_tensor() -> None:
    x = torch.zeros(1)
    packed = nn.Module()
    packed.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert compute_dtype(packed, x) is torch.float32
    packed.register_buffer("scale", torch.zeros(2, dtype=torch.bfloat16))
    assert compute_dtype(packed, x) is torch.bfloat16
    packed.bias = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    assert compute_dtype(packed, x) is torch.float16


def test_a_lost_write_is_refused_by_name() -> None:
    linear = nn.Linear(2, 2)
    assert writable("map", linear, "weight") is linear.weight
    with pytest.raises(ValueError, match=r"map\.scale is computed from other tensors \(Linear has no such parameter\)"):
        writable("map", linear, "scale")
    parametrizations.weight_norm(linear)
    with pytest.raises(ValueError, match=r"map\.weight is computed .* \(parametrised by _WeightNorm\)"):
        writable("map", linear, "weight")


def test_parametrised_tensors_are_their_module_s_own() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.BatchNorm1d(2, affine=False))
    found = [(owner, name) for owner, name, _ in own_tensors(model)]
    assert found[:2] == [(model[0], "bias"), (model[0], "weight")]
    assert [name for owner, name in found if owner is model[1]] == [
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
    assert len(found) == 5
