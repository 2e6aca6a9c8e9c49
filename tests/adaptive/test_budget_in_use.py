"""A budget with what else a training does: several gates, accumulation, checkpointing, autocast, averages, copies."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import Decision, ExpertController, MoELayer, validation
from dynmoe_tutel.adaptive.budget import Budgets
from dynmoe_tutel.gates import top_any

D, E = 32, 16
EXPERTS = {"num_experts_per_device": 12, "hidden_size_per_expert": 8}


def gate_of(**budget: Any) -> dict[str, Any]:
    return {"type": "top_any", "max_expert_num": E, "budget": budget}


def layer_of(**budget: Any) -> MoELayer:
    return MoELayer(gate_of(**budget), D, EXPERTS, seeds=(1, 2))


def tokens(seed: int, T: int = 256, centre: float = 0.0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed)) + centre


def shift(layer: Any, gate: int = 0) -> float:
    return float(layer.gates[gate].budget_shift)


def mean_k(layer: Any, x: Tensor, gate: int = 0) -> float:
    return float(layer.route(x, gate).k_per_token.float().mean())


class TestSeveralGates:
    def test_each_has_a_budget_of_its_own(self) -> None:
        targets = (2.0, 3.5, None)
        gates = [gate_of(target_k=k) if k else {"type": "top_any", "max_expert_num": E} for k in targets]
        layer = MoELayer(gates, D, EXPERTS, seeds=(1, 2))
        budgets = Budgets(layer)
        for step in range(30):
            for gate in range(3):
                layer(tokens(3 * step + gate), gate)
            budgets.step()
        assert [round(mean_k(layer, tokens(1000), gate), 1) for gate in (0, 1)] == pytest.approx([2.0, 3.5], abs=0.15)
        assert layer.gates[2].budget_shift is None

    def test_a_gate_that_saw_no_token_since_keeps_its_shift(self) -> None:
        layer = MoELayer([gate_of(target_k=2.0), gate_of(target_k=2.0)], D, EXPERTS, seeds=(1, 2))
        budgets = Budgets(layer)
        layer(tokens(0), 1)
        budgets.step()
        assert shift(layer, 0) == 0
        kept = shift(layer, 1)
        assert kept > 0
        for step in range(3):
            layer(tokens(step), 0)
            budgets.step()
            assert shift(layer, 1) == kept
        assert shift(layer, 0) > kept

    def test_of_one_model_those_that_saw_tokens_decide(self) -> None:
        """The layer that ran once at the start has no say later: the others' mean is on target."""
        first, second = (layer_of(target_k=2.0, scope="model") for _ in range(2))
        with torch.no_grad():
            first.gates[0].gates.fill_(-0.3)
        budgets = Budgets(nn.ModuleList([first, second]))
        first(tokens(0))
        for step in range(30):
            second(tokens(step))
            budgets.step()
        assert mean_k(second, tokens(1000)) == pytest.approx(2.0, abs=0.15)
        assert shift(first) == shift(second)


def test_accumulated_gradients_are_one_step() -> None:
    layer = layer_of(target_k=2.0)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    controller, means = ExpertController(layer, optimizer, schedule=10), []
    for step in range(40):
        for part in range(4):
            x = tokens(4 * step + part, 64)
            means.append(mean_k(layer, x))
            (layer(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    assert sum(means[-80:]) / 80 == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_the_sample_once(reentrant: bool) -> None:
    layer, plain = layer_of(target_k=2.0), layer_of(target_k=2.0)
    x = tokens(0).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    plain(x)
    kept = layer.gates[0]._sample.clone()
    y.square().mean().backward()
    for gate in (layer.gates[0], plain.gates[0]):
        assert torch.equal(gate._sample, kept)
    Budgets(layer).step()
    Budgets(plain).step()
    assert shift(layer) == shift(plain) != 0


@pytest.mark.parametrize("where", ["forward", "step", "both"])
def test_autocast_changes_no_bit_of_the_shift(where: str) -> None:
    layer, plain = layer_of(target_k=2.0), layer_of(target_k=2.0)
    of_forward, of_step = (torch.autocast("cpu", torch.bfloat16) if where in (w, "both") else nullcontext()
                           for w in ("forward", "step"))  # fmt: skip
    with of_forward:
        layer(tokens(0))
    with of_step:
        Budgets(layer).step()
    plain(tokens(0))
    Budgets(plain).step()
    assert shift(layer) == shift(plain) != 0


@pytest.mark.parametrize("length", [1e20, 1e-20])
def test_the_length_of_tokens_does_not_matter(length: float) -> None:
    layer, plain = layer_of(target_k=2.0), layer_of(target_k=2.0)
    for each, x in ((layer, tokens(0) * length), (plain, tokens(0))):
        each(x)
        Budgets(each).step()
    assert shift(layer) == pytest.approx(shift(plain), abs=1e-5)


def test_tokens_that_are_not_finite_do_not_move_the_shift() -> None:
    layer, plain = layer_of(target_k=2.0), layer_of(target_k=2.0)
    x = tokens(0)
    x[::2] = torch.nan
    mask = x.isfinite().all(dim=1)
    layer(x)
    plain(x.nan_to_num(0), token_mask=mask)
    for each in (layer, plain):
        Budgets(each).step()
    assert shift(layer) == shift(plain) != 0


class TestWhoMovesTheShift:
    @pytest.fixture(autouse=True)
    def afresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(validation, "_warned", set())
        monkeypatch.setattr(top_any, "PATIENCE", 5)

    @staticmethod
    def forwards(layer: MoELayer, number: int, step: Callable[[], Any] = lambda: None) -> None:
        for _ in range(number):
            layer(tokens(0, 8))
            step()

    def test_without_anybody_a_layer_warns_once(self, caplog: pytest.LogCaptureFixture) -> None:
        layers = [layer_of(target_k=2.0), layer_of(target_k=2.0)]
        self.forwards(layers[0], 4)
        assert not caplog.messages
        for layer in layers:
            self.forwards(layer, 20)
        assert len(caplog.messages) == 1
        assert "ExpertController" in caplog.text
        assert "dynmoe_tutel.adaptive.Budgets" in caplog.text

    @pytest.mark.parametrize("who", ["controller", "budgets", "cap alone", "eval", "no_grad"])
    def test_else_none_does(self, who: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING)
        layer = layer_of(max_k=2) if who == "cap alone" else layer_of(target_k=2.0)
        step: Callable[[], Any] = lambda: None  # noqa: E731
        if who == "controller":
            step = ExpertController(layer, torch.optim.SGD(layer.parameters(), lr=0.1), schedule=100).step
        if who == "budgets":
            step = Budgets(layer).step
        layer.train(who != "eval")
        with torch.no_grad() if who == "no_grad" else nullcontext():
            self.forwards(layer, 20, step)
        assert not [message for message in caplog.messages if "Budgets" in message]


class TestAverages:
    """The shift of an average follows the trained layer's: it belongs to the weights, and an average of parameters
    alone would keep that of the day when it was copied."""

    @pytest.mark.parametrize("kind", ["AveragedModel", "AveragedModel with buffers", "loop over parameters"])
    @pytest.mark.parametrize("named", [True, False])
    def test_of_weights(self, kind: str, named: bool) -> None:
        layer = layer_of(target_k=2.0)
        average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers="with" in kind)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        controller = ExpertController(layer, optimizer, schedule=1000, averages=[average] if named else None)
        for step in range(40):
            optimizer.zero_grad()
            layer(tokens(step)).square().mean().backward()
            optimizer.step()
            controller.step()
            if kind == "loop over parameters":
                with torch.no_grad():
                    for mean, value in zip(average.parameters(), layer.parameters(), strict=True):
                        mean.lerp_(value, 0.1)
            else:
                average.update_parameters(layer)
        assert mean_k(average.module.eval(), tokens(1000)) == pytest.approx(2.0, rel=0.1)
        assert shift(average.module) == pytest.approx(shift(layer), abs=0.02)

    def test_of_a_dict_with_the_shift(self) -> None:
        layer = layer_of(target_k=2.0)
        average = {name: value.detach().clone() for name, value in layer.state_dict().items()}
        controller = ExpertController(layer, None, schedule=1000, averages=[average])
        layer(tokens(0))
        controller.step()
        assert float(average["gates.0.budget_shift"]) == shift(layer) != 0

    def test_a_snapshot_keeps_its_own(self) -> None:
        layer = layer_of(target_k=2.0)
        snapshot = copy.deepcopy(layer)
        controller = ExpertController(layer, None, schedule=1000)
        layer(tokens(0))
        controller.step()
        assert shift(snapshot) == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_goes_on_alike(how: str) -> None:
    layer = layer_of(target_k=2.0, max_k=4)
    layer(tokens(0)).square().mean().backward()
    Budgets(layer).step()
    layer(tokens(1))
    if how == "deepcopy":
        copied = copy.deepcopy(layer)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(layer))
    else:
        torch.save(layer, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    for each in (layer, copied):
        Budgets(each).step()
        each(tokens(2))
        Budgets(each).step()
    assert shift(copied) == shift(layer) != 0
    copied.gates[0].budget_shift.fill_(1.0)
    assert shift(layer) != 1.0


def test_growth_and_pruning_keep_the_mean() -> None:
    layer = layer_of(target_k=2.0)
    budgets = Budgets(layer)
    generator = torch.Generator().manual_seed(0)

    def settle() -> float:
        for step in range(15):
            layer(tokens(step))
            budgets.step()
        return mean_k(layer, tokens(1000))

    assert settle() == pytest.approx(2.0, abs=0.15)
    before = shift(layer)
    layer.update_experts(Decision(prune=[(slot, "") for slot in range(4)]))
    assert mean_k(layer, tokens(1000)) < 1.6
    assert settle() == pytest.approx(2.0, abs=0.15)
    assert shift(layer) < before
    layer.update_experts(Decision(grow=[(torch.randn(D, generator=generator), "") for _ in range(6)]))
    assert settle() == pytest.approx(2.0, abs=0.15)
    assert layer.num_global_experts == 14


def test_reset_parameters_forgets_shift_and_sample() -> None:
    layer = layer_of(target_k=2.0)
    layer(tokens(0))
    Budgets(layer).step()
    layer(tokens(0))
    layer.reset_parameters()
    assert shift(layer) == 0
    Budgets(layer).step()
    assert shift(layer) == 0


def test_slots_in_another_order_are_the_same_layer() -> None:
    layer = layer_of(target_k=2.0, max_k=3)
    layer(tokens(0))
    Budgets(layer).step()
    k = mean_k(layer, tokens(1))
    layer(tokens(1))
    moved = layer_of(target_k=2.0, max_k=3)  # no copy: that would be an average of the weights, which follows
    moved.load_state_dict(layer.state_dict())
    moved(tokens(1))
    moved._permute(list(reversed(range(E))))
    assert mean_k(moved, tokens(1)) == k
    for each in (layer, moved):
        Budgets(each).step()
    assert shift(moved) == pytest.approx(shift(layer), abs=1e-6)


class TestWithoutValues:
    @pytest.mark.parametrize("filled", ["to_empty", "assign"])
    def test_a_layer_made_on_the_meta_device(self, filled: str) -> None:
        plain = layer_of(target_k=2.0, max_k=3)
        Budgets(plain).step()
        plain.gates[0].budget_shift.fill_(0.1)
        with torch.device("meta"):
            layer = layer_of(target_k=2.0, max_k=3)
        assert layer(torch.empty(7, D, device="meta")).shape == (7, D)
        if filled == "to_empty":
            layer.to_empty(device="cpu")
        layer.load_state_dict(plain.state_dict(), assign=filled == "assign")
        for each in (plain, layer):
            assert each(tokens(0)).isfinite().all()
            Budgets(each).step()
        assert shift(layer) == shift(plain) != 0.1

    def test_fake_tensors_leave_no_sample(self) -> None:
        layer = layer_of(target_k=2.0, max_k=3)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(tokens(0))).shape == (256, D)
        Budgets(layer).step()
        assert shift(layer) == 0


class _NothingFromTheHost(TorchDispatchMode):
    """Raises for what copies from the host to the device; the meta device itself raises for what waits for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(tensor, Tensor) or tensor.is_meta, f"{func} made a tensor on the host"
        return result


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_step_neither_waits_for_the_device_nor_copies_to_it(scope: str) -> None:
    """The meta device stands for a GPU: it has no values to wait for."""
    layers = nn.ModuleList([layer_of(target_k=2.0, max_k=3, scope=scope) for _ in range(2)]).to("meta")
    budgets = Budgets(layers)
    x, mask = torch.empty(300, D, device="meta"), torch.empty(300, dtype=torch.bool, device="meta")
    routings = [layers[0].route(x, token_mask=token_mask) for token_mask in (mask, None)]
    with _NothingFromTheHost():
        for layer in layers:
            for routing in routings:
                layer.gates[0].keep_sample(x, routing)
        budgets.step()


def test_a_capped_gate_neither_waits_for_the_device_nor_copies_to_it() -> None:
    layer = layer_of(target_k=2.0, max_k=3).to("meta")
    with _NothingFromTheHost():
        routing = layer.route(torch.empty(300, D, device="meta"))
        layer.route(torch.empty(300, D, device="meta"), max_k=2)
    assert routing.token_of_row.shape == (900,)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_the_length_of_fp64_tokens_does_not_count(scale: float) -> None:
    """Regression: the sample was fp32, where such tokens are zero or infinite."""
    shifts = []
    for factor in (1.0, scale):
        layer = layer_of(target_k=2.0).double()
        layer(tokens(0, 64).double() * factor)
        Budgets(layer).step()
        shifts.append(shift(layer))
    assert shifts[0] == pytest.approx(shifts[1], abs=1e-5)
    assert shifts[0] != 0


def test_an_expert_that_every_token_activates_counts() -> None:
    """An active routing vector that is not finite is passed by every token, at any shift."""
    layer = layer_of(target_k=2.0)
    with torch.no_grad():
        layer.gates[0].sim_matrix[0, 1] = float("nan")
    margin_TE = layer.gates[0].margins(tokens(0, 5))
    assert margin_TE[:, 1].tolist() == [torch.inf] * 5
    assert margin_TE[:, [0, 2]].isfinite().all()
