"""Averages that are given to the controller: modules of any origin, and dicts of tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from controller_case import Net, active_slots, near, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dynmoe_tutel.adaptive.controller import ExpertController

pytestmark = pytest.mark.usefixtures("seeded")


def grown(model: Net, *averages: Any, slots: tuple[int, ...] = (2, 2)) -> None:
    """Two steps, the second with an update; averages are given to the controller."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = ExpertController(model, optimizer, {"every": 2, "window": 1}, averages=averages)
    train(model, optimizer, controller, near(0, 1, 2))
    assert tuple(event.slot for event in train(model, optimizer, controller, near(0, 1, 5))) == slots


def test_a_model_of_its_own_follows() -> None:
    """It is no deep copy, and nobody has written to it."""
    model, average = Net(experts=3), Net(experts=3)
    average.load_state_dict(model.state_dict())
    grown(model, average)
    live, of_average = model.mlp, average.mlp
    assert active_slots(of_average) == active_slots(live)
    for (old, index), (new, _) in zip(of_average.slot_parameters(2), live.slot_parameters(2), strict=True):
        assert torch.equal(old[index], new[index])
    assert not torch.equal(of_average.gates[0].sim_matrix[:, 0], live.gates[0].sim_matrix[:, 0])


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("whole", [True, False])
def test_a_dict_of_tensors_follows(prefix: str, whole: bool) -> None:
    """The dict of a hand-written loop, `ema[k].lerp_(v, 0.01)`; it may hold the parameters alone, in another type."""
    model = Net(experts=3)
    source = model.state_dict() if whole else dict(model.named_parameters())
    kind = torch.float32 if whole else torch.float64
    ema = {prefix + k: v.detach().clone().to(kind if v.is_floating_point() else v.dtype) for k, v in source.items()}
    grown(model, ema)
    for name, new in model.mlp.named_parameters():
        old, index = ema[f"{prefix}mlp.{name}"], (..., 2) if name.startswith("gates") else (2,)
        assert torch.equal(old[index], new[index].to(old)), name
        assert not torch.equal(old, new.to(old)), name
    if whole:
        assert torch.equal(ema[f"{prefix}mlp.gates.0.experts_mask"], model.mlp.gates[0].experts_mask)


def test_the_named_averages_follow_and_no_other() -> None:
    model = Net(experts=3)
    named, other = (AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = ExpertController(model, optimizer, {"every": 2, "window": 1}, averages=[named])
    late = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, optimizer, controller, near(0, 1, 2))
    for average in (named, other, late):
        average.update_parameters(model)
    bits = [copy.deepcopy(average.module.state_dict()) for average in (other, late)]
    assert len(train(model, optimizer, controller, near(0, 1, 5))) == 2
    assert torch.equal(named.module.mlp.gates[0].sim_matrix[:, 2], model.mlp.gates[0].sim_matrix[:, 2])
    for average, before in zip((other, late), bits, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in average.module.state_dict().items())


def test_an_average_that_is_trained_too_follows_when_it_is_named() -> None:
    """A teacher whose forward builds a graph."""
    model = Net(experts=3)
    teacher = copy.deepcopy(model)
    teacher(near(0, 1, 2)).square().mean().backward()
    grown(model, teacher)
    assert torch.equal(teacher.mlp.gates[0].sim_matrix[:, 2], model.mlp.gates[0].sim_matrix[:, 2])


@pytest.mark.parametrize(
    ("averages", "words"),
    [
        (lambda m: AveragedModel(m), ["averages", "AveragedModel", "[average]"]),
        (lambda m: m.state_dict(), ["averages", "OrderedDict", "[average]"]),
        (lambda m: [3], ["averages[0]", "int"]),
        (lambda m: [copy.deepcopy(m), m], ["averages[1]", "trained model itself"]),
        (lambda m: [nn.Linear(2, 2)], ["averages[0]", "no layer", "mlp"]),
        (lambda m: [{}], ["averages[0]", "no layer", "mlp"]),
        (lambda m: [Net(slots=4)], ["averages[0]", "slots", "mlp"]),
        (lambda m: [{k: v.flatten() for k, v in m.state_dict().items()}], ["averages[0]", "mlp"]),
    ],
)
def test_what_is_no_average_is_refused(averages: Any, words: list[str]) -> None:
    model = Net(experts=3)
    with pytest.raises(ValueError) as caught:
        ExpertController(model, None, 2, averages=averages(model))
    assert all(word in str(caught.value) for word in words), caught.value
