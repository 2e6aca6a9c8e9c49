"""Hooks of meters: they end with the meter, and copies and pickles of a model lack them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from dynmoe_tutel import MoELayer, metrics


def model() -> nn.Module:
    gate = {"type": "top_any", "max_expert_num": 4}
    return nn.Sequential(MoELayer(gate, 8, {"num_experts_per_device": 2, "hidden_size_per_expert": 4}), nn.Linear(8, 8))


def hooks(net: Any) -> int:
    return len(net[0].gates[0]._forward_hooks)


def tokens(meter: metrics.RoutingMeter) -> int:
    return int(meter._sums["0"]["k_histogram"].sum())


def test_a_with_block_ends_them() -> None:
    net = model()
    with metrics.RoutingMeter(net) as meter:
        net(torch.randn(5, 8))
        assert meter.attached
    net(torch.randn(5, 8))
    assert (hooks(net), meter.attached, tokens(meter)) == (0, False, 5)


def test_an_exception_in_the_block_ends_them() -> None:
    net = model()
    with pytest.raises(KeyboardInterrupt), metrics.RoutingMeter(net):
        raise KeyboardInterrupt
    assert hooks(net) == 0


def test_they_end_with_their_owner() -> None:
    """As where a cell of a notebook makes it anew: the model has one, however often the cell ran."""
    net = model()
    for _ in range(3):
        meter = metrics.RoutingMeter(net)
    assert hooks(net) == 1
    net(torch.randn(5, 8))
    assert tokens(meter) == 5
    del meter
    assert hooks(net) == 0


def test_two_owners_count_both() -> None:
    net = model()
    one, two = metrics.RoutingMeter(net), metrics.RoutingMeter(net)
    net(torch.randn(5, 8))
    one.close()
    one.close()
    net(torch.randn(5, 8))
    assert (tokens(one), tokens(two)) == (5, 10)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("part", ["model", "layer", "gate"])
def test_copies_lack_them_and_keep_others(copied: Any, part: str) -> None:
    net = model()
    net[0].gates[0].register_forward_hook(_others)
    meter = metrics.RoutingMeter(net)
    whole = {"model": net, "layer": net[0], "gate": net[0].gates[0]}[part]
    if copied is copy.copy and part != "gate":
        return  # a shallow copy of a model has the same gate
    made = copied(whole)
    gate = {"model": lambda: made[0].gates[0], "layer": lambda: made.gates[0], "gate": lambda: made}[part]()
    assert list(gate._forward_hooks.values()) == [_others]
    made(torch.randn(5, 8))
    assert (hooks(net), tokens(meter)) == (2, 0)


def _others(*_: Any) -> None:
    pass


def test_a_copy_of_the_owner_has_none() -> None:
    net = model()
    meter = metrics.RoutingMeter(net)
    copied = copy.deepcopy(meter)
    assert not copied.attached
    copied.close()
    assert meter.attached
    assert hooks(net) == 1
