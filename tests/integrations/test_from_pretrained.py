"""A transformers model of one's own with a MoE layer, through save_pretrained and from_pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynmoe_tutel import MoELayer, TopAnyGate
from dynmoe_tutel.adaptive import Budgets

transformers = pytest.importorskip("transformers")


class Config(transformers.PretrainedConfig):  # type: ignore[misc,name-defined]
    model_type = "toy_moe"


class Model(transformers.PreTrainedModel):  # type: ignore[misc,name-defined]
    config_class = Config
    base_model_prefix = "toy"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        experts = {"num_experts_per_device": 4, "hidden_size_per_expert": 16}
        gate = {"type": "top_any", "max_expert_num": 8, **getattr(config, "gate", {})}
        self.moe = MoELayer(gate, 8, experts, scan_expert_func=_skip, capacity=0.5)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """For what a checkpoint lacks, which transformers leaves as uninitialised memory."""
        if isinstance(module, TopAnyGate) and module.budget_shift is not None:
            module.budget_shift.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.moe(x)
        return y


def _skip(name: str, parameter: Any) -> None:
    parameter.skip_allreduce = True


def test_outputs_marks_and_counts_are_right(tmp_path: Path) -> None:
    model, x = Model(Config()).eval(), torch.randn(64, 8)
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert int(loaded.moe.dropped_assignments) == 0
    for parameter in loaded.moe.experts.parameters():
        assert parameter._tutel_expert
        assert parameter.skip_allreduce
    assert torch.equal(loaded(x), model(x))
    assert int(loaded.moe.dropped_assignments) == int(model.moe.dropped_assignments) > 0


def test_a_budget_comes_along_and_starts_at_0_where_the_checkpoint_has_none(tmp_path: Path) -> None:
    gate = {"budget": {"target_k": 2.0, "max_k": 3}}
    model, plain = Model(Config(gate=gate)).eval(), Model(Config()).eval()
    model.moe.gates[0].budget_shift.fill_(0.125)
    model.save_pretrained(tmp_path / "budget")
    plain.save_pretrained(tmp_path / "plain")
    loaded = Model.from_pretrained(tmp_path / "budget")
    x = torch.randn(64, 8)
    assert loaded.moe.gates[0].budget_shift.tolist() == [0.125]
    assert torch.equal(loaded(x), model(x))
    loaded = Model.from_pretrained(tmp_path / "plain", config=Config(gate=gate))
    assert loaded.moe.gates[0].budget_shift.tolist() == [0.0]
    loaded.train()(x).sum().backward()
    Budgets(loaded).step()
    assert float(loaded.moe.gates[0].budget_shift) != 0
