"""Routers without an adaptive gate in a host's training: what they hold moves with its steps and is logged."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from dynmoe_tutel import MoELayer
from dynmoe_tutel.integrations.training import MoETraining


def test_what_routers_hold_moves_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    experts = {"num_experts_per_device": 4, "hidden_size_per_expert": 4}
    gates = ({"type": "relu", "target_k": 1.0, "coefficient": 0.1, "rate": 0.5}, {"type": "quantile_top_k", "k": 2})
    model = nn.Sequential(*[MoELayer(gate, 8, experts, seeds=(1, 2)) for gate in gates])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with caplog.at_level(logging.WARNING):
        training = MoETraining(model, optimizer, 0.01, {"schedule": 10})
    assert "schedule is ignored: no gate of the Sequential grows or prunes experts" in caplog.text
    assert training.controller is None
    for step in range(3):
        training.set_factor(1.0)
        (model(torch.randn(32, 8, generator=torch.Generator().manual_seed(step)) + 1) ** 2).mean().backward()
        optimizer.step()
        assert training.step() == 1
    scalars = training.scalars()
    training.close()
    assert scalars["moe/0/target_k"] == 1.0
    assert scalars["moe/0/coefficient"] == pytest.approx(0.1 * 1.5**3), "more than one expert a token in each step"
    bias = model[1].gates[0].score_bias.detach()
    assert scalars["moe/1/score_bias_min"] == pytest.approx(float(bias.min()))
    assert float(bias.min()) < 0 < float(bias.max())
