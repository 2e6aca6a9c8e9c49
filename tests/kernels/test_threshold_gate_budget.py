"""The threshold gate with a budget: its decisions against a rule written token by token."""

from __future__ import annotations

import pytest
import torch
from gate_cases import ONE, cosine, gate_inputs
from torch import Tensor

from dynmoe_tutel.kernels import threshold_gate, unpack_bits
from dynmoe_tutel.kernels.threshold_gate import _cap


def naive_budget(margin_TE: Tensor, active_E: Tensor, shift: float, max_k: int) -> tuple[Tensor, Tensor]:
    """Assignment [T, E] and unrouted flags [T] of margins cos - G, token by token; NaN is above all."""
    assigned_TE = torch.zeros_like(margin_TE, dtype=torch.bool)
    for t, margins in enumerate(margin_TE.nan_to_num(torch.inf, torch.inf, -torch.inf).tolist()):
        slots = [e for e in range(len(margins)) if active_E[e]]
        best = sorted(slots, key=lambda e: -margins[e])
        kept = [e for e in best if margins[e] > shift] or [e for e in best[:1] if margins[e] > 0]
        assigned_TE[t, kept[: max_k or None]] = True
    return assigned_TE, ~assigned_TE.any(dim=1)


class TestBudget:
    @pytest.mark.parametrize("max_k", [0, 1, 2, 3, 17, 20])
    @pytest.mark.parametrize("shift", [None, 0.0, 0.1, -0.1])
    @pytest.mark.parametrize(("T", "D", "E"), [(7, 97, 65), (600, 8, 8), (600, 16, 24), (300, 40, 130), (0, 8, 3)])
    def test_equals_the_rule(self, T: int, D: int, E: int, shift: float | None, max_k: int) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(T, D, E)
        raised = None if shift is None else torch.tensor([shift])
        _, bits, unrouted_T, _, counts = threshold_gate(
            x_TD, w_DE, threshold_E - 0.1, active_E, ONE, False, None, raised, max_k
        )
        margin_TE = cosine(x_TD, w_DE) - (threshold_E - 0.1).double()
        assigned_TE, expected_T = naive_budget(margin_TE, active_E, shift or 0.0, max_k)
        assert torch.equal(unpack_bits(bits, E), assigned_TE)
        assert torch.equal(unrouted_T, expected_T)
        assert torch.equal(counts.view(-1, E).sum(dim=0), assigned_TE.sum(dim=0))

    @pytest.mark.parametrize("max_k", [1, 2, 3])
    @pytest.mark.parametrize(("T", "E"), [(5, 6), (5, 8), (400, 8), (400, 65)])
    def test_equal_margins_among_others(self, T: int, E: int, max_k: int) -> None:
        """Pairs of experts are the same; so are all for zero tokens, whose thresholds below 0 they pass."""
        x_TD, w_DE, _, _ = gate_inputs(T, 16, E)
        w_DE[:, 1::2] = w_DE[:, : E - 1 : 2][:, : E // 2]
        x_TD[::3] = 0
        threshold_E, active_E = torch.full((E,), -0.05), torch.arange(E) != 0
        margin_TE = cosine(x_TD, w_DE) - threshold_E.double()
        for shift in (0.0, 0.04, 0.1):
            _, bits, unrouted_T, *_ = threshold_gate(
                x_TD, w_DE, threshold_E, active_E, ONE, False, None, torch.tensor([shift]), max_k
            )
            assigned_TE, expected_T = naive_budget(margin_TE, active_E, shift, max_k)
            assert torch.equal(unpack_bits(bits, E), assigned_TE)
            assert torch.equal(unrouted_T, expected_T)

    @pytest.mark.parametrize("broken", ["vector nan", "vector inf", "threshold nan", "threshold -inf"])
    @pytest.mark.parametrize("T", [9, 900])
    def test_experts_that_are_not_finite(self, T: int, broken: str) -> None:
        """An active one takes all tokens and is the first to stay; an inactive one unroutes none.

        Regression: a token that passed only its own threshold was unrouted if an inactive slot's vector was NaN.
        """
        x_TD, w_DE, threshold_E, active_E = gate_inputs(T, 16, 5)
        for slots, max_k in (([3], 0), ([2, 3], 0), ([2, 3], 2)):
            active_E = torch.tensor([True, True, True, False, True])
            clean = cosine(x_TD, w_DE) - threshold_E.double()
            w, G = w_DE.clone(), threshold_E.clone()
            for e in slots:
                if broken.startswith("vector"):
                    w[1, e] = float(broken.split()[1])
                else:
                    G[e] = float(broken.split()[1])
                clean[:, e] = torch.inf
            _, bits, unrouted_T, *_ = threshold_gate(x_TD, w, G, active_E, ONE, False, None, torch.tensor([0.3]), max_k)
            assigned_TE, expected_T = naive_budget(clean, active_E, 0.3, max_k)
            assert torch.equal(unpack_bits(bits, 5), assigned_TE)
            assert torch.equal(unrouted_T, expected_T)

    def test_a_slot_that_misses_its_raised_threshold_by_rounding_stays_out(self) -> None:
        """cos <= G + shift may hold where cos - G, rounded, exceeds the margin of an assignment."""
        cos_TE, threshold_E = torch.tensor([[0.5, 0.5, 0.5 + 2**-23]]), torch.full((3,), 0.4)
        assigned_TE = torch.tensor([[True, True, False]])
        _cap(assigned_TE, torch.tensor([2]), cos_TE, threshold_E, 0.1, 1)
        assert assigned_TE.tolist() == [[True, False, False]]
