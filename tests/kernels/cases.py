"""Random calls of the grouped expert networks, and the same rows computed one by one in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from helpers import conditions
from torch import Tensor

from dynmoe_tutel.kernels import ExpertWeights, Index, grouped_ffn, pack_bits, ragged_index

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)
NAMES = ("x", "gate", "w1", "b1", "w3", "b3", "w2", "b2")
SHAPES = [  # T, D, H, Dout, E, density
    (7, 97, 47, 97, 65, 0.2),
    (33, 16, 24, 8, 4, 0.5),
    (5, 3, 2, 3, 512, 0.02),
    (9, 8, 16, 8, 3, 1.0),
    (6, 5, 4, 5, 3, 0.0),
    (0, 5, 4, 5, 3, 0.5),
    (1, 1, 1, 1, 1, 1.0),
]
NAIVE_ACTIVATIONS = {
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
    "gelu_tanh": lambda h: 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))),
    "relu": lambda h: h.clamp(min=0),
    "silu": lambda h: h * torch.sigmoid(h),
    "squared_relu": lambda h: h.clamp(min=0) ** 2,
    "identity": lambda h: h,
}


@dataclass
class Case:
    """Random tensors of one call, with `spare` unused rows; expert 0 and (by chance) others have no rows."""

    T: int
    D: int
    H: int
    Dout: int
    E: int
    density: float = 0.5
    dtype: torch.dtype = torch.float32
    biases: bool = True
    gated: bool = False
    spare: int | None = None
    activation: str = "gelu"
    apply_gate: bool = False
    engine: str = "auto"
    unit: Tensor | None = None  # [A, H] of ones, for `scales`

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.T + self.D + self.E)
        assigned_TE = torch.rand(self.T, self.E, generator=generator) < self.density
        if self.E > 1 and self.density < 1:
            assigned_TE[:, 0] = False
        self.pairs = [(t, e) for e in range(self.E) for t in range(self.T) if assigned_TE[t, e]]
        self.A = len(self.pairs)
        rows = -1 if self.spare is None else self.A + self.spare
        self.index = Index(*ragged_index(pack_bits(assigned_TE), self.E, rows))
        self.num_rows = self.A if self.spare is None else rows

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(self.dtype)

        T, D, H, Dout, E = self.T, self.D, self.H, self.Dout, self.E
        gate_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.tensors: dict[str, Any] = {
            "x": draw(T, D),
            "gate": (torch.rand(self.num_rows, generator=generator) + 0.5).to(gate_dtype)
            if self.apply_gate
            else torch.ones(self.num_rows, dtype=gate_dtype),
            "w1": draw(E, H, D, scale=D**-0.5).transpose(1, 2),  # [E, D, H] stored as a checkpoint has it
            "b1": draw(E, H) if self.biases else None,
            "w3": draw(E, D, H, scale=D**-0.5) if self.gated else None,
            "b3": draw(E, H) if self.gated and self.biases else None,
            "w2": draw(E, H, Dout, scale=H**-0.5),
            "b2": draw(E, Dout) if self.biases else None,
        }

    def variables(self) -> dict[str, Any]:
        """Leaves with the strides of the tensors."""
        return {name: None if t is None else t.detach().requires_grad_() for name, t in self.tensors.items()}

    def arguments(self, t: dict[str, Any], save: bool = True) -> tuple:
        weights = ExpertWeights(*(t[name] for name in NAMES[2:]))
        return (t["x"], t["gate"], self.index, weights, self.activation, self.apply_gate, save)

    def run(self, t: dict[str, Any], save: bool = True) -> Tensor:
        """Rows [rows, O]."""
        return grouped_ffn(*self.arguments(t, save), self.engine)[0]

    def naive(self, t: dict[str, Any]) -> Tensor:
        """The A rows in float64, one by one; a gate that is not applied still gets its gradient, at the value 1."""
        x, gate, w1, b1, w3, b3, w2, b2 = (None if t[n] is None else t[n].double().unbind(0) for n in NAMES)
        act, rows = NAIVE_ACTIVATIONS[self.activation], []
        for row, (token, e) in enumerate(self.pairs):
            h = x[token] @ w1[e] + (0 if b1 is None else b1[e])
            a = act(h) if self.unit is None else act(h) + (self.unit[row] - 1) * h
            if w3 is not None:
                a = a * (x[token] @ w3[e] + (0 if b3 is None else b3[e]))
            rows.append((a @ w2[e] + (0 if b2 is None else b2[e])) * gate[row])
        return torch.stack(rows) if rows else torch.zeros(0, self.Dout, dtype=torch.float64)

    def grads(self, function: str, d_rows_AO: Tensor, save: bool = True) -> dict[str, Tensor]:
        """Gradients of the "run" or the "naive" rows by name; zeros for those without one."""
        variables = self.variables()
        rows = self.run(variables, save) if function == "run" else self.naive(variables)
        if rows.requires_grad:
            rows.backward(d_rows_AO.to(rows.dtype)[: rows.shape[0]])
        found = {}
        for name, variable in variables.items():
            if variable is not None:
                found[name] = torch.zeros_like(variable) if variable.grad is None else variable.grad
                if function == "run":
                    assert variable.grad is not None, f"{name} got no gradient"
                    assert variable.grad.dtype == variable.dtype
        return found

    def scales(self, d_rows_AO: Tensor) -> dict[str, float]:
        """The size of the terms of the "rows" and of their gradients, by name: see `conditions`.

        An activation is h times a sum such as 1 + erf(h); near 0 that sum has the rounding error of the 1.
        """
        names = [name for name, t in self.tensors.items() if t is not None]

        def results(unit: Tensor, d_rows_AO: Tensor, *tensors: Tensor) -> list[Tensor]:
            given = copy.copy(self)
            given.unit = unit
            given.tensors = {**self.tensors, **dict(zip(names, tensors, strict=True))}
            return [given.naive(given.tensors), *given.grads("naive", d_rows_AO).values()]

        tensors = (torch.ones(self.A, self.H), d_rows_AO[: self.A], *(self.tensors[name].detach() for name in names))
        return dict(zip(("rows", *names), conditions(results, *tensors), strict=True))


def tolerance(dtype: torch.dtype) -> float:
    """The tolerance of one result; the half types round h, and a gate gradient cancels."""
    return 1e-2 if dtype in HALF else 2e-6
