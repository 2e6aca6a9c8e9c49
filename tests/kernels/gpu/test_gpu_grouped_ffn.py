"""Triton's expert networks against the torch operations, which other tests compare with float64 row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import HAS_GPU, conditions, relative_rms
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dynmoe_tutel.kernels import ACTIVATIONS, ExpertWeights, Index, grouped_ffn, grouped_linear, pack_bits, ragged_index
from dynmoe_tutel.kernels.gpu import grouped_ffn as gpu
from dynmoe_tutel.kernels.gpu import tiles
from dynmoe_tutel.kernels.grouped_ffn import grouped_ffn_backward, grouped_linear_backward

NAMES = ("x", "gate", "w1", "b1", "w3", "b3", "w2", "b2")
SHAPES = [  # T, D, H, O, E, density
    (33, 16, 24, 8, 4, 0.5),
    (70, 40, 72, 33, 3, 0.6),  # more than one row tile per expert
    (9, 8, 16, 8, 3, 1.0),
    (6, 5, 4, 5, 3, 0.0),
    (0, 5, 4, 5, 3, 0.5),
    (1, 1, 1, 1, 1, 1.0),
]
MANY = (5, 33, 17, 33, 65, 0.1)
OPTIONS = [
    {},
    {"gated": True, "activation": "silu"},
    {"biases": False, "apply_gate": True, "spare": 5, "activation": "relu"},
    {"gated": True, "apply_gate": True, "activation": "gelu_tanh", "spare": 2},
]
HALF = [torch.bfloat16, torch.float16]
HALF_SHAPES = (
    [(257, 64, 96, 48, 5, 0.4), (64, 97, 47, 65, 3, 0.7), (300, 1030, 2050, 520, 3, 0.5)]
    if HAS_GPU
    else [(37, 24, 40, 16, 3, 0.4), (19, 33, 23, 17, 3, 0.7)]
)


class Call:
    """Arguments of one call on the CPU, and the same on the device."""

    def __init__(
        self,
        T: int,
        D: int,
        H: int,
        O: int,
        E: int,
        density: float = 0.5,
        *,
        device: str,
        dtype: torch.dtype = torch.float32,
        gated: bool = False,
        biases: bool = True,
        apply_gate: bool = False,
        spare: int = -1,
        activation: str = "gelu",
    ) -> None:
        generator = torch.Generator().manual_seed(T + D + E)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        assigned_TE = torch.rand(T, E, generator=generator) < density
        if E > 1 and density < 1:
            assigned_TE[:, 1] = False
        self.A = int(assigned_TE.sum())
        self.index = Index(*ragged_index(pack_bits(assigned_TE), E, -1 if spare < 0 else self.A + spare))
        R = self.index.rows
        gate = torch.rand(R, generator=generator) + 0.5 if apply_gate else torch.ones(R)
        w1 = draw(E, H, D, scale=D**-0.5).transpose(1, 2)  # stored as a checkpoint has it
        b1, w3 = draw(E, H) if biases else None, draw(E, D, H, scale=D**-0.5) if gated else None
        b3, w2 = draw(E, H) if gated and biases else None, draw(E, H, O, scale=H**-0.5)
        b2 = draw(E, O) if biases else None
        self.tensors = (draw(T, D), gate, self.index, ExpertWeights(w1, b1, w3, b3, w2, b2))
        self.options = (activation, apply_gate)
        self.d_rows = draw(R, O)
        self.device = device

    def on_device(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return tree_map_only(Tensor, lambda t: t.to(self.device), tensors)

    def in_fp64(self) -> tuple[Any, ...]:
        return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, self.tensors)


def scales_of(call: Call) -> list[float]:
    """The size of the terms of the three results and eight gradients that are few numbers."""

    def results(d_rows: Tensor, *tensors: Any) -> tuple[Any, ...]:
        out = grouped_ffn(*tensors, *call.options, True)
        return *out, *grouped_ffn_backward(d_rows, *out[1:], *tensors, *call.options, True)

    return conditions(results, call.d_rows, *call.tensors)


def compare(call: Call, limit: float) -> None:
    """Forward and backward on the device against the torch operations in float64 on the CPU."""
    scales = scales_of(call)
    A, activation_and_gate = call.A, call.options
    expected = grouped_ffn(*call.in_fp64(), *activation_and_gate, True)
    found = gpu.grouped_ffn(*call.on_device(call.tensors), *activation_and_gate, True)
    for f, e, scale in zip(found, expected, scales, strict=False):
        assert relative_rms(f[:A], e[:A], scale) < limit

    poisoned = call.d_rows.clone()
    poisoned[A:] = float("nan")
    found = tuple(t.clone() for t in found)
    for t in found:
        t[A:] = float("nan")  # unused rows are not read
    wanted = grouped_ffn_backward(
        call.d_rows.double(), *(t.nan_to_num() for t in expected[1:]), *call.in_fp64(), *activation_and_gate, True
    )
    (d_rows,) = call.on_device((poisoned,))
    gradients = gpu.grouped_ffn_backward(d_rows, *found[1:], *call.on_device(call.tensors), *activation_and_gate, True)
    for name, f, e, scale in zip(NAMES, gradients, wanted, scales[3:], strict=True):
        part = slice(0, A) if name == "gate" else slice(None)
        assert relative_rms(f[part], e[part], scale) < limit, name
    for f, parameter in zip(gradients[2:], call.tensors[3], strict=True):
        if parameter is not None:
            assert (f.stride(), f.dtype) == (parameter.stride(), parameter.dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape: tuple, options: dict, device: str, poisoned: None) -> None:
    compare(Call(*shape, device=device, **options), 1e-6)


@pytest.mark.parametrize("missing", ["b1_EH", "b3_EH"])
def test_one_bias_of_a_gated_expert(missing: str, device: str, poisoned: None) -> None:
    call = Call(9, 8, 16, 8, 3, device=device, gated=True)
    call.tensors = (*call.tensors[:3], call.tensors[3]._replace(**{missing: None}))
    compare(call, 1e-6)


@pytest.mark.parametrize("shape", [(20, 32, 64, 35), (20, 64, 47, 32), (17, 33, 32, 64)], ids=str)
def test_edges_of_tiles(shape: tuple, device: str, poisoned: None) -> None:
    """Some dimensions are multiples of a tile's, others are not, so different loads need a mask."""
    compare(Call(*shape, 2, 1.0, device=device, gated=True), 1e-6)


def test_more_experts_than_a_word_has_bits(device: str, poisoned: None) -> None:
    compare(Call(*MANY, device=device, gated=True), 1e-6)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_activations(activation: str, gated: bool, device: str) -> None:
    compare(Call(12, 16, 32, 16, 2, device=device, activation=activation, gated=gated), 1e-6)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", HALF_SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_precision(shape: tuple, options: dict, dtype: torch.dtype, device: str) -> None:
    compare(Call(*shape, device=device, dtype=dtype, **options), 6e-3)


def test_what_is_not_saved_is_computed_again_bit_for_bit(device: str) -> None:
    call = Call(33, 16, 24, 8, 4, device=device, gated=True)
    tensors = call.on_device(call.tensors)
    _, h, u = gpu.grouped_ffn(*tensors, "gelu", False, True)
    rows, no_h, no_u = gpu.grouped_ffn(*tensors, "gelu", False, False)
    assert no_h.shape[0] == no_u.shape[0] == 0
    d_rows = torch.randn_like(rows)
    saved = gpu.grouped_ffn_backward(d_rows, h, u, *tensors, "gelu", False, True)
    again = gpu.grouped_ffn_backward(d_rows, no_h, no_u, *tensors, "gelu", False, True)
    for one, other in zip(saved, again, strict=True):
        assert torch.equal(one, other)


def test_without_gradients_of_the_weights(device: str) -> None:
    call = Call(33, 16, 24, 8, 4, device=device)
    tensors = call.on_device(call.tensors)
    rows, h, u = gpu.grouped_ffn(*tensors, "gelu", False, True)
    d_rows = torch.randn_like(rows)
    full = gpu.grouped_ffn_backward(d_rows, h, u, *tensors, "gelu", False, True)
    few = gpu.grouped_ffn_backward(d_rows, h, u, *tensors, "gelu", False, False)
    assert torch.equal(few[0], full[0])
    assert torch.equal(few[1], full[1])
    assert all(t.numel() == 0 for t in few[2:])


def test_weights_of_another_type_get_their_own_gradient(device: str) -> None:
    """Under autocast the weights stay fp32; their gradients must not round to the tokens' type."""
    call = Call(33, 16, 24, 8, 4, device=device)
    x, *others = call.on_device(call.tensors)
    rows, h, u = gpu.grouped_ffn(x.bfloat16(), *others, "gelu", False, True)
    gradients = gpu.grouped_ffn_backward(rows, h, u, x.bfloat16(), *others, "gelu", False, True)
    assert all(g.dtype == torch.float32 for g in gradients[2:])


def test_a_token_does_not_depend_on_its_batch(device: str) -> None:
    call = Call(40, 16, 24, 8, 3, 1.0, device=device)
    x, _, _, weights = tensors = call.on_device(call.tensors)
    rows = gpu.grouped_ffn(*tensors, "gelu", False, False)[0].view(3, 40, 8)
    one = Index(*ragged_index(pack_bits(torch.ones(1, 3, dtype=torch.bool)), 3))
    alone = gpu.grouped_ffn(x[17:18], *call.on_device((torch.ones(3), one)), weights, "gelu", False, False)[0]
    if HAS_GPU:  # the shape's bucket may choose another tile
        assert relative_rms(alone, rows[:, 17]) < 1e-6
    else:
        assert torch.equal(alone, rows[:, 17])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_linear(bias: bool, dtype: torch.dtype, device: str, poisoned: None) -> None:
    """Unused rows are zero, whatever the memory held."""
    call = Call(40, 24, 40, 1, 4, device=device, spare=7, dtype=dtype)
    offsets, w, b = call.index.expert_offsets, call.tensors[3].w1_EDH, call.tensors[3].b1_EH if bias else None
    rows, d_out = torch.randn(call.A + 7, 24).to(dtype), torch.randn(call.A + 7, 40).to(dtype)
    rows[call.A :] = d_out[call.A :] = float("nan")
    exact = tuple(None if t is None else t.double() for t in (rows, w, b))
    clean = (exact[0].nan_to_num(), offsets, exact[1], exact[2])
    on_device = call.on_device((rows, offsets, w, b))
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    found = gpu.grouped_linear(*on_device)
    assert relative_rms(found, grouped_linear(*clean)) < limit
    gradients = gpu.grouped_linear_backward(d_out.to(device), *on_device)
    wanted = grouped_linear_backward(d_out.double().nan_to_num(), *clean)
    for f, e in zip(gradients, wanted, strict=True):
        assert relative_rms(f, e) < limit


@pytest.mark.parametrize("group_m", [1, 3])
def test_tiles_in_any_order_give_the_same(group_m: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(70, 24, 72, 40, 3, device=device)
    tensors = call.on_device(call.tensors)
    before = gpu.grouped_ffn(*tensors, "gelu", False, True)
    rule = tiles.gemm
    monkeypatch.setattr(tiles, "gemm", lambda *shape: replace(rule(*shape), group_m=group_m))
    for one, other in zip(before, gpu.grouped_ffn(*tensors, "gelu", False, True), strict=True):
        assert torch.equal(one, other)
