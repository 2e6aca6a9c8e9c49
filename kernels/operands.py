"""Groups of tensors that operations take as one argument: the gate's outputs, the index, the experts' weights.

Suffixes: T tokens, E experts; D, H and O the dimensions of tokens, hidden layer and output; W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .operation import expect, expect_matrix


class Router(NamedTuple):
    """A top-any gate's parameters and the outputs of `threshold_gate` for the tokens."""

    w_DE: Tensor
    thresholds_E: Tensor  # G, before the sigmoid
    scale: Tensor | None  # [], tau; None: 1
    score_TE: Tensor
    inv_norm_T: Tensor
    unrouted_T: Tensor
    bits_TW: Tensor
    unit_ED: Tensor | None = None  # unit vectors and their inverse norms, as `vector_losses` returns them; both or none
    inv_norm_E: Tensor | None = None

    def check(self, x_TD: Tensor, E: int) -> None:
        """Raise ValueError unless every tensor fits the tokens and E experts."""
        T, D = x_TD.shape
        expect("w_DE", self.w_DE, (D, E), "[D, E]")
        expect("thresholds_E", self.thresholds_E, (E,), "[E]")
        if self.scale is not None and self.scale.numel() != 1:
            raise ValueError(f"scale must be one number, got shape {list(self.scale.shape)}")
        expect("score_TE", self.score_TE, (T, E), "[T, E]")
        expect("inv_norm_T", self.inv_norm_T, (T,), "[T]")
        expect("unrouted_T", self.unrouted_T, (T,), "[T]", torch.bool)
        expect("bits_TW", self.bits_TW, (T, -(-E // 64)), "[T, W], 64 experts a word,", torch.int64)
        expect("unit_ED", self.unit_ED, (E, D), "[E, D]")
        expect("inv_norm_E", self.inv_norm_E, (E,), "[E]")


class Index(NamedTuple):
    """The index of the ragged assignment, as `ragged_index` returns it."""

    expert_offsets: Tensor
    token_offsets: Tensor
    token_of_row: Tensor
    row_of_assignment: Tensor

    @property
    def rows(self) -> int:
        """Length of the row arrays: A, or the bounded capacity."""
        return self.token_of_row.shape[0]

    @property
    def experts(self) -> int:
        """E."""
        return self.expert_offsets.shape[0] - 1

    def check(self, T: int, E: int) -> None:
        """Raise ValueError unless every array fits T tokens and E experts."""
        expect_index(T, E, self)


class ExpertWeights(NamedTuple):
    """The stacked weights of expert networks; only gated ones have `w3` and `b3`."""

    w1_EDH: Tensor
    b1_EH: Tensor | None
    w3_EDH: Tensor | None
    b3_EH: Tensor | None
    w2_EHO: Tensor
    b2_EO: Tensor | None

    def check(self, x_TD: Tensor, activation: str) -> int:
        """Return E; raise ValueError unless the weights fit each other and the tokens, and the activation is known."""
        w1, b1, w3, b3, w2, b2 = self
        expect_matrix("x_TD", x_TD, "[T, D]")
        expect_matrix("w1_EDH", w1, "[E, D, H]", 3)
        expect_matrix("w2_EHO", w2, "[E, H, O]", 3)
        E, _, H = w1.shape
        expect("w1_EDH", w1, (E, x_TD.shape[1], H), "[E, D, H]")
        expect("b1_EH", b1, (E, H), "[E, H]")
        expect("w3_EDH", w3, w1.shape, "[E, D, H], as w1_EDH,")
        expect("b3_EH", b3, (E, H), "[E, H]")
        expect("w2_EHO", w2, (E, H, w2.shape[2]), "[E, H, O]")
        expect("b2_EO", b2, (E, w2.shape[2]), "[E, O]")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation = {activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        return E

    def pre_activations(self, x_TD: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Uninitialised h and u, [rows, H], of the dtype of `x_TD`; u is empty unless the experts are gated."""
        H = self.w1_EDH.shape[2]
        return x_TD.new_empty((rows, H)), x_TD.new_empty((0 if self.w3_EDH is None else rows, H))

    def gradients(self, wanted: bool) -> list[Tensor]:
        """An uninitialised gradient for each weight; an empty tensor if the weight is None or it is not `wanted`."""
        # a new empty tensor each time: an operation may not return the same tensor twice
        return [torch.empty_like(w) if wanted and w is not None else self.no_gradient() for w in self]

    def no_gradient(self) -> Tensor:
        """An empty tensor in place of a gradient."""
        return self.w1_EDH.new_empty((0,), dtype=torch.float32)


def expect_active(active_E: Tensor, E: int) -> None:
    """Raise ValueError unless `active_E` tells of E slots whether they are active, as bools or numbers."""
    expect("active_E", active_E, (E,), "[E]")
    if active_E.dtype != torch.bool and not active_E.is_floating_point():
        raise ValueError(f"active_E must be bool, or float and above one half where active, got {active_E.dtype}")


def active_slots(active_E: Tensor) -> Tensor:
    """`active_E` as bools."""
    return active_E if active_E.dtype == torch.bool else active_E > 0.5


def empty_as(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """Uninitialised, as `tensor`; without one, of no element on the device of `instead`, in place of a gradient."""
    return instead.new_empty((0,), dtype=torch.float32) if tensor is None else torch.empty_like(tensor)


def expect_index(T: int, E: int | None, index: Sequence[Tensor | None]) -> int:
    """Check expert_offsets (or None), token_offsets, token_of_row and row_of_assignment; return the rows' number.

    They must be contiguous, because kernels address them without strides.
    """
    expert_offsets, token_offsets, token_of_row, row_of_assignment = index
    assert token_of_row is not None
    if E is not None:
        expect("expert_offsets", expert_offsets, (E + 1,), "[E + 1]", torch.int32)
    expect("token_offsets", token_offsets, (T + 1,), "[T + 1]", torch.int32)
    rows = token_of_row.numel()
    expect("token_of_row", token_of_row, (rows,), "[rows]", torch.int32)
    expect("row_of_assignment", row_of_assignment, (rows,), "[rows], as token_of_row,", torch.int32)
    for name, tensor in zip(Index._fields, index, strict=True):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}: call .contiguous()")
    return rows
