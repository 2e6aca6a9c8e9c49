"""One regression test for each defect of the public DynMoE code that could occur here, by the id of our survey of it.

Elsewhere: D7, S4 (ranks decide as one) in test_controller.py; D9 (optimizer rows) and S5 (fp32 master copies) in
test_optimizer_state.py; D13 and several experts of one update (D8) also in test_policy.py. Cannot occur: D6 (dead
code), D15, D17, D26 (nothing is sharded yet), D21 (no kernel launches of our own on CPU), S1, S2, S9, S10, S12 to S14
(DeepSpeed's engine, its users).
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import FFN, FP32, TERMS, Case, gradients, make_case, oracle_gate, relative_rms, rms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import Decision, losses, moe

D, H = 8, 6
UPSTREAM = ("top_any", "gated_multi_gate", "gated_multi_gate_t")


def build(gate_type: Any = "top_any", count: int = 3, **options: Any) -> Any:
    """A layer whose active slot e answers to axis e, from a cosine of 0.5 on."""
    experts = {"type": "ffn", "num_experts_per_device": count, "hidden_size_per_expert": H, "activation_fn": F.gelu}
    layer = moe.moe_layer(gate_type, D, experts, seeds=(1, 2), **options)
    with torch.no_grad():
        for gate in layer.gates:
            if gate.adaptive:
                gate.sim_matrix.copy_(torch.eye(D)[:, : gate.slots])
                gate.gates.fill_(0.5)
    return layer


def six_slots(count: int = 3, **options: Any) -> Any:
    return build({"type": "top_any", "max_expert_num": 6}, count, **options)


def axes(*which: int, length: float = 2.0) -> Tensor:
    return length * torch.eye(D)[list(which)]


def active(layer: Any) -> list[int]:
    return layer.gates[0].experts_mask.nonzero().flatten().tolist()


def update(layer: Any, *batches: Tensor) -> list[tuple[int, str]]:
    layer.train().begin_record_routing()
    for x_TD in batches:
        layer(x_TD)
    return [(change.slot, change.action) for change in layer.adaptive_update_experts()]


class TestTraining:
    @pytest.mark.parametrize("T", [1, 4])
    def test_d2_all_tokens_unrouted_in_a_training_batch(self, T: int) -> None:
        """All cosines are 0, all thresholds at 0.5: k_t = 0. Upstream split the picks in 0 chunks and died; here y = 0
        (the residual carries the token), every gradient of y exists and is 0, and every loss is finite."""
        layer = build(aux_losses=dict.fromkeys(TERMS, 1.0))
        x = axes(7).repeat(T, 1).requires_grad_()
        y = layer.train()(x)
        assert torch.equal(y, torch.zeros(T, D))
        y.sum().backward()
        assert all(not gradient.any() for gradient in gradients(layer, x).values())
        found = oracle.losses(x.detach().double(), oracle_gate(layer.gates[0]))
        assert relative_rms(layer.l_aux, sum(value for value, _, _ in found.values())) < FP32
        layer(x).l_aux.backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())

    def test_d22_changing_the_input_before_the_backward_is_noticed(self) -> None:
        """Upstream kept tensors on ctx, past autograd's version check: a wrong gradient. Here it is an error."""
        layer, x = build(), axes(0, 1).requires_grad_()
        h = x * 1.0
        y = layer(h)
        with torch.no_grad():
            h.mul_(3.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_d9_a_pruned_slot_gets_no_gradient(self) -> None:
        """Upstream's norm term also pulled at inactive columns, and Adam then moved them."""
        layer = six_slots(4, aux_losses=dict.fromkeys(TERMS, 1.0))
        assert update(layer, axes(0, 1, 3)) == [(2, "pruned")]
        y = layer(axes(0, 1, 2, 3))
        (y.square().sum() + y.l_aux).backward()
        for parameter, index in layer.slot_parameters(2):
            assert not parameter.grad[index].any()
        assert all(parameter.grad[index].any() for parameter, index in layer.slot_parameters(3))

    def test_d20_layers_of_several_types_in_one_process(self) -> None:
        """Upstream compiled its kernels for the first dtype that it met."""
        for dtype in (torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float32):
            case = make_case(dtype=dtype)
            tolerance = 4e-3 if dtype.itemsize == 2 else FP32
            assert relative_rms(case.layer(case.x), case.expected_output(True)) < tolerance

    @pytest.mark.parametrize("temperature", [None, 1.3])
    def test_s3_gradient_checkpointing_is_not_recorded_twice(self, temperature: float | None) -> None:
        """The recompute runs inside the backward, when an update may have changed mask and W. Same record and same
        gradients as without it, by both kinds of checkpointing."""
        results = []
        for kind in ("plain", "reentrant", "non-reentrant"):
            case = make_case(temperature=temperature)
            case.layer.train().begin_record_routing()
            x = case.x.clone().requires_grad_()
            y = case.layer(x) if kind == "plain" else checkpoint(case.layer, x, use_reentrant=kind == "reentrant")
            y.backward(case.dy)
            results.append({**case.layer.record.state_dict(), **gradients(case.layer, x)})
        assert int(results[0]["tokens"]) == 24
        for result in results[1:]:
            for name, value in results[0].items():
                assert torch.equal(torch.as_tensor(result[name]), torch.as_tensor(value)), name

    def test_s3_the_auxiliary_loss_survives_gradient_checkpointing(self) -> None:
        """A recompute must not replace the forward's loss with the loss of its own graph."""
        results = []
        for wrap in (False, True):
            case = make_case(aux_losses=dict.fromkeys(TERMS, 1.0))
            x = case.x.clone().requires_grad_()
            y = checkpoint(case.layer, x, use_reentrant=False) if wrap else case.layer(x)
            ((y * case.dy).sum() + case.layer.l_aux).backward()
            results.append({"l_aux": case.layer.l_aux, **gradients(case.layer, x)})
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name


class TestBatchMates:
    def lone(self, case: Case, t: int, training: bool) -> tuple[Tensor, Tensor]:
        x = case.x[t : t + 1].clone().requires_grad_()
        y = case.layer.train(training)(x)
        y.backward(case.dy[t : t + 1])
        return y.detach()[0], x.grad[0]

    @pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
    @pytest.mark.parametrize("training", [True, False])
    def test_d4_output_and_gradient_do_not_depend_on_the_batch(self, training: bool, combine_gradient: str) -> None:
        """With K = 1 in the batch upstream did not normalise: the fallback's weight was sigmoid(c), e.g. sigmoid(0.24)
        = 0.56 instead of 1, and the gradient's formula changed. A token alone (K <= 1) and among all is the same."""
        case = make_case(combine_gradient=combine_gradient)
        x = case.x.clone().requires_grad_()
        y = case.layer.train(training)(x)
        y.backward(case.dy)
        assert {0, 1, 2} <= set(case.k())
        for t in range(len(x)):
            y_D, dx_D = self.lone(case, t, training)
            assert relative_rms(y[t], y_D) < FP32
            assert relative_rms(x.grad[t], dx_D, scale=rms(x.grad)) < FP32

    def test_d4_the_first_pick_of_gshards_loss_is_a_tokens_own(self) -> None:
        """Upstream's first pick is torch.topk's among equal ones. Among 16 slots, about half of the tokens with two
        experts change it with the largest k of the batch; it is another than the best expert's for most tokens, and
        l_aux differs by 1 to 20 %. Here it is the expert of highest score."""
        layer = build({"type": "gated_multi_gate", "max_expert_num": 8}, 6, is_gshard_loss=True)
        gate, generator = layer.gates[0], torch.Generator().manual_seed(0)
        with torch.no_grad():
            gate.gates.zero_()
        x = torch.randn(2000, D, generator=generator) + 0.3 * torch.randn(D, generator=generator)
        routing = layer.route(x)
        assigned_TE, k = routing.assigned.float(), int(routing.k_per_token.max())
        best_T = routing.scores.masked_fill(~routing.assigned, -1).argmax(dim=1)
        upstreams_T = assigned_TE.topk(k, dim=1).indices[:, 0]

        def l_aux(first_T: Tensor) -> float:
            first_TE = F.one_hot(first_T, 8) * assigned_TE
            return float(layer.num_global_experts * (assigned_TE.sum(0) * first_TE.sum(0)).sum() / len(x) ** 2)

        assert float(layer(x).l_aux.detach()) == pytest.approx(l_aux(best_T), rel=1e-5)
        assert 0.01 < abs(l_aux(upstreams_T) / l_aux(best_T) - 1) < 0.2
        assert 0.4 < (best_T != upstreams_T)[routing.k_per_token > 0].float().mean() < 0.8
        two_TE = torch.zeros(2000, 16).scatter(1, torch.rand(2000, 16, generator=generator).argsort(dim=1)[:, :2], 1)
        picks = torch.stack([two_TE.topk(k, dim=1).indices[:, 0] for k in range(2, 17)])
        assert 0.3 < (picks != picks[0]).any(dim=0).float().mean() < 0.6

    def test_d4_the_gradient_where_no_token_has_two_experts(self) -> None:
        """Upstream then leaves out the mean: <dy, expert(x)>, which is "mean" here. The centred formula, which its gate
        names have here in every batch, is 0 for a token of one expert, in upstream's other batches too."""
        found = {}
        for how in ("normalized", "mean"):
            layer = build({"type": "gated_multi_gate", "max_expert_num": 3}, combine_gradient=how)
            x, dy = axes(0, 1, 2, 0), torch.randn(4, D, generator=torch.Generator().manual_seed(0))
            y = layer(x)
            y.backward(dy)
            assert layer.route(x).k_per_token.tolist() == [1, 1, 1, 1]
            s_E = torch.sigmoid(layer.gates[0].gates.detach())
            own_T = (dy * y.detach()).sum(dim=1)
            expected_E = -torch.stack([own_T[0] + own_T[3], own_T[1], own_T[2]]) * s_E * (1 - s_E)
            found[how] = (layer.gates[0].gates.grad, expected_E)
        assert not found["normalized"][0].any()
        assert relative_rms(*found["mean"]) < FP32

    def test_d4_the_fallback_has_weight_one(self) -> None:
        case = make_case(G=1.5)
        y = case.layer.eval()(case.x)
        best_T = oracle.cosines(case.x.double(), case.gate).argmax(dim=1).tolist()
        expected = [case.experts(e, x_D) for e, x_D in zip(best_T, case.x.double(), strict=True)]
        assert relative_rms(y, torch.stack(expected)) < FP32


class TestUpdates:
    def test_d3_an_empty_window_changes_nothing(self) -> None:
        """R_E = 0 everywhere because nothing was seen; upstream: "From 4 experts -> 0" and a crash in the next forward.
        A batch of no token is no data either."""
        layer = six_slots(4)
        before = copy.deepcopy(layer.state_dict())
        assert update(layer) == []
        assert update(layer, torch.empty(0, D)) == []
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    def test_d3_all_experts_silent_keeps_one(self) -> None:
        """Tokens only on axis 7. The lowest slot stays, and one grows along axis 7 into the lowest free slot."""
        layer = six_slots(4)
        assert update(layer, axes(7, 7)) == [(1, "pruned"), (2, "pruned"), (3, "pruned"), (1, "grown")]
        assert active(layer) == [0, 1]
        assert layer.num_global_experts == 2
        assert torch.equal(layer.route(axes(7)).counts, torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.int32))

    def test_d3_the_last_expert_is_never_pruned(self) -> None:
        layer = build(count=1)
        for _ in range(3):
            update(layer, axes(5))
            assert active(layer) == [0]
        assert layer.eval()(axes(5)).any()
        layer = six_slots(3)
        layer.update_experts(Decision(prune=[(slot, "all of them") for slot in range(6)]))
        assert layer.num_global_experts == len(active(layer)) == 1

    def test_d8_a_grown_expert_copies_its_nearest(self) -> None:
        """Upstream kept the slot's old weights. Unrouted tokens are near axis 1 (cosine 0.45): slot 1 is the parent."""
        layer = six_slots()
        x = axes(1) * 0.45 + axes(6) * 0.89
        assert update(layer, axes(0, 1, 2), x) == [(3, "grown")]
        assert torch.allclose(layer.gates[0].sim_matrix[:, 3], F.normalize(x[0], dim=0))
        assert float(layer.gates[0].gates[3].detach()) == 0.0
        for name in FFN:
            stack = getattr(layer.experts, name)
            assert torch.equal(stack[3], stack[1])

    def test_d11_the_count_of_experts_stays_a_buffer(self) -> None:
        """Upstream replaced its data by a tensor on the CPU: `.to()` and the broadcast of buffers lost it."""
        layer = six_slots()
        buffer = layer._num_global_experts
        update(layer, axes(0, 1, 2, 5))
        assert layer._num_global_experts is buffer
        assert dict(layer.named_buffers())["_num_global_experts"] is buffer
        assert buffer.dtype == torch.int64
        assert int(buffer) == layer.num_global_experts == 4

    @pytest.mark.parametrize("opposite", [-1.0, -1.0000001])
    def test_d13_unrouted_tokens_that_cancel_grow_nothing(self, opposite: float) -> None:
        """R_S = x - x = 0 (or rounding): 0 / 0 became a NaN column and a NaN loss."""
        layer = six_slots()
        x = torch.cat([axes(6), opposite * axes(6)])
        assert update(layer, axes(0, 1, 2), x) == []
        assert torch.equal(layer.gates[0].sim_matrix, torch.eye(D)[:, :6])
        assert layer(x).l_aux.isfinite()

    def test_d13_tokens_that_are_not_finite_grow_nothing(self) -> None:
        layer = six_slots()
        assert update(layer, axes(0, 1, 2), axes(6) * torch.inf) == []
        assert layer.gates[0].sim_matrix.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_s6_an_update_keeps_the_dtypes(self, dtype: torch.dtype) -> None:
        """bf16 * fp32 promoted upstream's mask to fp32."""
        layer = six_slots().to(dtype)
        before = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
        assert update(layer, axes(0, 2, 5).to(dtype)) == [(1, "pruned"), (1, "grown")]
        assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == before
        assert layer(axes(0, 5).to(dtype)).isfinite().all()


class TestRecords:
    def test_p7_records_do_not_keep_the_graph(self) -> None:
        """58 to 93 autograd nodes in 5 recorded steps upstream. An activation of an earlier step is freed."""
        layer = build()
        layer.train().begin_record_routing()
        alive = []
        for _ in range(3):
            h = axes(0, 1, 6).requires_grad_() * 1.0
            alive.append(weakref.ref(h))
            layer(h).sum().backward()
        del h
        gc.collect()
        assert [reference() is None for reference in alive] == [True, True, True]
        for value in layer.record.state_dict().values():
            assert not (isinstance(value, Tensor) and value.requires_grad)

    def test_d12_eval_forwards_are_not_recorded(self) -> None:
        """Upstream recorded in eval: the held-out set decided which experts to prune."""
        layer = build()
        layer.begin_record_routing()
        layer.eval()(axes(0, 1, 6))
        with torch.no_grad():
            layer(axes(2))
        assert int(layer.record.tokens) == 0
        assert not layer.get_routing_records().any()
        assert layer.get_sample_records() is None
        layer.train()(axes(0, 0, 6))
        layer.eval()(axes(1, 6))
        assert layer.get_routing_records().tolist() == [2, 0, 0]
        assert torch.equal(layer.get_sample_records(), axes(6)[0])

    def test_d12_eval_is_recorded_where_the_caller_asks(self) -> None:
        layer = build()
        layer.begin_record_routing(record_eval=True)
        layer.eval()(axes(0, 1, 6))
        assert int(layer.record.tokens) == 3
        layer.begin_record_routing()
        layer(axes(0))
        assert int(layer.record.tokens) == 0

    def test_d12_nothing_is_recorded_outside_a_window(self) -> None:
        layer = build()
        layer.train()(axes(0))
        layer.begin_record_routing()
        layer(axes(1, 1))
        layer.end_record_routing()
        layer(axes(2))
        assert layer.get_routing_records().tolist() == [0, 2, 0]

    def test_d25_custom_experts_record_and_grow(self) -> None:
        """Upstream took the records' dtype from batched_fc1_w, which custom experts do not have."""
        modules = [nn.Linear(D, D) for _ in range(6)]
        layer = moe.moe_layer(
            {"type": "top_any", "max_expert_num": 6},
            D,
            {"type": "custom", "module": modules, "num_experts_per_device": 2},
        )
        with torch.no_grad():
            layer.gates[0].sim_matrix.copy_(torch.eye(D)[:, :6])
            layer.gates[0].gates.fill_(0.5)
        assert update(layer, axes(0, 1, 6)) == [(2, "grown")]
        assert torch.equal(modules[2].weight, modules[0].weight)

    def test_s8_records_exist_before_the_first_window_and_begin_empties_them(self) -> None:
        layer = build()
        assert layer.get_routing_records().tolist() == [0, 0, 0]
        assert layer.get_sample_records() is None
        layer.train().begin_record_routing()
        layer(axes(0, 1, 6))
        layer.begin_record_routing()
        assert (int(layer.record.tokens), int(layer.record.unrouted_tokens)) == (0, 0)
        assert not layer.record.counts.any()


class TestConstruction:
    @pytest.mark.parametrize("kind", UPSTREAM)
    def test_d5_the_global_seed_is_not_touched(self, kind: str) -> None:
        """Upstream called torch.manual_seed(1) in every gate: three seeds of an experiment shared one random stream,
        and all layers had the same experts."""
        streams, weights = [], []
        for seed in (123, 456):
            torch.manual_seed(seed)
            experts = {"num_experts_per_device": 2, "hidden_size_per_expert": H}
            layers = [moe.moe_layer({"type": kind, "max_expert_num": 4}, D, experts) for _ in range(2)]
            assert torch.initial_seed() == seed
            assert not torch.equal(layers[0].experts.batched_fc1_w, layers[1].experts.batched_fc1_w)
            streams.append(torch.rand(4))
            weights.append(layers[0].experts.batched_fc1_w)
        assert not torch.equal(*streams)
        assert not torch.equal(*weights)

    def test_d5_growing_and_recording_draw_nothing(self) -> None:
        layer = six_slots(4)
        before = torch.get_rng_state()
        assert update(layer, axes(0, 1, 2, 6)) == [(3, "pruned"), (3, "grown")]
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("kind", UPSTREAM[1:])
    def test_d5_upstream_s_directions_come_from_a_private_generator(self, kind: str) -> None:
        layer = moe.moe_layer({"type": kind, "max_expert_num": 6}, D, {"hidden_size_per_expert": H})
        expected_ED = nn.init.orthogonal_(torch.empty(6, D), generator=torch.Generator().manual_seed(1))
        assert torch.equal(layer.gates[0].sim_matrix, expected_ED.T)

    @pytest.mark.parametrize("kind", [*UPSTREAM, "top", "cosine_top"])
    def test_the_caller_s_dicts_serve_two_layers(self, kind: str) -> None:
        """Upstream popped `type` and `count_per_node`: KeyError at the second layer."""
        gate_type = {"type": kind, "fp32_gate": True}
        experts = {"type": "ffn", "count_per_node": 2, "hidden_size_per_expert": H, "activation_fn": F.relu}
        before = copy.deepcopy((gate_type, experts))
        first, second = (moe.moe_layer(gate_type=gate_type, experts=experts, model_dim=D) for _ in range(2))
        assert (gate_type, experts) == before
        assert first(axes(0)).shape == second(axes(0)).shape

    def test_d14_max_expert_num_of_a_list_of_gates(self) -> None:
        """Upstream sized the experts by count_per_node and failed in the forward."""
        layer = build([{"type": "top_any", "max_expert_num": 6}, {"type": "gated_multi_gate", "max_expert_num": 4}], 2)
        assert layer.max_num_global_experts == 6
        assert layer.experts.batched_fc1_w.shape == (6, H, D)
        for gate_index in (0, 1):
            assert layer(axes(0, 1), gate_index=gate_index).shape == (2, D)
            assert layer.gates[gate_index].experts_mask.sum() == 2
        layer.train().begin_record_routing()
        layer(axes(0, 1, 6), gate_index=1)
        assert [change.action for change in layer.adaptive_update_experts(gate_index=1)] == ["grown"]
        y = layer(axes(6), gate_index=1)
        assert y.any()
        assert not layer(axes(6), gate_index=0).any()

    def test_d16_a_one_score_gate_is_frozen(self) -> None:
        layer = moe.moe_layer("top", D, {"num_experts_per_device": 2, "hidden_size_per_expert": H}, one_score_gate=True)
        assert not layer.gates[0].wg.weight.requires_grad

    def test_d19_experts_move_alone(self) -> None:
        layer = build()
        assert layer.experts.to(torch.float64) is layer.experts
        assert layer.experts.batched_fc1_w.dtype == torch.float64

    @pytest.mark.parametrize("kind", ["top", "top_any"])
    def test_d23_gshard_loss_needs_no_third_argument(self, kind: str) -> None:
        """Upstream's function gained a required argument, but its callers still used it as a default."""
        score_TE, first_TE = torch.full((4, 2), 0.5), F.one_hot(torch.tensor([0, 0, 0, 1]), 2)
        assert float(losses.gshard_loss(score_TE, first_TE)) == 2 / 16 * (2 * 3 + 2 * 1)
        layer = build(kind, is_gshard_loss=True)
        assert layer(axes(0)).l_aux.isfinite()

    def test_s7_max_expert_num_is_no_bound_of_fixed_k_gates(self) -> None:
        """Upstream's default of 4 applied to k = 1 with 8 experts: it built 4 and died in the forward."""
        layer = build("top", 8)
        assert layer.max_num_global_experts == layer.num_global_experts == 8
        layer(axes(0, 1))

    def test_p2_nothing_is_printed(self, capfd: pytest.CaptureFixture[str]) -> None:
        layer = six_slots(4)
        update(layer, axes(0, 1, 2, 6))
        layer.eval()(axes(0))
        assert capfd.readouterr() == ("", "")


class TestMask:
    def test_d10_the_mask_is_a_buffer(self) -> None:
        """A Parameter upstream: the experiments' freeze loops made it trainable and the optimizer moved it."""
        layer = six_slots(2)
        for parameter in layer.parameters():
            parameter.requires_grad = True
        for name, parameter in layer.named_parameters():
            parameter.requires_grad = "gate" in name or "expert" in name
        assert "gates.0.experts_mask" not in dict(layer.named_parameters())
        assert "gates.0.experts_mask" in layer.state_dict()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            y = layer.train()(axes(0, 1))
            (y.square().sum() + y.l_aux).backward()
            optimizer.step()
        assert layer.gates[0].experts_mask.tolist() == [1, 1, 0, 0, 0, 0]
        with torch.no_grad():
            layer.gates[0].sim_matrix.copy_(torch.eye(D)[:, :6])
            layer.gates[0].gates.fill_(0.5)
        assert update(layer, axes(0, 1, 6)) == [(2, "grown")]

    def test_d10_the_line_that_upstream_s_scripts_run(self) -> None:
        """`gate.experts_mask.requires_grad = False` (peft script), after freezing by name."""
        layer = six_slots(2)
        for gate in layer.gates:
            gate.experts_mask.requires_grad = False
        assert update(layer, axes(0, 1, 6)) == [(2, "grown")]


class TestCheckpoints:
    def saved(self, count: int, slots: int) -> tuple[Any, dict[str, Tensor]]:
        layer = build({"type": "top_any", "max_expert_num": slots}, count)
        with torch.no_grad():
            for parameter in layer.experts.parameters():
                parameter.mul_(1.5)
        return layer, layer.state_dict()

    def test_d18_another_number_of_active_experts_loads(self) -> None:
        saved, state = self.saved(5, 6)
        layer = six_slots(2)
        layer.load_state_dict(state)
        assert layer.num_global_experts == 5
        assert torch.equal(layer.eval()(axes(0, 4, 6)), saved.eval()(axes(0, 4, 6)))

    def test_d18_fewer_slots_there_than_here(self) -> None:
        """4 slots, 3 active, into 6: the first four are the checkpoint's, the rest stays and is inactive."""
        saved, state = self.saved(3, 4)
        shapes = {name: tensor.shape for name, tensor in state.items()}
        layer = six_slots(6)
        own = copy.deepcopy(layer.state_dict())
        layer.load_state_dict(state)
        assert {name: tensor.shape for name, tensor in state.items()} == shapes, "the caller's dict was changed"
        assert active(layer) == [0, 1, 2]
        assert (layer.num_global_experts, layer.max_num_global_experts) == (3, 6)
        for name in FFN:
            stack = getattr(layer.experts, name)
            assert torch.equal(stack[:4], getattr(saved.experts, name))
            assert torch.equal(stack[4:], own[f"experts.{name}"][4:])
        assert relative_rms(layer.eval()(axes(0, 2, 6)), saved.eval()(axes(0, 2, 6))) < FP32
        assert update(layer, axes(0, 1, 2, 6, 3)) == [(3, "grown")]

    def test_d18_more_slots_there_than_here(self) -> None:
        """6 slots, 3 active, into 4: only inactive ones are left out."""
        saved, state = self.saved(3, 6)
        layer = build({"type": "top_any", "max_expert_num": 4}, 2)
        layer.load_state_dict(state)
        assert active(layer) == [0, 1, 2]
        assert (layer.num_global_experts, layer.max_num_global_experts) == (3, 4)
        assert relative_rms(layer.eval()(axes(0, 2, 6)), saved.eval()(axes(0, 2, 6))) < FP32

    def test_d18_active_experts_are_never_lost(self) -> None:
        _, state = self.saved(5, 6)
        layer = build({"type": "top_any", "max_expert_num": 4}, 2)
        before = copy.deepcopy(layer.state_dict())
        message = r"6 slots .* this layer 4: active experts in slots \[4\] would be lost.*max_expert_num >= 5"
        with pytest.raises(ValueError, match=message):
            layer.load_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    def test_d18_upstream_s_counts_may_be_missing(self, caplog: pytest.LogCaptureFixture) -> None:
        """As after copying a pretrained dense model into every expert, with biases [E, 1, H]."""
        saved, state = self.saved(3, 6)
        state = {name: value for name, value in state.items() if "num_global_experts" not in name}
        state["experts.batched_fc1_bias"] = state["experts.batched_fc1_bias"].unsqueeze(1)
        state["experts.batched_fc2_bias"] = state["experts.batched_fc2_bias"].unsqueeze(1)
        layer = six_slots(3)
        with caplog.at_level(logging.WARNING, logger="dynmoe_tutel"):
            layer.load_state_dict(state)
        assert "_num_global_experts is missing" in caplog.text
        assert torch.equal(layer.eval()(axes(0, 6)), saved.eval()(axes(0, 6)))

    def test_d18_a_missing_count_is_that_of_the_mask(self) -> None:
        """The mask tells which slots are active; a count kept from the layer would contradict it."""
        _, state = self.saved(5, 6)
        del state["_num_global_experts"]
        layer = six_slots(2)
        layer.load_state_dict(state)
        assert layer.num_global_experts == len(active(layer)) == 5

    def test_d24_state_dict_takes_prefix_and_keep_vars_by_name(self) -> None:
        layer = nn.Sequential(build())
        assert "block.0.gates.0.sim_matrix" in layer.state_dict(prefix="block.")
        assert layer.state_dict(keep_vars=True)["0.gates.0.gates"] is layer[0].gates[0].gates

    def test_shapes_do_not_depend_on_the_active_count(self) -> None:
        """D17: upstream's gather used the active count as a size."""
        layer = six_slots(4)
        before = {name: tensor.shape for name, tensor in layer.state_dict().items()}
        update(layer, axes(0, 1, 2))
        assert layer.num_global_experts == 3
        assert {name: tensor.shape for name, tensor in layer.state_dict().items()} == before
        assert before["experts.batched_fc1_w"] == (6, H, D)
