"""`dynmoe_tutel.deepspeed` stands for `deepspeed`; `register()` puts it there. `test_deepspeed_layer` runs these."""

from __future__ import annotations

import deepspeed as stock
import deepspeed.moe.layer
import pytest
from torch import nn

import dynmoe_tutel.deepspeed as ours


def test_every_other_name_is_deepspeeds() -> None:
    for name in ("zero", "comm", "init_distributed", "DeepSpeedEngine", "ops", "__version__", "checkpointing"):
        assert getattr(ours, name) is getattr(stock, name), name
    assert ours.moe.utils is deepspeed.moe.utils
    assert ours.moe.layer.TopKGate is deepspeed.moe.layer.TopKGate
    assert set(dir(stock)) <= set(dir(ours))
    assert ours.pipe is stock.pipe  # a module that nobody may have imported


@pytest.mark.parametrize("module", [ours, ours.moe, ours.moe.layer])
def test_an_unknown_name_is_said(module: object) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


def test_its_own_names() -> None:
    assert ours.moe.layer.MoE is ours.MoE
    assert issubclass(ours.MoE, deepspeed.moe.layer.MoE)
    assert ours.initialize is not stock.initialize


def test_register_and_unregister() -> None:
    """A second call of either changes nothing; layers of before and during keep working."""
    layer, initialize = deepspeed.moe.layer.MoE, stock.initialize
    assert not ours.registered()
    try:
        for _ in range(2):
            ours.register()
            assert ours.registered()
            assert deepspeed.moe.layer.MoE is ours.MoE
            assert stock.initialize is ours.initialize
        made = deepspeed.moe.layer.MoE(8, nn.Linear(8, 8), num_experts=2, k=-1, max_expert_num=4)
        other = deepspeed.moe.layer.MoE(8, nn.Linear(8, 8), num_experts=2, k=1)
    finally:
        for _ in range(2):
            ours.unregister()
            assert not ours.registered()
    assert deepspeed.moe.layer.MoE is layer
    assert stock.initialize is initialize
    for each in (made, other):
        assert isinstance(each, layer)  # what the engine asks
    assert made.num_experts == 4
    with pytest.raises(TypeError, match="max_expert_num"):
        layer(8, nn.Linear(8, 8), num_experts=2, k=-1, max_expert_num=4)
