"""The log's mean of the auxiliary loss is over training forwards, each once."""

from __future__ import annotations

import pytest
import torch
from tiny import Items, Net

from dynmoe_tutel.integrations.auxiliary_gradient import AuxiliaryGradient
from dynmoe_tutel.metrics import moe_layers


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_what_the_log_counts(checkpointing: bool | None) -> None:
    model, items = Net(checkpointing=checkpointing), Items()
    auxiliary = AuxiliaryGradient(moe_layers(model), 0.1)
    model(items.x, items.labels)["loss"].backward()
    with torch.no_grad():
        model(items.x[:3])
    model.eval()(items.x[:3])
    assert [int(calls) for _, calls in auxiliary.state_dict().values()] == [1, 1]
    expected = {name: float(layer.l_aux.detach()) for name, layer in moe_layers(model).items()}  # type: ignore[union-attr]
    assert auxiliary.means() == pytest.approx(expected)  # of diversity and simplicity, which no token changes
    auxiliary.close()
