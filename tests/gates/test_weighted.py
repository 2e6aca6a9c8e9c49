"""What the gates that weight experts by their scores have in common: shapes, modes, state, and that nothing waits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import FFN, FP32, relative_rms
from router_case import KINDS, D, gate_type, make_layer, tokens
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from waiting import NoWaiting

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive import Budgets

MOVING = [kind for kind in KINDS if kind != "top_p"]
BOUNDED = {"null_experts": 3, "quantile_top_k": 2}


def state(layer: MoELayer) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in layer.gates[0].named_buffers()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def step(layer: MoELayer, x: torch.Tensor, **options: Any) -> None:
    y = layer(x, **options)
    (y.square().mean() + y.l_aux).backward()


@pytest.mark.parametrize("kind", KINDS)
class TestEach:
    @pytest.mark.parametrize("count", [0, 1])
    def test_few_tokens(self, kind: str, count: int) -> None:
        layer, x = make_layer(gate_type(kind)), tokens(count, dtype=torch.float32).requires_grad_()
        step(layer, x)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *layer.parameters()))
        Budgets(layer).step()
        assert all(value.isfinite().all() for value in state(layer).values())

    def test_65_experts(self, kind: str) -> None:
        layer, x = make_layer(gate_type(kind), E=65).double(), tokens(30)
        routing = layer.route(x)
        assert routing.bits.shape == (30, 2)
        w_TE = routing.weights * routing.assigned
        y_TED = torch.stack([_alone(layer, x, e) for e in range(65)], dim=1)
        assert relative_rms(layer(x), torch.einsum("te,ted->td", w_TE, y_TED)) < 1e-12

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_and_half_precision_route_in_fp32(self, kind: str, dtype: torch.dtype) -> None:
        layer, x = make_layer(gate_type(kind)), tokens(40, dtype=torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            under = layer.route(x)
        assert torch.equal(under.assigned, layer.route(x).assigned)
        half = copy.deepcopy(layer).to(dtype)
        assert half.route(x.to(dtype)).scores.dtype == torch.float32
        assert half(x.to(dtype)).dtype == dtype
        assert all(buffer.dtype == torch.float32 for buffer in half.gates[0].buffers())
        assert equal(state(half), state(layer))

    def test_padding_is_not_counted(self, kind: str) -> None:
        x, mask = tokens(300, dtype=torch.float32), torch.arange(300) % 3 > 0
        states = []
        for batch, token_mask in ((x[mask], None), (x, mask)):
            layer = make_layer(gate_type(kind))
            step(layer, batch, token_mask=token_mask)
            Budgets(layer).step()
            states.append(state(layer))
        assert equal(*states)

    def test_gradient_checkpointing_changes_nothing(self, kind: str) -> None:
        x, states, grads = tokens(64, dtype=torch.float32), [], []
        for inside in (False, True):
            layer = make_layer(gate_type(kind))
            y = checkpoint(layer, x, use_reentrant=False) if inside else layer(x)
            y.square().mean().backward()
            counts = layer.gates[0].step_counts()
            counted = {} if counts is None else {"counts": counts.clone()}
            Budgets(layer).step()
            states.append({**counted, **state(layer)})
            grads.append({name: p.grad for name, p in layer.named_parameters()})
        assert equal(*states)
        assert equal(*grads)

    def test_compiled_whole(self, kind: str) -> None:
        x = tokens(32, dtype=torch.float32)
        results = []
        for wrap in (lambda layer: layer, lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager")):
            layer = make_layer(gate_type(kind))
            called = wrap(layer)
            y = called(x)
            y.square().mean().backward()
            Budgets(layer).step()
            results.append({"y": y.detach(), **state(layer)})
        assert all(relative_rms(results[1][name], value) < FP32 for name, value in results[0].items())

    def test_state_dict_and_reset(self, kind: str) -> None:
        layer, other = make_layer(gate_type(kind)), make_layer(gate_type(kind), seeds=(3, 4))
        start = copy.deepcopy(layer.gates[0].state_dict())
        for seed in range(3):
            step(layer, tokens(64, seed, torch.float32))
            Budgets(layer).step()
        other.load_state_dict(layer.state_dict())
        x = tokens(64, 9, torch.float32)
        assert torch.equal(other.eval()(x), layer.eval()(x))
        layer.train()
        other.train()
        for each in (layer, other):
            step(each, x)
            Budgets(each).step()
        assert equal(state(layer), state(other))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.1)
            layer.reset_parameters()
            for name, parameter in layer.gates.named_parameters():
                if name.endswith("weight"):
                    parameter.mul_(3.0)  # as `make_layer` does
        assert equal(dict(layer.gates[0].state_dict()), dict(start))

    def test_nothing_waits_for_the_device(self, kind: str) -> None:
        """Gate, counts, losses, gradients and the step; a bounded capacity, as the exact one reads one number."""
        layer, x = make_layer(gate_type(kind), capacity="full"), tokens(64, dtype=torch.float32)
        layer._count_dropped = layer.dropped_assignments.add_  # on a GPU it reads a late copy
        budgets, mask = Budgets(layer), torch.arange(64) % 3 > 0
        with NoWaiting():
            for training in (True, False):
                y = layer.train(training)(x, token_mask=mask)
                torch.autograd.backward((y.square().mean() + y.l_aux,))
                budgets.step()

    def test_two_runs_are_bitwise_equal(self, kind: str) -> None:
        results = []
        for _ in range(2):
            layer = make_layer(gate_type(kind))
            for seed in range(2):
                step(layer, tokens(64, seed, torch.float32))
                Budgets(layer).step()
            results.append({**{n: p.grad for n, p in layer.named_parameters()}, **state(layer)})
        assert equal(*results)

    def test_max_k_of_a_call(self, kind: str) -> None:
        layer, x = make_layer(gate_type(kind)), tokens(40, dtype=torch.float32)
        if kind in BOUNDED:
            assert int(layer.route(x).k_per_token.max()) == BOUNDED[kind]
            assert layer.route(x).token_of_row.shape == (40 * BOUNDED[kind],)  # static: nothing is read
            return
        capped = make_layer(gate_type(kind, max_k=2))
        assert int(layer.route(x).k_per_token.max()) > 2
        assert torch.equal(layer(x, max_k=2), capped(x))
        assert torch.equal(capped(x, max_k=4), capped(x))
        assert capped.route(x).token_of_row.shape == (80,)


def _alone(layer: MoELayer, x: torch.Tensor, e: int) -> torch.Tensor:
    """Expert e on every token."""
    w1, b1, w2, b2 = (getattr(layer.experts, name).detach()[e] for name in FFN)
    return torch.nn.functional.gelu(x @ w1.t() + b1) @ w2 + b2


@pytest.mark.parametrize("kind", MOVING)
class TestMoving:
    def test_only_training_forwards_move_the_state(self, kind: str) -> None:
        layer, x = make_layer(gate_type(kind)), tokens(64, dtype=torch.float32)
        budgets, start = Budgets(layer), state(layer)
        layer.eval()(x)
        layer.train().route(x)
        with torch.no_grad():
            layer(x)
        budgets.step()
        assert equal(state(layer), start)
        layer(x)
        assert equal(state(layer), start)
        budgets.step()
        assert not equal(state(layer), start)
        once = state(layer)
        budgets.step()
        assert equal(state(layer), once)

    def test_counts_are_those_without_autocast(self, kind: str) -> None:
        x, states = tokens(64, dtype=torch.float32), []
        for enabled in (False, True):
            layer = make_layer(gate_type(kind))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                layer(x)
            states.append(layer.gates[0].step_counts().clone())
        assert torch.equal(*states)

    def test_forwards_before_a_step_count_together(self, kind: str) -> None:
        x, states = tokens(64, dtype=torch.float32), []
        for parts in (1, 4):
            layer = make_layer(gate_type(kind))
            for part in x.chunk(parts):
                layer(part)
            Budgets(layer).step()
            states.append(state(layer))
        assert equal(*states)


@pytest.mark.parametrize("kind", ["expert_threshold", "null_experts", "quantile_top_k"])
def test_tokens_that_are_not_finite_do_not_move_what_is_held(kind: str) -> None:
    """Regression: each of their scores counted as the smallest."""
    x, states = tokens(300, dtype=torch.float32), []
    x[::3] = torch.nan
    for batch in (x, x[x.isfinite().all(dim=1)], x[::3]):
        layer = make_layer(gate_type(kind))
        start = state(layer)
        layer(batch)
        Budgets(layer).step()
        states.append(state(layer))
    assert equal(*states[:2])
    assert equal(states[2], start)
    assert not equal(states[0], start)


@pytest.mark.parametrize("how", ["AveragedModel", "AveragedModel with buffers", "loop over parameters", "snapshot"])
def test_averages_of_the_weights_follow_what_is_held(how: str) -> None:
    """Where no layer has a controller; a copy into which nobody writes stays as it is."""
    layer = make_layer(gate_type("expert_threshold"))
    average: Any = copy.deepcopy(layer)
    if "Averaged" in how:
        average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers="with" in how)
    copied = getattr(average, "module", average)
    start, budgets = state(copied), Budgets(layer)
    for seed in range(4):
        step(layer, tokens(64, seed, dtype=torch.float32))
        with torch.no_grad():
            layer.gates[0].wg.weight.mul_(1.1)
        budgets.step()
        if "Averaged" in how:
            average.update_parameters(layer)
        elif how != "snapshot":
            with torch.no_grad():
                for mean, value in zip(average.parameters(), layer.parameters(), strict=True):
                    mean.lerp_(value, 0.1)
    assert equal(state(copied), start if how == "snapshot" else state(layer))
    assert not equal(state(layer), start)


@pytest.mark.parametrize("kind", ["relu", "top_p with a target"])
def test_a_model_shares_one_state(kind: str) -> None:
    """Scope "model": the sum of the layers' counts moves all; "layer": each by its own. Targets must agree."""
    x = tokens(64, dtype=torch.float32)
    for scope in ("model", "layer"):
        layers = [make_layer(gate_type(kind, scope=scope), scale=scale) for scale in (0.3, 9.0)]
        with torch.no_grad():
            layers[0].gates[0].wg.weight.abs_()
        budgets = Budgets(torch.nn.Sequential(*layers))
        for _ in range(2):
            layers[0](-x.abs() if kind == "relu" else x)
            layers[1](x)
            budgets.step()
        assert equal(state(layers[0]), state(layers[1])) == (scope == "model")
    unlike = [make_layer(gate_type(kind, target_k=target)) for target in (1.0, 2.0)]
    with pytest.raises(ValueError, match=r"scope 'model': layers have target_k \[1.0, 2.0\]: give one"):
        Budgets(torch.nn.Sequential(*unlike)).step()


def test_what_is_ignored_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynmoe_tutel.validation._warned", set())
    layer = make_layer({"type": "relu", "gate_noise": 1.0})
    layer(tokens(dtype=torch.float32), top_k=2)
    assert "gate_noise'] = 1.0 is ignored by a ReLUGate" in caplog.text
    assert "top_k is ignored by a ReLUGate" in caplog.text


def test_a_list_of_gates_moves_each_of_them() -> None:
    layer = make_layer([gate_type("relu"), gate_type("quantile_top_k"), {"type": "top"}])  # type: ignore[arg-type]
    x, start = tokens(64, dtype=torch.float32), [copy.deepcopy(gate.state_dict()) for gate in layer.gates]
    for index in range(3):
        layer(x, gate_index=index)
    Budgets(layer).step()
    moved = [not equal(dict(gate.state_dict()), dict(old)) for gate, old in zip(layer.gates, start, strict=True)]
    assert moved == [True, True, False]
    assert x.shape[1] == D


@pytest.mark.parametrize("kind", MOVING)
def test_all_steps_count_in_one_tensor(kind: str) -> None:
    """A captured graph of forwards adds to the tensor that it was captured with."""
    layer, x = make_layer(gate_type(kind)), tokens(40, dtype=torch.float32)
    gate, budgets = layer.gates[0], Budgets(layer)
    layer(x)
    counts = gate._counts
    budgets.step()
    assert not counts.any()
    layer(x)
    assert gate._counts is counts
    assert counts.any()
