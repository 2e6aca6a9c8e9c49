"""A layer in which no token is routed says so once, after many training forwards, and only then."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import MoELayer
from dynmoe_tutel.silence import SILENT_FORWARDS

D = 8


def made(**gate: Any) -> Any:
    layer = MoELayer({"type": "top_any", **gate}, D, {"hidden_size_per_expert": 4, "num_experts_per_device": 2})
    with torch.no_grad():
        layer.gates[0].sim_matrix.fill_(1.0)
    return layer


LOST, ROUTED = -torch.ones(3, D), torch.ones(3, D)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.WARNING, "dynmoe_tutel")
    return lambda: sum("has routed no token" in record.getMessage() for record in caplog.records)


def test_each_layer_warns_once(warned: Any, caplog: pytest.LogCaptureFixture) -> None:
    first, second = made(), made(max_expert_num=4)
    for _ in range(SILENT_FORWARDS - 1):
        first(LOST)
    assert warned() == 0
    for _ in range(3 * SILENT_FORWARDS):
        first(LOST)
    assert warned() == 1
    message = caplog.records[-1].getMessage()
    assert f"a layer of 2 slots has routed no token in its last {SILENT_FORWARDS} training forwards" in message
    for advice in ("num_experts_per_device", "ExpertController", "adaptive_update_experts()", "gates[0].gates"):
        assert advice in message
    for _ in range(SILENT_FORWARDS):
        second(LOST)
    assert warned() == 2


def test_a_layer_that_falls_silent_warns(warned: Any) -> None:
    layer = made()
    layer(ROUTED)
    for _ in range(SILENT_FORWARDS):
        layer(LOST)
    assert warned() == 1


@pytest.mark.parametrize("what", ["routed", "at times", "eval", "no grad", "no tokens", "top"])
def test_other_layers_do_not(what: str, warned: Any) -> None:
    layer = made() if what != "top" else MoELayer("Top1Gate", D, {"hidden_size_per_expert": 4})
    layer.train(what != "eval")
    for step in range(2 * SILENT_FORWARDS):
        with torch.set_grad_enabled(what != "no grad"):
            layer({"routed": ROUTED, "no tokens": LOST[:0]}.get(what, LOST))
        if what == "at times" and step % 10 == 0:
            layer(ROUTED)
    assert warned() == 0


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_tokens_without_values_do_not_count(where: str, warned: Any) -> None:
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        layer = MoELayer("top_any", D, {"hidden_size_per_expert": 4})
        for _ in range(2 * SILENT_FORWARDS):
            layer(torch.ones(3, D))
    assert warned() == 0


def test_a_recompute_does_not_count(warned: Any) -> None:
    layer = made()
    x = LOST.clone().requires_grad_()
    for _ in range(SILENT_FORWARDS - 1):
        (checkpoint(layer, x, use_reentrant=False).sum() + x.sum()).backward()
    assert warned() == 0
    layer(x)
    assert warned() == 1


def test_copies_count_on_by_themselves(warned: Any) -> None:
    layer = made()
    for _ in range(SILENT_FORWARDS - 1):
        layer(LOST)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for each in copies:
        each(LOST)
    assert warned() == 2
    layer(LOST)
    assert warned() == 3
