"""Checks the specification: its written-out gradients by finite differences, the rest by hand-computed cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import load_importance, relative_rms
from torch import Tensor

T, D, H, O, E = 5, 3, 4, 2, 4
STEP = 1e-5


def random_gate(temperature: float | None, seed: int = 0) -> tuple[Tensor, oracle.Gate]:
    """Tokens and a gate with an inactive slot, an unrouted token and several k."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    w_DE = torch.randn(D, E, generator=generator, dtype=torch.float64)
    G_E = torch.rand(E, generator=generator, dtype=torch.float64) - 0.4
    gate = oracle.Gate(w_DE, G_E, [0, 1, 3], temperature)
    k_T = oracle.assignments(x_TD, gate).sum(dim=1)
    assert {0, 1, 2} <= set(k_T.tolist())
    return x_TD, gate


def random_experts(seed: int = 1) -> oracle.Experts:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((H, D), (H,), (H, O), (O,))
    slots = [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(E)]
    return oracle.Experts(oracle.ffn(F.gelu), slots)


def central_differences(function: Callable[[Tensor], float], at: Tensor) -> Tensor:
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        step = torch.zeros_like(at)
        step.view(-1)[i] = STEP
        gradient.view(-1)[i] = (function(at + step) - function(at - step)) / (2 * STEP)
    return gradient


def check(gradients: dict[str, Tensor | float], surrogate: Callable[[Tensor, oracle.Gate], float], *at: object) -> None:
    """Assert that `gradients` are the derivatives of surrogate(x, gate) at `at`, one input at a time."""
    x_TD, gate = at
    assert isinstance(x_TD, Tensor)
    assert isinstance(gate, oracle.Gate)
    expected = {
        "x": central_differences(lambda x: surrogate(x, gate), x_TD),
        "w": central_differences(lambda w: surrogate(x_TD, replace(gate, w_DE=w)), gate.w_DE),
        "G": central_differences(lambda G: surrogate(x_TD, replace(gate, G_E=G)), gate.G_E),
    }
    for name, value in expected.items():
        assert value.any(), name
        assert relative_rms(gradients[name], value) < 1e-7, name
    if gate.temperature is not None:
        at_temperature = torch.tensor([gate.temperature], dtype=torch.float64)
        value = central_differences(lambda t: surrogate(x_TD, replace(gate, temperature=float(t))), at_temperature)
        assert float(value) == pytest.approx(gradients["temperature"], rel=1e-6)


@pytest.mark.parametrize("temperature", [None, 1.2])
class TestGradients:
    """The straight-through estimator is the derivative of a surrogate in which an assignment is not 0 or 1 but
    moves with s - theta: a = 1 + (s - theta) - (s - theta at the point), on the pairs assigned at the point."""

    def soft(self, at: tuple[Tensor, oracle.Gate]) -> Callable[[Tensor, oracle.Gate], Tensor]:
        assigned_TE = oracle.assignments(*at)
        margin_TE = oracle.scores(*at) - oracle.thresholds(at[1])
        return lambda x, gate: assigned_TE * (1 + oracle.scores(x, gate) - oracle.thresholds(gate) - margin_TE)

    def test_gate(self, temperature: float | None) -> None:
        at = random_gate(temperature)
        weight_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        gradients = oracle.gate_backward(*at, weight_TE * oracle.assignments(*at))
        check(gradients, lambda x, gate: float((weight_TE * self.soft(at)(x, gate)).sum()), *at)

    @pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
    def test_layer(self, temperature: float | None, combine_gradient: str) -> None:
        at, experts = random_gate(temperature), random_experts()
        dy_TO = torch.randn(T, O, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        k_T = oracle.assignments(*at).sum(dim=1)

        def surrogate(x_TD: Tensor, gate: oracle.Gate, experts: oracle.Experts = experts) -> float:
            a_TE, total = self.soft(at)(x_TD, gate), 0.0
            for t, e in a_TE.nonzero().tolist():
                k = a_TE[t].sum() if combine_gradient == "normalized" else k_T[t]
                total += float(a_TE[t, e] / k * (dy_TO[t] @ experts(e, x_TD[t])))
            return total

        gradients = oracle.backward(*at, experts, dy_TO, True, combine_gradient)
        check(gradients, surrogate, *at)
        assert surrogate(*at) == pytest.approx(float((dy_TO * oracle.forward(*at, experts, True)).sum()), rel=1e-12)
        for e in range(E):
            for i in range(4):

                def with_parameter(value: Tensor, e: int = e, i: int = i) -> float:
                    slots = [list(slot) for slot in experts.parameters]
                    slots[e][i] = value
                    return surrogate(*at, replace(experts, parameters=slots))

                expected = central_differences(with_parameter, experts.parameters[e][i])
                assert relative_rms(gradients["parameters"][e][i], expected) < 1e-7

    @pytest.mark.parametrize("name", ["diversity", "simplicity", "load_balance", "efficiency", "gshard"])
    def test_losses(self, temperature: float | None, name: str) -> None:
        x_TD, gate = at = random_gate(temperature)
        value, dw_DE, da_TE = oracle.losses(*at)[name]
        hard_TE, active = oracle.assignments(*at).double(), list(gate.active)
        routed = hard_TE.sum(dim=1) > 0

        def surrogate(x_TD: Tensor, gate: oracle.Gate) -> float:
            a_TE = self.soft(at)(x_TD, gate)
            w_DE = gate.w_DE[:, active]
            if name == "diversity":
                unit_DE = w_DE / w_DE.norm(dim=0)
                return float((unit_DE.T @ unit_DE - torch.eye(len(active))).norm())
            if name == "simplicity":
                return float(w_DE.norm(dim=0).mean())
            if name == "efficiency":
                return float(a_TE.mean())
            if name == "load_balance":
                # outside the assignments a_TE is a constant 0, so that its sum is k, which moves with its scores
                share_E = (a_TE[routed] / a_TE[routed].sum(dim=1, keepdim=True)).mean(dim=0)
                return float(E * (share_E * hard_TE[routed].mean(dim=0)).sum())
            first_T = (oracle.scores(*at) * hard_TE).argmax(dim=1)
            firsts_E = (F.one_hot(first_T, E) * hard_TE).sum(dim=0)
            return float((a_TE.sum(dim=0) * firsts_E).sum()) * len(active) / T**2

        assert surrogate(*at) == pytest.approx(value, rel=1e-12)
        gradients = oracle.gate_backward(*at, da_TE)
        if name in ("diversity", "simplicity"):
            assert not da_TE.any()
            expected = central_differences(lambda w: surrogate(x_TD, replace(gate, w_DE=w)), gate.w_DE)
            assert relative_rms(dw_DE, expected) < 1e-7
        else:
            assert not dw_DE.any()
            check(gradients, surrogate, *at)


class TestByHand:
    """Three axes in the plane at 0, 90 and 180 degrees; tokens at given angles."""

    w_DE = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    gate = oracle.Gate(w_DE, torch.full((3,), 0.5).double(), [0, 1, 2])  # cosine over 0.5: within 60 degrees

    @staticmethod
    def tokens(*degrees: float) -> Tensor:
        angle_T = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return 5 * torch.stack([angle_T.cos(), angle_T.sin()], dim=1)

    def test_assignments_and_fallback(self) -> None:
        x_TD = self.tokens(10, 45, 135, -80, -100)
        assigned = [[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]]
        assert oracle.assignments(x_TD, self.gate).int().tolist() == assigned
        in_eval = [*assigned[:3], [1, 0, 0], [0, 0, 1]]
        assert oracle.assignments(x_TD, self.gate, training=False).int().tolist() == in_eval
        masked = replace(self.gate, active=[1, 2])
        expected = [[0, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
        assert oracle.assignments(x_TD, masked, training=False).int().tolist() == expected

    def test_equality_is_no_assignment(self) -> None:
        x_TD = self.tokens(0)
        gate = replace(self.gate, G_E=torch.ones(3, dtype=torch.float64))
        assert oracle.cosines(x_TD, gate)[0, 0] == 1
        assert not oracle.assignments(x_TD, gate).any()

    def test_temperature(self) -> None:
        x_TD = self.tokens(60)
        hot = replace(self.gate, temperature=math.log(4.0))
        assert float(oracle.scores(x_TD, hot)[0, 0]) == pytest.approx(1 / (1 + math.exp(-4 * 0.5)))
        assert float(oracle.thresholds(hot)[0]) == pytest.approx(1 / (1 + math.exp(-4 * 0.5)))
        assert replace(self.gate, temperature=7.0).tau == pytest.approx(100)

    def test_forward(self) -> None:
        """Expert e adds 10 ** e: the mean of those a token has."""
        experts = oracle.Experts(lambda x_D, b: 0 * x_D + b, [[torch.tensor(10.0**e)] for e in range(3)])
        y_TO = oracle.forward(self.tokens(10, 45, 135, -80), self.gate, experts, training=True)
        assert y_TO[:, 0].tolist() == [1, 5.5, 55, 0]
        assert oracle.forward(self.tokens(-80), self.gate, experts, training=False)[0, 0] == 1

    def test_index(self) -> None:
        assert oracle.index(oracle.assignments(self.tokens(135, 10, -90, 45), self.gate)) == {
            "token_of_row": [1, 3, 0, 3, 0],
            "row_of_assignment": [2, 4, 0, 1, 3],
            "expert_offsets": [0, 2, 4, 5],
            "token_offsets": [0, 2, 3, 3, 5],
        }

    def test_load_importance(self) -> None:
        """Importance 1.2 and 0.8: variance (0.2^2 + 0.2^2) / 1 over mean 1 is 0.08. Load: noise / E is 0.2, and a score
        at the limit, 0.4 and 0.8 below it counts 1/2, cdf(-2) and cdf(-4)."""
        noise = 2 * 0.2
        score_TE = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
        limit_T = torch.tensor([0.9, 0.7], dtype=torch.float64)
        load_E = [0.5 + cdf(-2), cdf(-4) + 0.5]
        mean = sum(load_E) / 2
        load = ((load_E[0] - mean) ** 2 + (load_E[1] - mean) ** 2) / mean**2
        assert float(load_importance(score_TE, limit_T, noise)) == pytest.approx((0.08 + load) / 2)

    def test_growth(self) -> None:
        """Slot 2 is silent; the unrouted tokens lie at -90 and -80 degrees, nearest to slot 0."""
        gate, pruned, slot, parent = oracle.adapt([self.tokens(10, 45), self.tokens(-90, -80)], self.gate)
        assert (pruned, slot, parent, gate.active) == ([2], 2, 0, [0, 1, 2])
        assert gate.G_E.tolist() == [0.5, 0.5, 0]
        assert torch.allclose(gate.w_DE[:, 2], self.tokens(-85)[0] / 5)
        assert torch.equal(gate.w_DE[:, :2], self.gate.w_DE[:, :2])

    def test_what_changes_nothing(self) -> None:
        for batches in ([], [self.tokens()], [self.tokens(10, 90, 170)]):
            gate, pruned, slot, _ = oracle.adapt(batches, self.gate)
            assert (list(gate.active), pruned, slot) == ([0, 1, 2], [], None)
            assert torch.equal(gate.w_DE, self.gate.w_DE)

    def test_all_silent_and_cancelling(self) -> None:
        """Tokens at -80 and 100 degrees with slot 1 masked: none passes, and they cancel."""
        gate, pruned, slot, _ = oracle.adapt([self.tokens(-80, 100)], replace(self.gate, active=[0, 2]))
        assert (gate.active, pruned, slot) == ([0], [2], None)


def cdf(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2
