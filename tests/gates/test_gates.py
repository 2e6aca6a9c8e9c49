"""Gates against their formulas in plain torch: fixed k, the cosine router, top-any, lists, seeds."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gate_case import D, H, check_against, layer_with, tokens
from torch import Tensor, nn

from dynmoe_tutel import moe, validation
from dynmoe_tutel.gates import make_gate


def naive_fixed_k(logits_TE: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax scores [T, E] and combine weights [T, E], token by token."""
    scores_TE = logits_TE.exp() / logits_TE.exp().sum(dim=1, keepdim=True)
    rows = []
    for s in scores_TE.unbind(0):
        best = s.detach().sort(descending=True, stable=True).indices[:k].tolist()
        total = sum(s[e] for e in best) if normalize and k > 1 else 1
        rows.append(torch.stack([s[e] / total if e in best else s[e] * 0 for e in range(len(s))]))
    return scores_TE, torch.stack(rows)


def gshard(scores_TE: Tensor) -> Tensor:
    """E / T^2 sum_e (sum_t s) (number of tokens whose best expert is e)."""
    T, E = scores_TE.shape
    return E / T**2 * (scores_TE.sum(0) * F.one_hot(scores_TE.argmax(1), E).sum(0)).sum()


@pytest.fixture
def forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let warnings that come once come again."""
    monkeypatch.setattr(validation, "_warned", set())


class TestTop:
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("k", [1, 2, 4])
    @pytest.mark.parametrize("T", [1, 9])
    def test_layer_and_gradients(self, T: int, k: int, normalize: bool) -> None:
        layer = layer_with({"type": "top", "k": k}, normalize_gate=normalize)

        def naive(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            scores_TE, weights_TE = naive_fixed_k(t["x"] @ t["gates.0.wg.weight"].t(), k, normalize)
            return weights_TE, gshard(scores_TE)

        for mode in (True, False):
            check_against(layer.train(mode), tokens(T), naive)
            layer.zero_grad()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_routing_is_in_fp32(self, dtype: torch.dtype) -> None:
        layer = layer_with({"type": "top", "k": 2}, dtype=dtype)
        x_TD = tokens(30, dtype)
        routing = layer.route(x_TD)
        wg = layer.gates[0].wg.weight
        scores_TE, weights_TE = naive_fixed_k(x_TD.double() @ wg.double().t(), 2, True)
        assert routing.scores.dtype == routing.weights.dtype == torch.float32
        assert torch.allclose(routing.scores.double(), scores_TE, rtol=1e-5)
        assert torch.equal(routing.assigned, weights_TE > 0)
        assert torch.allclose(routing.weights.double(), weights_TE, rtol=1e-5)
        assert layer(x_TD).dtype == dtype

    def test_top_k_of_one_call(self) -> None:
        layer, x_TD = layer_with({"type": "top", "k": 1}), tokens()
        other = layer_with({"type": "top", "k": 3})
        assert torch.equal(layer(x_TD, top_k=3), other(x_TD))
        assert torch.equal(layer(x_TD), layer(x_TD, top_k=1))
        assert not torch.equal(layer(x_TD), other(x_TD))

    def test_no_tokens(self) -> None:
        layer = layer_with({"type": "top", "k": 2})
        y = layer(tokens(0))
        assert y.shape == (0, D)
        assert float(y.l_aux) == 0
        (y.sum() + y.l_aux).backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in layer.parameters())

    def test_noise_in_training_only(self) -> None:
        layer, x_TD = layer_with({"type": "top", "k": 2, "gate_noise": 3.0}), tokens()
        logits_TE = x_TD @ layer.gates[0].wg.weight.t()
        torch.manual_seed(5)
        noisy_TE = logits_TE + 3.0 / 4 * torch.randn(9, 4, dtype=torch.float64)
        torch.manual_seed(5)
        noisy = layer.route(x_TD)
        scores_TE, weights_TE = naive_fixed_k(noisy_TE, 2, True)
        assert torch.allclose(noisy.scores, scores_TE)
        assert torch.allclose(noisy.weights, weights_TE)
        state = torch.get_rng_state()
        assert torch.allclose(layer.eval().route(x_TD).scores, logits_TE.softmax(1))
        assert torch.equal(torch.get_rng_state(), state)

    def test_load_and_importance_loss(self) -> None:
        """Tutel's loss: squared coefficients of variation of sum_t s and of sum_t cdf((s - limit) / (noise / E))."""
        layer = layer_with({"type": "top", "k": 2, "gate_noise": 2.0}, is_gshard_loss=False)
        x_TD = tokens(20)
        torch.manual_seed(3)
        y = layer(x_TD)
        torch.manual_seed(3)
        wg = layer.gates[0].wg.weight.detach().clone().requires_grad_()
        logits_TE = x_TD @ wg.t()
        noisy_TE = logits_TE + 2.0 / 4 * torch.randn(20, 4, dtype=torch.float64)
        last_T1 = noisy_TE.topk(2).indices[:, 1:]
        load_TE = torch.distributions.Normal(0.0, 2.0 / 4).cdf(logits_TE.softmax(1) - noisy_TE.gather(1, last_T1))
        expected = torch.zeros((), dtype=torch.float64)
        for total_E in (logits_TE.softmax(1).sum(0), load_TE.sum(0)):
            expected = expected + total_E.var() / (total_E.mean() ** 2 + 1e-10) / 2
        assert float(y.l_aux) == pytest.approx(float(expected), rel=1e-5)
        assert set(layer.aux_terms) == {"load_importance"}
        y.l_aux.backward()
        expected.backward()
        assert torch.allclose(layer.gates[0].wg.weight.grad, wg.grad, rtol=1e-5, atol=1e-8)

    def test_aux_losses_by_name(self) -> None:
        layer = layer_with({"type": "top", "k": 2, "gate_noise": 1.0}, aux_losses={"gshard": 0.5, "load_importance": 2})
        y = layer(tokens())
        terms = layer.aux_terms
        assert float(y.l_aux) == pytest.approx(0.5 * float(terms["gshard"]) + 2 * float(terms["load_importance"]))


class TestOneScoreGate:
    def test_weights_are_one_and_the_keys_are_frozen(self) -> None:
        layer, x_TD = layer_with({"type": "top", "k": 2}, one_score_gate=True), tokens()
        routing = layer.route(x_TD)
        assert torch.equal(routing.weights, routing.assigned.double())
        assert not layer.gates[0].wg.weight.requires_grad

        def naive(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            scores_TE, weights_TE = naive_fixed_k(t["x"] @ t["gates.0.wg.weight"].t(), 2, True)
            return (weights_TE > 0).double(), gshard(scores_TE)

        check_against(layer, x_TD, naive)

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_update_by_its_formula(self, momentum: float, normalize: bool, weighted: bool) -> None:
        layer = layer_with(
            {"type": "top", "k": 2},
            one_score_gate=True,
            normalize_one_score_gate=normalize,
            value_norm_weighted=weighted,
            update_momentum=momentum,
            dtype=torch.float32,
        )
        experts, old_ED = layer.experts, layer.gates[0].wg.weight.detach().clone()
        new = []
        for e in range(4):
            share_H = torch.full((H,), 1 / H)
            if weighted:
                share_H = experts.batched_fc2_w[e].norm(dim=1) / experts.batched_fc2_w[e].norm(dim=1).sum()
            key_D = (share_H.unsqueeze(1) * experts.batched_fc1_w[e]).sum(0)
            new.append(key_D / key_D.norm() if normalize else key_D)
        layer.update_one_score_gate()
        expected_ED = momentum * old_ED + (1 - momentum) * torch.stack(new)
        assert torch.allclose(layer.gates[0].wg.weight, expected_ED, rtol=1e-5, atol=1e-7)
        assert not layer.gates[0].wg.weight.requires_grad

    def test_normalized_keys_see_unit_tokens(self) -> None:
        layer = layer_with({"type": "top"}, one_score_gate=True, normalize_one_score_gate=True)
        x_TD = tokens()
        expected = (F.normalize(x_TD, dim=1) @ layer.gates[0].wg.weight.t()).softmax(1)
        assert torch.allclose(layer.route(x_TD).scores, expected)


class TestCosineTop:
    @pytest.mark.parametrize("k", [1, 2])
    @pytest.mark.parametrize("log_scale", [0.7, 9.0])
    def test_layer_and_gradients(self, k: int, log_scale: float) -> None:
        """`log_scale` 9 is above the limit log 100: tau is 100 and the temperature gets no gradient."""
        layer = layer_with({"type": "cosine_top", "k": k, "proj_dim": 5})
        with torch.no_grad():
            layer.gates[0].temperature.fill_(log_scale)
            layer.gates[0].sim_matrix.mul_(50)

        def naive(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            projected = t["x"] @ t["gates.0.cosine_projector.weight"].t() + t["gates.0.cosine_projector.bias"]
            w = t["gates.0.sim_matrix"]
            cos_TE = (projected @ w) / projected.norm(dim=1, keepdim=True) / w.norm(dim=0)
            tau = t["gates.0.temperature"].clamp(max=math.log(100)).exp()
            scores_TE, weights_TE = naive_fixed_k(tau * cos_TE, k, True)
            return weights_TE, gshard(scores_TE)

        check_against(layer, tokens(), naive)
        assert (float(layer.gates[0].temperature.grad) == 0) == (log_scale == 9.0)

    @pytest.mark.parametrize(("init_t", "log_scale"), [(0.5, math.log(2)), (1.0, 0.0), (0.1, math.log(10))])
    def test_temperature_at_start(self, init_t: float, log_scale: float) -> None:
        layer = layer_with({"type": "cosine_top", "init_t": init_t})
        assert layer.gates[0].temperature.tolist() == pytest.approx([log_scale])
        assert layer.gates[0].sim_matrix.shape == (256, 4)


class TestTopAny:
    @pytest.mark.parametrize("kind", ["gated_multi_gate", "gated_multi_gate_t"])
    @pytest.mark.parametrize(("model_dim", "slots"), [(16, 8), (8, 16), (16, 16)])
    def test_upstream_names_reproduce_upstream_bits(self, kind: str, model_dim: int, slots: int) -> None:
        """Upstream draws under torch.manual_seed(1) in every layer; this package leaves the global state alone."""
        torch.manual_seed(99)
        state = torch.get_rng_state()
        common = {"model_dim": model_dim, "num_experts": 2, "slots": slots, "aux_names": ()}
        gate = make_gate({"type": kind, "max_expert_num": slots}, **common)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        expected_ED = nn.init.orthogonal_(torch.empty(slots, model_dim))
        assert torch.equal(gate.sim_matrix, expected_ED.t())

    @pytest.mark.parametrize("seeds", [None, (4, 5)])
    def test_in_a_layer_too(self, seeds: tuple[int, int] | None) -> None:
        torch.manual_seed(99)
        gate = layer_with({"type": "gated_multi_gate", "max_expert_num": 8}, dtype=torch.float32, seeds=seeds).gates[0]
        expected_ED = nn.init.orthogonal_(torch.empty(8, D), generator=torch.Generator().manual_seed(1))
        assert torch.equal(gate.sim_matrix, expected_ED.t())

    def test_defaults_of_the_names(self) -> None:
        for kind, slots, log_scale in (
            ("top_any", 4, None),
            ("gated_multi_gate", 64, None),
            ("gated_multi_gate_t", 64, math.log(10)),
        ):
            layer = layer_with(kind)
            gate = layer.gates[0]
            assert (layer.num_global_experts, layer.max_num_global_experts) == (4, slots)
            assert gate.sim_matrix.shape == (D, slots)
            assert gate.experts_mask.tolist() == [1.0] * 4 + [0.0] * (slots - 4)
            assert gate.gates.tolist() == [0.0] * slots
            assert layer.experts.batched_fc1_w.shape == (slots, H, D)
            if log_scale is None:
                assert gate.temperature is None
            else:
                assert gate.temperature.tolist() == pytest.approx([log_scale])

    def test_the_mask_is_a_buffer(self) -> None:
        layer = layer_with({"type": "top_any", "max_expert_num": 6})
        assert "gates.0.experts_mask" in dict(layer.named_buffers())
        assert "gates.0.experts_mask" not in dict(layer.named_parameters())

    def test_tau_is_at_most_100(self) -> None:
        layer, x_TD = layer_with({"type": "top_any", "init_t": 1.0}), tokens(30)
        scores = {}
        for log_scale in (math.log(100), 7.0):
            with torch.no_grad():
                layer.gates[0].temperature.fill_(log_scale)
            scores[log_scale] = layer.route(x_TD).scores
        assert torch.allclose(scores[math.log(100)], scores[7.0], rtol=1e-5)
        (scores[7.0].sum()).backward()
        assert float(layer.gates[0].temperature.grad) == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("train", [True, False])
    def test_routing_is_in_fp32_whatever_the_weights(self, dtype: torch.dtype, train: bool) -> None:
        layer = layer_with({"type": "top_any", "max_expert_num": 6, "init_t": 0.5}, dtype=dtype).train(train)
        x_TD = tokens(50, dtype)
        gate, routing = layer.gates[0], layer.route(x_TD)
        w = gate.sim_matrix.double()
        cos_TE = (x_TD.double() @ w) / x_TD.double().norm(dim=1, keepdim=True) / w.norm(dim=0)
        tau = gate.temperature.double().exp()
        assert routing.scores.dtype == torch.float32
        assert torch.allclose(routing.scores.double(), torch.sigmoid(tau * cos_TE), rtol=2e-6)
        passed = (cos_TE > gate.gates.double()) & (gate.experts_mask > 0)
        assert torch.equal(routing.unrouted, ~passed.any(1))
        assert torch.equal(routing.assigned[passed.any(1)], passed[passed.any(1)])
        assert routing.k_per_token.min() == (0 if train else 1)

    @pytest.mark.parametrize(
        ("gate", "layer", "said"),
        [
            ({"gate_noise": 0.5}, {}, "gate_noise"),
            ({"type": "gated_multi_gate", "max_expert_num": 8, "capacity_factor": 1.5}, {}, "capacity_factor"),
            ({"fp32_gate": False}, {}, "fp32_gate"),
            ({}, {"normalize_gate": False}, "normalize_gate"),
        ],
    )
    def test_what_is_ignored_is_said_once(
        self, gate: dict, layer: dict, said: str, forget_warnings: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "dynmoe_tutel")
        for _ in range(3):
            layer_with({"type": "top_any", **gate}, **layer)
        assert [said in record.getMessage() for record in caplog.records] == [True]

    def test_arguments_of_a_call_that_are_ignored(
        self, forget_warnings: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "dynmoe_tutel")
        layer, x_TD = layer_with("top_any"), tokens()
        for _ in range(2):
            assert torch.equal(layer(x_TD, top_k=1), layer(x_TD))
        assert ["top_k" in record.getMessage() for record in caplog.records] == [True]


class TestNamesAndLists:
    def test_tutel_strings(self) -> None:
        x_TD = tokens()
        assert torch.equal(layer_with("Top2Gate")(x_TD), layer_with({"type": "top", "k": 2})(x_TD))
        grown = layer_with("GMGate8")
        assert grown.max_num_global_experts == 8
        assert torch.equal(grown(x_TD), layer_with({"type": "gated_multi_gate", "max_expert_num": 8})(x_TD))

    def test_a_list_of_gates_shares_the_experts(self) -> None:
        layer, x_TD = layer_with([{"type": "top", "k": 2}, {"type": "cosine_top"}, "top_any"]), tokens()
        for index, gate_type in enumerate(({"type": "top", "k": 2}, {"type": "cosine_top"}, "top_any")):
            alone = layer_with(gate_type)
            state = {f"gates.0.{k}": v for k, v in layer.gates[index].state_dict().items()}
            alone.load_state_dict({**{k: v for k, v in layer.state_dict().items() if "gates." not in k}, **state})
            y, expected = layer(x_TD, gate_index=index), alone(x_TD)
            assert torch.equal(y, expected)
            assert torch.equal(y.l_aux, expected.l_aux)
            assert torch.equal(layer.route(x_TD, index).assigned, alone.route(x_TD).assigned)
        assert not torch.equal(layer(x_TD, gate_index=0), layer(x_TD, gate_index=2))

    def test_each_gate_of_a_list_has_its_record(self) -> None:
        layer = layer_with(["top_any", {"type": "top_any", "init_t": 0.3}])
        layer.begin_record_routing()
        layer(tokens(5), gate_index=0)
        layer(tokens(7), gate_index=1)
        layer(tokens(7), gate_index=1)
        assert [int(record.tokens) for record in layer.records] == [5, 14]
        assert layer.record is layer.records[0]

    def test_the_callers_configuration_is_not_changed(self) -> None:
        gate = {"type": "top_any", "max_expert_num": 6, "fp32_gate": True}
        gates, before = [gate, "top_any"], dict(gate)
        moe.moe_layer(gate, D, {"count_per_node": 2, "hidden_size_per_expert": 3})
        moe.moe_layer([gate, dict(gate)], D, {"count_per_node": 2, "hidden_size_per_expert": 3})
        assert gate == before
        assert gates == [gate, "top_any"]


class TestSeeds:
    @pytest.mark.parametrize("kind", ["top_any", "gated_multi_gate", "top", "cosine_top"])
    def test_the_same_seeds_draw_the_same_layer(self, kind: str) -> None:
        torch.manual_seed(0)
        first = layer_with(kind, seeds=(3, 4))
        torch.manual_seed(1)
        second = layer_with(kind, seeds=(3, 4))
        for (name, mine), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(mine, theirs), name

    def test_each_seed_is_for_its_part(self) -> None:
        base, gate, experts = (layer_with("top_any", seeds=seeds) for seeds in ((3, 4), (5, 4), (3, 6)))
        assert torch.equal(base.experts.batched_fc1_w, gate.experts.batched_fc1_w)
        assert not torch.equal(base.gates[0].sim_matrix, gate.gates[0].sim_matrix)
        assert torch.equal(base.gates[0].sim_matrix, experts.gates[0].sim_matrix)
        assert not torch.equal(base.experts.batched_fc1_w, experts.experts.batched_fc1_w)

    def test_classes_of_ones_own_are_drawn_from_the_seeds(self) -> None:
        """Regression: they came from the global state, so equally seeded ranks drew equal ones."""

        def router(model_dim: int, num_global_experts: int) -> nn.Module:
            return nn.Linear(model_dim, num_global_experts)

        def build(seeds: Any) -> Any:
            experts = {"type": "custom", "module": partial(nn.Linear, D, D), "num_experts_per_device": 3}
            return moe.moe_layer({"type": "custom", "module": router}, D, experts, seeds=seeds)

        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = build((3, 4))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        second, gate, experts = build((3, 4)), build((5, 4)), build((3, 6))
        for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert not torch.equal(first.gates[0].module.weight, gate.gates[0].module.weight)
        assert torch.equal(first.experts.module[1].weight, gate.experts.module[1].weight)
        assert not torch.equal(first.experts.module[1].weight, experts.experts.module[1].weight)
        assert not torch.equal(first.experts.module[1].weight, first.experts.module[0].weight)

    def test_gates_of_a_list_differ(self) -> None:
        layer = layer_with(["top_any", "top_any"], seeds=(3, 4))
        assert not torch.equal(layer.gates[0].sim_matrix, layer.gates[1].sim_matrix)

    @pytest.mark.parametrize("seeds", [None, (1, 2), (1, 2, 3)])
    @pytest.mark.parametrize("kind", ["top_any", "gated_multi_gate", "top", "cosine_top"])
    def test_the_global_random_state_is_never_reseeded(self, kind: str, seeds: Any) -> None:
        """Regression: upstream calls torch.manual_seed in every layer, so all later draws repeat."""
        after = []
        for seed in (11, 12):
            torch.manual_seed(seed)
            layer_with(kind, seeds=seeds)
            after.append(torch.rand(8))
        assert not torch.equal(*after)

    def test_without_seeds_the_global_state_decides(self) -> None:
        torch.manual_seed(7)
        first = layer_with("top_any", seeds=None)
        torch.manual_seed(7)
        second = layer_with("top_any", seeds=None)
        third = layer_with("top_any", seeds=None)
        assert torch.equal(first.experts.batched_fc1_w, second.experts.batched_fc1_w)
        assert torch.equal(first.gates[0].sim_matrix, second.gates[0].sim_matrix)
        assert not torch.equal(second.experts.batched_fc1_w, third.experts.batched_fc1_w)
