"""Auxiliary losses against the oracle: every term, its gradients, and their sum l_aux."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import helpers
import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FP32,
    TERMS,
    Case,
    assert_gradients,
    conditions,
    gate_gradients,
    make_case,
    relative_rms,
)
from torch import Tensor

from dynmoe_tutel import losses, moe
from dynmoe_tutel.kernels import vector_losses

D = 16
CASES: dict[str, dict[str, Any]] = {
    "mixed": {},
    "masked slots": {"E": 7, "active": [1, 2, 5]},
    "one expert": {"E": 1, "G": 0.05},
    "every token takes all": {"G": -1.5},
    "every token is unrouted": {"G": 1.5},
    "E = 65": {"T": 12, "E": 65, "active": [*range(8), *range(57, 65)], "G": (0.2, 0.5)},
    "T = 0": {"T": 0},
    "T = 1": {"T": 1},
}


def loss_gradients(case: Case, l_aux: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by the names of `gate_gradients`, zero where it does not depend on the tensor."""
    named = {"x": x} | {f"gates.0.{name}": p for name, p in case.layer.gates[0].named_parameters()}
    found = torch.autograd.grad(l_aux, list(named.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(named, found, strict=True))


@cache
def reference(name: str, temperature: float | None) -> dict[str, tuple[float, Tensor, Tensor]]:
    """The oracle's losses of a case, shared by the tests of every term, in train and eval."""
    case = make_case(**CASES[name], temperature=temperature)
    return oracle.losses(case.x.double(), case.gate)


def experts(count: int = 5, **more: Any) -> dict[str, Any]:
    return {"type": "ffn", "num_experts_per_device": count, "hidden_size_per_expert": 8, **more}


@pytest.mark.parametrize("temperature", [None, 1.3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("term", TERMS)
def test_value_and_gradients(term: str, name: str, training: bool, temperature: float | None) -> None:
    case = make_case(**CASES[name], temperature=temperature, aux_losses={term: 1.0})
    value, dw_DE, da_TE = reference(name, temperature)[term]
    x = case.x.clone().requires_grad_()
    l_aux = case.layer.train(training)(x).l_aux
    assert relative_rms(case.layer.aux_terms[term], value, scale=0.1) < FP32
    assert torch.equal(l_aux, case.layer.aux_terms[term])
    through_gate = oracle.gate_backward(case.x.double(), case.gate, da_TE)
    expected = gate_gradients({**through_gate, "w": through_gate["w"] + dw_DE}, case.gate)
    parts = None
    if term == "load_balance":  # load_e / k minus its mean over the token's experts: equal loads cancel
        k_T1 = (a_TE := oracle.passes(case.x.double(), case.gate).double()).sum(dim=1, keepdim=True)
        part_TE = a_TE / k_T1.clamp(min=1) * a_TE.mean(dim=0) * a_TE.shape[1] / max(len(a_TE), 1)
        parts = gate_gradients(oracle.gate_backward(case.x.double(), case.gate, part_TE), case.gate)
    assert_gradients(loss_gradients(case, l_aux, x), expected, case.gate, FP32, parts=parts)


def test_l_aux_is_the_weighted_sum_of_the_terms() -> None:
    weights = {"diversity": 0.5, "simplicity": 2.0, "load_balance": 0.25, "efficiency": 3.0, "gshard": 0.0}
    case = make_case(aux_losses=weights)
    y = case.layer(case.x)
    assert case.layer.aux_terms.keys() == weights.keys()
    found = oracle.losses(case.x.double(), case.gate)
    assert relative_rms(y.l_aux, sum(weight * found[name][0] for name, weight in weights.items())) < FP32
    assert y.l_aux is case.layer.l_aux
    assert y.l_aux.shape == ()
    assert y.l_aux.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_l_aux_is_fp32_for_every_type_of_token(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, aux_losses=dict.fromkeys(TERMS, 1.0))
    l_aux = case.layer(case.x).l_aux
    assert l_aux.dtype == torch.float32
    expected = sum(value for value, _, _ in oracle.losses(case.x.double(), case.gate).values())
    assert relative_rms(l_aux, expected) < FP32


@pytest.mark.parametrize(
    ("gate_type", "is_gshard_loss", "names"),
    [
        ({"type": "top_any"}, None, {"diversity", "simplicity"}),
        ({"type": "top_any"}, False, {"diversity", "simplicity"}),
        ({"type": "top_any"}, True, {"gshard"}),
        ({"type": "gated_multi_gate"}, None, {"diversity", "simplicity"}),
        ({"type": "gated_multi_gate_t"}, True, {"gshard"}),
        ({"type": "top", "k": 2}, None, {"gshard"}),
        ({"type": "top", "k": 2}, True, {"gshard"}),
        ({"type": "top", "k": 2, "gate_noise": 1.0}, False, {"load_importance"}),
        ({"type": "cosine_top"}, None, {"gshard"}),
    ],
)
def test_terms_by_default(gate_type: dict[str, Any], is_gshard_loss: bool | None, names: set[str]) -> None:
    layer = moe.moe_layer(gate_type, D, experts(), is_gshard_loss=is_gshard_loss)
    layer(torch.ones(3, D))
    assert set(layer.aux_terms) == names
    assert torch.equal(layer.l_aux, sum(layer.aux_terms.values(), torch.zeros(())))


def test_at_the_start_the_loss_of_a_top_any_gate_is_one() -> None:
    """Orthogonal unit columns: diversity 0, simplicity 1."""
    layer = moe.moe_layer({"type": "gated_multi_gate", "max_expert_num": 8}, D, experts(3))
    layer(torch.ones(2, D))
    assert float(layer.l_aux.detach()) == pytest.approx(1.0, abs=1e-6)


def test_inactive_slots_count_for_nothing() -> None:
    """DynMoE-Tutel's norm term averages over all slots; here it is over the active ones."""
    case = make_case(E=6, active=[0, 2, 3], aux_losses=dict.fromkeys(TERMS, 1.0))
    before = case.layer(case.x).l_aux
    before.backward()
    gate = case.layer.gates[0]
    assert not gate.sim_matrix.grad[:, [1, 4, 5]].any()
    assert not gate.gates.grad[[1, 4, 5]].any()
    with torch.no_grad():
        gate.sim_matrix[:, [1, 4, 5]] *= 7.0
        gate.gates[[1, 4, 5]] = -2.0
    assert torch.equal(case.layer(case.x).l_aux, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [1, 3])
class TestFixedK:
    T, E, noise = 13, 5, 2.0

    def check(
        self, k: int, training: bool, value: Callable[[Tensor, Tensor], Tensor], is_gshard_loss: bool | None = None
    ) -> None:
        """l_aux and its gradient at the gate's weights are those of `value`, a function of the logits without noise and
        of the noisy ones; both are sums that cancel, so an error counts against their terms."""
        gate_type = {"type": "top", "k": k, "gate_noise": self.noise}
        layer = moe.moe_layer(gate_type, D, experts(self.E), is_gshard_loss=is_gshard_loss, seeds=(1, 2))
        x = torch.randn(self.T, D, generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng():
            torch.manual_seed(9)
            noise_TE = torch.randn(self.T, self.E) * (self.noise / self.E if training else 0.0)
            torch.manual_seed(9)
            layer.train(training)(x)

        def results(x_TD: Tensor, weight_ED: Tensor, noise_TE: Tensor) -> tuple[Tensor, Tensor]:
            weight_ED = weight_ED.detach().requires_grad_()
            logits_TE = x_TD @ weight_ED.T
            loss = value(logits_TE, logits_TE + noise_TE)
            return loss.detach(), torch.autograd.grad(loss, weight_ED)[0]

        weight = layer.gates[0].wg.weight
        layer.l_aux.backward()
        given = (x.double(), weight.double(), noise_TE.double())
        scales = conditions(results, *given, few=weight.numel())
        for found, expected, scale in zip((layer.l_aux, weight.grad), results(*given), scales, strict=True):
            assert relative_rms(found, expected, scale) < 3 * FP32  # softmax, distribution and variance round in turn

    def test_gshard(self, k: int, training: bool) -> None:
        """E / T^2 sum_e (sum_t score) (tokens whose first pick is e), with noisy scores."""

        def gshard(_: Tensor, noisy_TE: Tensor) -> Tensor:
            score_TE = noisy_TE.softmax(dim=1)
            first_E = F.one_hot(score_TE.argmax(dim=1), self.E).sum(dim=0)
            return (score_TE.sum(dim=0) * first_E).sum() * self.E / self.T**2

        self.check(k, training, gshard)

    def test_load_importance(self, k: int, training: bool) -> None:
        def load_importance(logits_TE: Tensor, noisy_TE: Tensor) -> Tensor:
            limit_T = noisy_TE.sort(dim=1, descending=True).values[:, k - 1]
            return helpers.load_importance(logits_TE.softmax(dim=1), limit_T, self.noise)

        self.check(k, training, load_importance, is_gshard_loss=False)


@pytest.mark.parametrize("is_gshard_loss", [True, False])
@pytest.mark.parametrize(("T", "E"), [(0, 4), (1, 4), (5, 1)])
def test_fixed_k_losses_of_few_tokens_or_one_expert_are_finite(T: int, E: int, is_gshard_loss: bool) -> None:
    layer = moe.moe_layer(
        {"type": "top", "k": 1, "gate_noise": 1.0}, D, experts(E), is_gshard_loss=is_gshard_loss, seeds=(1, 2)
    )
    layer(torch.ones(T, D)).l_aux.backward()
    assert layer.l_aux.isfinite()
    assert layer.gates[0].wg.weight.grad.isfinite().all()


def test_functions_alone() -> None:
    """The public formulas on plain tensors: uniform routing gives load_balance k and gshard 1."""
    a_TE = F.one_hot(torch.arange(8) % 4).float() + F.one_hot((torch.arange(8) + 1) % 4).float()
    assert float(losses.load_balance_loss(a_TE)) == pytest.approx(4 * 4 * (1 / 4) * (1 / 2))
    assert float(losses.efficiency_loss(a_TE)) == 0.5
    score_TE = torch.full((8, 4), 0.25)
    assert float(losses.gshard_loss(score_TE, F.one_hot(torch.arange(8) % 4))) == pytest.approx(1.0)
    assert float(losses.gshard_loss(score_TE, torch.zeros(8, 4))) == 0.0
    orthogonal = torch.eye(4)[:, :3] * 2
    active_E = torch.ones(3, dtype=torch.bool)
    diversity, simplicity, *_ = vector_losses(orthogonal, active_E)
    assert float(diversity) == 0.0
    assert float(simplicity) == 2.0
    assert float(vector_losses(torch.ones(4, 2), active_E[:2])[0]) == pytest.approx(2**0.5)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(
        ValueError, match="aux_losses: 'load_importance' is no term of TopAnyGate: allowed are diversity"
    ):
        moe.moe_layer("top_any", D, experts(), aux_losses={"load_importance": 1.0})
    with pytest.raises(ValueError, match="aux_losses: 'diversity' is no term of TopKGate: allowed are gshard"):
        moe.moe_layer("top", D, experts(), aux_losses={"diversity": 1.0})
    with pytest.raises(ValueError, match=r"needs gate_type\['gate_noise'\] > 0"):
        moe.moe_layer("top", D, experts(), is_gshard_loss=False)
