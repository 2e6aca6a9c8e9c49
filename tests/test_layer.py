"""The whole layer against the oracle: output, routing, every gradient; in train and eval, in every float type."""

from __future__ import annotations

from typing import Any

import helpers
import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import Case, make_case, relative_rms
from torch import Tensor, nn

from dynmoe_tutel import moe

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 4e-3}
CASES: dict[str, dict[str, Any]] = {
    "mixed": {},
    "masked slots": {"E": 7, "active": [1, 2, 5]},
    "one expert": {"E": 1, "G": 0.05},
    "one of many slots": {"E": 4, "active": [2], "G": 0.05},
    "tokens take all": {"G": -1.5},
    "all unrouted": {"G": 1.5},
    "65 experts": {"E": 65, "G": (0.3, 0.5)},
    "200 experts": {"E": 200, "active": [*range(0, 120), *range(130, 200)], "G": (0.4, 0.6)},
    "no token": {"T": 0},
    "one token": {"T": 1, "D": 5, "H": 3},
    "odd sizes": {"T": 13, "D": 11, "H": 7, "E": 3},
}


def check(case: Case, training: bool, combine_gradient: str, tolerance: float) -> None:
    """Output and every gradient of `case` against the oracle's."""
    case.layer.train(training)
    x = case.x.clone().requires_grad_()
    y = case.layer(x)
    assert y.dtype == case.x.dtype
    assert relative_rms(y, case.expected_output(training)) < tolerance
    y.backward(case.dy)
    expected = case.expected_gradients(training, combine_gradient)
    found = helpers.gradients(case.layer, x)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == case.x.dtype
        error = relative_rms(gradient, expected[name])
        print(f"{name} {error:.2e}")


@pytest.mark.parametrize("temperature", [None, 1.3])
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient(
    name: str, training: bool, combine_gradient: str, temperature: float | None
) -> None:
    case = make_case(**CASES[name], temperature=temperature, combine_gradient=combine_gradient)
    print(sorted(case.k()))
    check(case, training, combine_gradient, TOLERANCE[torch.float32])
