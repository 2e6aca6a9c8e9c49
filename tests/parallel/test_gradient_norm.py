"""Norms of gradients and clipping: real Gloo processes against one process, and one process against torch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import gradient_checks
import pytest
import ranks
import torch
from helpers import spawn_ranks
from torch import nn

from dynmoe_tutel import MoELayer, parallel


@pytest.mark.parametrize("processes", [2, 4])
def test_norms_on_ranks(processes: int, tmp_path: Path) -> None:
    spawn_ranks(ranks.run, (processes, str(tmp_path), gradient_checks.NORMS), processes)


def with_gradients() -> Any:
    layer = MoELayer("top_any", 4, {"num_experts_per_device": 2, "hidden_size_per_expert": 4}, seeds=(1, 2))
    layer(torch.randn(3, 4, generator=torch.Generator().manual_seed(0))).square().sum().mul(9).backward()
    layer.unused, layer.empty = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(0))
    layer.empty.grad = torch.ones(0)
    return layer


@pytest.mark.parametrize("power", [1, 2.0, 2.5, math.inf])
def test_one_process_has_the_bits_of_torch(power: float) -> None:
    layer = with_gradients()
    other = copy.deepcopy(layer)
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    others = [p for p in other.parameters() if p.numel()]  # torch has no inf norm of an empty tensor
    assert torch.equal(
        parallel.grad_norm(layer, power),
        torch.nn.utils.get_total_norm([p.grad for p in others if p.grad is not None], power),
    )
    assert torch.equal(parallel.clip_grad_norm_(layer, 0.1, power), torch.nn.utils.clip_grad_norm_(others, 0.1, power))
    assert all(
        p.grad is None or torch.equal(p.grad, q.grad)
        for p, q in zip(layer.parameters(), other.parameters(), strict=True)
    )


def test_only_some_parameters() -> None:
    layer = with_gradients()
    before = layer.gates[0].sim_matrix.grad.clone()
    norm = parallel.clip_grad_norm_(layer, 0.1, parameters=layer.experts.parameters())
    assert torch.equal(layer.gates[0].sim_matrix.grad, before)
    assert parallel.grad_norm(layer, parameters=layer.experts.parameters()) < 0.11 < norm


def test_no_gradient_is_a_norm_of_zero() -> None:
    layer = with_gradients()
    layer.zero_grad()
    assert parallel.clip_grad_norm_(layer, 1.0) == 0


@pytest.mark.parametrize(("dtype", "found"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_precision(dtype: torch.dtype, found: torch.dtype) -> None:
    """In bf16 the sum of 10000 squares of 0.5 would stop long before 2500."""
    model = nn.ParameterList([nn.Parameter(torch.ones(100, 100, dtype=dtype))])
    model[0].grad = torch.full((100, 100), 0.5, dtype=dtype)
    norm = parallel.clip_grad_norm_(model, 25.0)
    assert norm.dtype == found
    assert norm == 50
    assert (model[0].grad - 0.25).abs().max() < 1e-7


@pytest.mark.parametrize("wrong", [0, 0.0, -1.0, math.nan, None, "two", -math.inf])
def test_refused_numbers(wrong: Any) -> None:
    layer = with_gradients()
    with pytest.raises(ValueError, match=r"max_norm = .*: give a number above 0, or inf"):
        parallel.clip_grad_norm_(layer, wrong)
    with pytest.raises(ValueError, match=r"norm_type = .*: give a number above 0, or inf"):
        parallel.clip_grad_norm_(layer, 1.0, wrong)


def test_refuses_parameters_in_place_of_the_model() -> None:
    layer = with_gradients()
    for given in (layer.parameters(), list(layer.parameters()), layer.gates[0].gates):
        with pytest.raises(ValueError, match=r"model must be the module that holds the MoE layers, got "):
            parallel.clip_grad_norm_(given, 1.0)


def test_nonfinite_gradients() -> None:
    layer = with_gradients()
    layer.gates[0].gates.grad[0] = math.nan
    with pytest.raises(RuntimeError, match="the norm of order 2 of the gradients is nan"):
        parallel.clip_grad_norm_(layer, 1.0, error_if_nonfinite=True)
    assert parallel.clip_grad_norm_(layer, 1.0).isnan()
