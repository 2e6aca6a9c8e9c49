"""The input checks of `top_any_ffn`, which name the argument, and its registration.

The layer's tests and `gpu` test its results.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynmoe_tutel import kernels
from dynmoe_tutel.kernels.top_any_ffn import top_any_ffn_backward

T, D, H, E, O = 6, 8, 5, 3, 4


def inputs() -> dict[str, Any]:
    x, w, scale = torch.randn(T, D), torch.randn(D, E), torch.ones(())
    gate = kernels.threshold_gate(x, w, torch.zeros(E), torch.ones(E, dtype=torch.bool), scale, False)
    score, bits, unrouted, inv_norm = gate[:4]
    names = ("expert_offsets", "token_offsets", "token_of_row", "row_of_assignment")
    return {
        "x_TD": x, "w_DE": w, "thresholds_E": torch.zeros(E), "scale": scale, "score_TE": score,
        "inv_norm_T": inv_norm, "unrouted_T": unrouted, "bits_TW": bits, "unit_ED": None, "inv_norm_E": None,
        **dict(zip(names, kernels.ragged_index(bits, E), strict=True)),
        "w1_EDH": torch.randn(E, D, H), "b1_EH": torch.randn(E, H), "w3_EDH": None, "b3_EH": None,
        "w2_EHO": torch.randn(E, H, O), "b2_EO": torch.randn(E, O), "activation": "gelu", "centred": False,
        "dtype": torch.float32, "save": True,
    }  # fmt: skip


def arguments(given: dict[str, Any]) -> list[Any]:
    groups = (kernels.Router, kernels.Index, kernels.ExpertWeights)
    grouped = {name for group in groups for name in group._fields}
    x_TD, *options = (value for name, value in given.items() if name not in grouped)
    return [x_TD, *(group(*(given[name] for name in group._fields)) for group in groups), *options]


BAD = [
    ("x_TD", torch.ones(T, D, dtype=torch.int64), "int64"),
    ("w_DE", torch.zeros(D, E + 1), "[8, 4]"),
    ("thresholds_E", torch.zeros(1), "[1]"),
    ("scale", torch.ones(2), "[2]"),
    ("score_TE", torch.zeros(T, E + 1), "[6, 4]"),
    ("inv_norm_T", torch.zeros(T - 1), "[5]"),
    ("unrouted_T", torch.zeros(T), "float32"),
    ("bits_TW", torch.zeros(T, 2, dtype=torch.int64), "[6, 2]"),
    ("bits_TW", torch.zeros(T, 1, dtype=torch.int32), "int32"),
    ("unit_ED", torch.zeros(E, D + 1), "[3, 9]"),
    ("inv_norm_E", torch.zeros(E + 1), "[4]"),
    ("expert_offsets", torch.zeros(E, dtype=torch.int32), "[3]"),
    ("token_offsets", torch.zeros(T, dtype=torch.int32), "[6]"),
    ("row_of_assignment", torch.zeros(2, dtype=torch.int32), "[2]"),
    ("b1_EH", torch.zeros(H), "[5]"),
    ("w3_EDH", torch.zeros(E, D, H + 1), "[3, 8, 6]"),
    ("w2_EHO", torch.zeros(E, H + 1, O), "[3, 6, 4]"),
    ("activation", "tanh", "squared_relu"),
    ("dtype", torch.int32, "torch.bfloat16"),
]


@pytest.mark.parametrize(("name", "value", "said"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_what_does_not_fit_is_refused_by_name(name: str, value: Any, said: str) -> None:
    """Kernels trust sizes: they would read past the end of a tensor that is too short."""
    good = inputs()
    kernels.top_any_ffn(*arguments(good))
    with pytest.raises(ValueError, match=name) as refused:
        kernels.top_any_ffn(*arguments(good | {name: value}))
    assert said in str(refused.value)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("there", [("w3_EDH", "b1_EH"), ("b1_EH", "b2_EO"), ()])
def test_opcheck(there: tuple[str, ...], save: bool) -> None:
    """With some of the optional weights, forward and backward."""
    optional = {"b1_EH": (E, H), "w3_EDH": (E, D, H), "b3_EH": (E, H), "b2_EO": (E, O)}
    drawn = {name: torch.randn(shape) if name in there else None for name, shape in optional.items()}
    x, *groups, activation, centred, dtype, _ = arguments(inputs() | drawn)
    y, h, u = kernels.top_any_ffn(x, *groups, activation, centred, dtype, save)
    backward = (torch.randn_like(y), h, u, x, *groups, activation, centred, dtype, True)
    torch.library.opcheck(top_any_ffn_backward, backward)
    router, _, weights = groups
    for leaf in (x, router.w_DE, router.thresholds_E, *weights):
        if leaf is not None:
            leaf.requires_grad_()
    torch.library.opcheck(kernels.top_any_ffn, (x, *groups, activation, centred, dtype, save))
