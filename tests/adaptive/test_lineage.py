"""Averages of the weights follow growth and pruning, whoever averages; other copies of a layer keep their bits."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from controller_case import SLOTS, D, Net, active_slots, make_layer, near, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn, update_bn
from torchvision_stand_in import import_timm

from dynmoe_tutel.adaptive.controller import ExpertController
from dynmoe_tutel.adaptive.policy import Decision

pytestmark = pytest.mark.usefixtures("seeded")

Update = Callable[[], None]


def averaged_model(**options: Any) -> Callable[[Net], tuple[nn.Module, Update]]:
    def make(model: Net) -> tuple[nn.Module, Update]:
        average = AveragedModel(model, **options)
        return average.module, lambda: average.update_parameters(model)

    return make


def model_ema_v3(counts: bool = False, **options: Any) -> Callable[[Net], tuple[nn.Module, Update]]:
    def make(model: Net) -> tuple[nn.Module, Update]:
        import_timm()
        average = importlib.import_module("timm.utils.model_ema").ModelEmaV3(model, **options)
        steps = iter(range(1, 1000))
        return average.module, lambda: average.update(model, step=next(steps) if counts else None)

    return make


def over_state_dict(model: Net) -> tuple[nn.Module, Update]:
    average = copy.deepcopy(model)

    def update() -> None:
        new = model.state_dict()
        for name, value in average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name], 0.01)
            else:
                value.copy_(new[name])

    return average, update


def over_parameters(model: Net) -> tuple[nn.Module, Update]:
    average = copy.deepcopy(model).requires_grad_(False)

    def update() -> None:
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.01)

    return average, update


def over_data(model: Net) -> tuple[nn.Module, Update]:
    average = copy.deepcopy(model)

    def update() -> None:
        for old, new in zip(average.parameters(), model.parameters(), strict=True):
            old.data.mul_(0.99).add_(new.data, alpha=0.01)  # torch does not count this write

    return average, update


EMA = get_ema_multi_avg_fn(0.99)
AVERAGES: dict[str, Callable[[Net], tuple[nn.Module, Update]]] = {
    "equal": averaged_model(),
    "equal-buffers": averaged_model(use_buffers=True),
    "equal-avg-fn-buffers": averaged_model(avg_fn=get_swa_avg_fn(), use_buffers=True),
    "ema": averaged_model(multi_avg_fn=EMA),
    "ema-buffers": averaged_model(multi_avg_fn=EMA, use_buffers=True),
    "ema-avg-fn": averaged_model(avg_fn=get_ema_avg_fn(0.99)),
    "ema-avg-fn-buffers": averaged_model(avg_fn=get_ema_avg_fn(0.99), use_buffers=True),
    "timm": model_ema_v3(),
    "timm-warm-up": model_ema_v3(use_warmup=True, counts=True),
    "timm-late": model_ema_v3(update_after_step=3, counts=True),
    "timm-without-buffers": model_ema_v3(exclude_buffers=True),
    "timm-fp64": model_ema_v3(dtype=torch.float64),
    "timm-bf16": model_ema_v3(dtype=torch.bfloat16),
    "timm-each": model_ema_v3(foreach=False),
    "state-dict": over_state_dict,
    "parameters": over_parameters,
    "data": over_data,
}


def history(make: Callable[[Net], tuple[nn.Module, Update]]) -> tuple[Net, Any]:
    """A model of 3 experts and its average, through three averaged steps and an update of slot 2: pruned, and grown."""
    model = Net(experts=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = ExpertController(model, optimizer, {"every": 4, "window": 1})
    average, update = make(model)
    for _ in range(3):
        train(model, optimizer, controller, near(0, 1, 2))
        update()
    events = train(model, optimizer, controller, near(0, 1, 5))
    assert [(event.slot, event.action) for event in events] == [(2, "pruned"), (2, "grown")]
    update()
    return model, average


def assert_follows(model: Net, average: Any, slot: int = 2) -> None:
    """Exact masks and counts, and grown slots close to the live ones: a mixture with the old vector is far away."""
    live, of_average = model.mlp, average.mlp
    assert of_average.gates[0].experts_mask.tolist() == live.gates[0].experts_mask.tolist()
    assert of_average.num_global_experts == live.num_global_experts == int(of_average._num_global_experts)
    assert of_average.gates[0].active().tolist() == live.gates[0].active().tolist()
    for (old, index), (new, _) in zip(of_average.slot_parameters(slot), live.slot_parameters(slot), strict=True):
        torch.testing.assert_close(old[index].to(new), new[index], rtol=0.1, atol=0.01)


@pytest.mark.parametrize("name", AVERAGES)
def test_a_grown_slot_of_an_average_starts_from_the_live_values(name: str) -> None:
    """Regression: the average's vector had cosine -0.23 with the live one, and masks of 0.02 counted as active."""
    model, average = history(AVERAGES[name])
    assert_follows(model, average)
    one, other = average.mlp.gates[0].sim_matrix[:, 0], model.mlp.gates[0].sim_matrix[:, 0]
    if name != "timm-late":
        assert not torch.equal(one.to(other), other)  # other slots go on being averages
    average.eval()
    x = near(0, 1, 5)
    first = next(average.parameters())
    assert average(x.to(first)).isfinite().all()


@pytest.mark.parametrize("name", AVERAGES)
def test_a_pruned_slot_is_inactive_in_the_average(name: str) -> None:
    model = Net(experts=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = ExpertController(model, optimizer, {"every": 3, "window": 1})
    average, update = AVERAGES[name](model)
    for _ in range(2):
        train(model, optimizer, controller, near(0, 1, 2))
        update()
    assert [event.action for event in train(model, optimizer, controller, near(0, 1))] == ["pruned"]
    update()
    assert active_slots(average.mlp) == [0, 1]
    assert average.mlp.num_global_experts == 2


@pytest.mark.parametrize("name", ["equal", "ema-buffers", "timm", "state-dict", "parameters"])
def test_an_average_that_begins_after_a_change_catches_up(name: str) -> None:
    """Nobody had written to the copy when the slot changed; the next step of the controller finds it an average."""
    model = Net(experts=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = ExpertController(model, optimizer, {"every": 2, "window": 1, "stop": 2})
    train(model, optimizer, controller, near(0, 1, 2))
    average, update = AVERAGES[name](model)
    assert len(train(model, optimizer, controller, near(0, 1, 5))) == 2
    update()
    train(model, optimizer, controller, near(0, 1, 2))
    update()
    assert_follows(model, average)


def test_a_saved_average_is_whole() -> None:
    """Averaging truncates the integer counts: they are written anew from the masks."""
    model, average = history(AVERAGES["ema-avg-fn-buffers"])
    average.mlp._num_global_experts.fill_(7)
    average.mlp._max_num_global_experts.fill_(1)
    state = copy.deepcopy(average.state_dict())
    assert int(state["mlp._num_global_experts"]) == model.mlp.num_global_experts == 3
    assert int(state["mlp._max_num_global_experts"]) == SLOTS
    other = Net(experts=1)
    other.load_state_dict(state)
    assert_follows(model, other)
    x = near(0, 1, 5)
    assert torch.equal(other.eval()(x), average.eval()(x))


def test_an_average_goes_on_after_loading() -> None:
    """In a resumed run the average is a copy of the resumed model and loads its own state."""
    before, old_average = history(AVERAGES["ema-buffers"])
    model = Net(experts=1)
    model.load_state_dict(before.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = ExpertController(model, optimizer, {"every": 2, "window": 1})
    average = AveragedModel(model, multi_avg_fn=EMA, use_buffers=True)
    average.module.load_state_dict(old_average.state_dict())
    average.n_averaged += 4
    train(model, optimizer, controller, near(0, 1, 2))
    average.update_parameters(model)
    assert [event.slot for event in train(model, optimizer, controller, near(0, 1, 3))] == [3]
    average.update_parameters(model)
    assert_follows(model, average.module, slot=3)


class TestOtherCopies:
    def changed(self, model: Any) -> None:
        model.mlp.update_experts(Decision(prune=[(1, "test")], grow=[(torch.eye(D)[4], "test")]))

    def test_a_snapshot_keeps_its_bits(self) -> None:
        model = Net(experts=3)
        snapshot = copy.deepcopy(model)
        bits = copy.deepcopy(snapshot.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        controller = ExpertController(model, optimizer, 1)
        for batch in (near(0, 1, 2), near(0, 1, 5), near(0)):
            train(model, optimizer, controller, batch)
        assert {event.action for event in controller.events} == {"grown", "pruned"}
        assert all(torch.equal(value, bits[name]) for name, value in snapshot.state_dict().items())

    @pytest.mark.parametrize("move", [lambda m: m, lambda m: m.half(), lambda m: m.to("cpu", torch.float64)])
    def test_a_snapshot_that_is_reused_or_moved_keeps_its_bits(self, move: Callable[[Net], Net]) -> None:
        model = Net(experts=3)
        best = move(copy.deepcopy(model))
        with torch.no_grad():
            model.mlp.gates[0].sim_matrix.mul_(1.5)
        best.load_state_dict(model.state_dict())
        bits = copy.deepcopy(best.state_dict())
        self.changed(model)
        assert all(torch.equal(value, bits[name]) for name, value in best.state_dict().items())

    @pytest.mark.parametrize("how", ["optimizer", "then evaluated", "in eval mode", "by hand"])
    def test_a_second_model_that_is_trained_keeps_its_bits(self, how: str) -> None:
        model = Net(experts=3)
        other = copy.deepcopy(model)
        optimizer = torch.optim.Adam(other.parameters())
        loss = other.train(how != "in eval mode")(near(0, 1, 2)).square().mean()
        if how == "by hand":
            parameters = [p for name, p in other.named_parameters() if "temperature" not in name]
            with torch.no_grad():
                for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.sub_(0.1 * grad)
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if how == "then evaluated":
            with torch.no_grad():
                other.eval()(near(0, 1, 2))
        bits = copy.deepcopy(other.state_dict())
        self.changed(model)
        model.mlp.lineage.follow(model.mlp)
        assert all(torch.equal(value, bits[name]) for name, value in other.state_dict().items())

    def test_a_copy_of_the_average_is_a_snapshot_of_it(self) -> None:
        model, average = history(AVERAGES["ema"])
        snapshot = copy.deepcopy(average)
        bits = copy.deepcopy(snapshot.state_dict())
        self.changed(model)
        assert active_slots(average.mlp) == active_slots(model.mlp)
        assert all(torch.equal(value, bits[name]) for name, value in snapshot.state_dict().items())

    def test_training_the_copy_does_not_change_the_original(self) -> None:
        """The controller's model may be the copy."""
        original = Net(experts=3)
        bits = copy.deepcopy(original.state_dict())
        model, average = copy.deepcopy(original), copy.deepcopy(original)
        self.changed(model)
        for each in (original, average):
            assert all(torch.equal(value, bits[name]) for name, value in each.state_dict().items())

    def test_copies_are_not_kept_alive_nor_pickled(self) -> None:
        layer = make_layer(experts=3)
        for _ in range(3):
            copy.deepcopy(layer)
        assert len(layer.lineage._copies) <= 1
        again = pickle.loads(pickle.dumps(layer))
        assert again.lineage._copies == []
        old = layer.__getstate__()
        del old["lineage"]
        again.__setstate__(old)
        assert again.lineage._copies == []


@pytest.mark.parametrize("training", [False, True])
def test_an_average_is_evaluated_with_a_graph(training: bool) -> None:
    """Without `no_grad`, and in the mode in which torch's AveragedModel leaves it: nothing is trained by that."""

    def make(model: Net) -> tuple[nn.Module, Update]:
        average, update = AVERAGES["ema-buffers"](model)

        def evaluated() -> None:
            update()
            average.train(training)(near(0, 1, 2)).sum().item()

        return average, evaluated

    assert_follows(*history(make))


def test_update_bn_leaves_an_average_an_average() -> None:
    """It runs the average in training mode, without gradients."""

    class Normed(Net):
        def __init__(self) -> None:
            super().__init__(experts=3)
            self.norm = nn.BatchNorm1d(D, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.norm(x).sum() * 0

    model: Any = Normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = ExpertController(model, optimizer, {"every": 3, "window": 1})
    average = AveragedModel(model, multi_avg_fn=EMA)
    for _ in range(2):
        train(model, optimizer, controller, near(0, 1, 2))
        average.update_parameters(model)
        update_bn([near(0, 1)], average)
    assert len(train(model, optimizer, controller, near(0, 1, 5))) == 2
    average.update_parameters(model)
    assert_follows(model, average.module)


def test_a_compiled_copy_that_is_trained_keeps_its_bits() -> None:
    model = Net(experts=3)
    other = copy.deepcopy(model)
    optimizer = torch.optim.Adam(other.parameters())
    torch.compile(other, backend="eager", fullgraph=True)(near(0, 1, 2)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    bits = copy.deepcopy(other.state_dict())
    TestOtherCopies().changed(model)
    assert all(torch.equal(value, bits[name]) for name, value in other.state_dict().items())


def test_an_average_follows_a_wrapped_gate() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *arguments: Any, **options: Any) -> Any:
            return self.inner(*arguments, **options)

    def wrapping(model: Net) -> tuple[nn.Module, Update]:
        model.mlp.gates[0] = Wrapped(model.mlp.gates[0])
        return over_parameters(model)

    model, average = history(wrapping)
    live, of_average = model.mlp, average.mlp
    assert of_average.held_gates[0].active().tolist() == live.held_gates[0].active().tolist()
    for (old, index), (new, _) in zip(of_average.slot_parameters(2), live.slot_parameters(2), strict=True):
        torch.testing.assert_close(old[index], new[index], rtol=0.1, atol=0.01)


def test_a_trained_copy_is_watched_no_longer() -> None:
    """nn.TransformerEncoder and others make their layers by deepcopy: each output would get a hook in every step."""
    copied = copy.deepcopy(make_layer())
    x = torch.randn(8, D)
    first = copied(x)
    assert first._backward_hooks
    first.sum().backward()
    assert not copied(x)._backward_hooks
