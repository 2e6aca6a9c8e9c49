"""Calibration of a trained model to a mean k, and the bound of a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive import Budgets, calibrate
from dynmoe_tutel.gates.budget import Budget

D = 16


def model_and_batches(**budget: Any) -> tuple[nn.Sequential, list[Tensor]]:
    gate_type: dict[str, Any] = {"type": "top_any", "max_expert_num": 8}
    if budget:
        gate_type["budget"] = budget
    experts = {"num_experts_per_device": 8, "hidden_size_per_expert": 12}
    layers = [MoELayer(gate_type, D, experts, seeds=(i, 10 + i)) for i in range(2)]
    generator = torch.Generator().manual_seed(0)
    for layer, threshold in zip(layers, (0.1, -0.2), strict=True):
        nn.init.uniform_(layer.gates[0].gates, threshold, threshold + 0.1, generator=generator)
    batches = [torch.randn(64, D, generator=generator) for _ in range(6)]
    return nn.Sequential(*layers), batches


def mean_k(model: nn.Sequential, batches: list[Tensor]) -> list[float]:
    """In eval, of each layer."""
    found = []
    for index, layer in enumerate(model.eval()):
        k = [layer.route(model[:index](x)).k_per_token for x in batches]
        found.append(float(torch.cat(k).float().mean()))
    return found


@pytest.mark.parametrize("target", [1.0, 1.5, 3.0, 8.0])
def test_every_layer_meets_the_target(target: float) -> None:
    model, batches = model_and_batches()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    found = calibrate(model, batches, target)
    assert list(found) == ["0.gates.0", "1.gates.0"]
    assert list(found.values()) == pytest.approx(mean_k(model, batches))
    assert list(found.values()) == pytest.approx([target, target], rel=0.02)
    for name, value in weights.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_it_holds_on_other_data() -> None:
    model, batches = model_and_batches()
    calibrate(model, batches, 2.0)
    generator = torch.Generator().manual_seed(9)
    others = [torch.randn(64, D, generator=generator) for _ in range(6)]
    assert mean_k(model, others) == pytest.approx([2.0, 2.0], rel=0.1)


def test_tokens_that_differ_by_their_place_in_a_sequence() -> None:
    """More tokens than are kept: a sample of first tokens alone would calibrate for those."""
    model, _ = model_and_batches()
    generator = torch.Generator().manual_seed(0)
    place = 3 * torch.randn(16, D, generator=generator)
    batches = [place + torch.randn(512, 16, D, generator=generator) for _ in range(4)]
    found = calibrate(model, batches, 2.0)
    assert list(found.values()) == pytest.approx([2.0, 2.0], rel=0.02)


def test_a_cap_counts() -> None:
    model, batches = model_and_batches()
    found = calibrate(model, batches, 1.8, max_k=2)
    assert list(found.values()) == pytest.approx([1.8, 1.8], rel=0.02)
    assert max(int(layer.route(batches[0]).k_per_token.max()) for layer in model) == 2


def test_one_shift_for_a_model() -> None:
    model, batches = model_and_batches()
    first, second = calibrate(model, batches, 2.0, scope="model").values()
    assert (first + second) / 2 == pytest.approx(2.0, rel=0.02)
    assert abs(first - second) > 0.5
    assert model[0].gates[0].budget_shift.tolist() == model[1].gates[0].budget_shift.tolist()


def test_modes_and_hooks_stay_as_they_were() -> None:
    model, batches = model_and_batches()
    model.train()
    model[1].eval()
    calibrate(model, batches, 2.0)
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    assert not model[0].gates[0]._forward_hooks


def test_kinds_of_batches() -> None:
    expected = calibrate(*model_and_batches(), 2.0)
    model, batches = model_and_batches()
    assert calibrate(model, [(x,) for x in batches], 2.0) == expected
    model, batches = model_and_batches()
    assert calibrate(model, [{"input": x} for x in batches], 2.0) == expected
    model, batches = model_and_batches()
    assert calibrate(model, [{"pixels": x} for x in batches], 2.0, call=lambda m, b: m(b["pixels"])) == expected


def test_a_calibrated_model_is_saved_and_loaded() -> None:
    model, batches = model_and_batches()
    calibrate(model, batches, 2.0)
    other, _ = model_and_batches(target_k=2.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(batches[0]), model.eval()(batches[0]))


@pytest.mark.parametrize("target", [0.9, 8.5, float("nan"), "2", True])
def test_refuses_a_target_out_of_range(target: Any) -> None:
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=r"target_k = .*: give a number from 1 .* to 8"):
        calibrate(model, batches, target)
    assert model[0].gates[0].budget_shift is None


def test_refuses_batches_that_end_and_models_without_gates() -> None:
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match="read only once: give a list"):
        calibrate(model, iter(batches), 2.0)
    with pytest.raises(ValueError, match="batches = None cannot be read: give a list"):
        calibrate(model, None, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model has no gate of type top_any"):
        calibrate(nn.Linear(2, 2), batches, 2.0)


@pytest.mark.parametrize("max_k", [0, -1, 2.5, "1", True])
def test_refuses_a_wrong_cap(max_k: Any) -> None:
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=r"^max_k = .*: give an integer of at least 1"):
        calibrate(model, batches, 1.0, max_k=max_k)


def test_refuses_gates_that_no_token_reaches() -> None:
    """Their shift would be the lowest, at which every expert is active."""
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=r"no finite token of batches reaches 0\.gates\.0"):
        calibrate(model, [], 2.0)
    with pytest.raises(ValueError, match=r"no finite token of batches reaches 1\.gates\.0"):
        calibrate(model, batches, 2.0, call=lambda model, batch: model[0](batch))
    assert model[0].gates[0].budget is None
    assert model[0].gates[0].budget_shift is None


def test_an_error_leaves_budget_and_shift() -> None:
    model, batches = model_and_batches(target_k=3.0)
    gate = model[0].gates[0]
    gate.budget_shift.fill_(0.25)

    def stops(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        if float(gate.budget_shift) != 0.25:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        calibrate(model, batches, 2.0, call=stops)
    assert gate.budget.target_k == 3.0
    assert gate.budget_shift.tolist() == [0.25]


def test_training_goes_on_after_a_calibration_in_inference_mode() -> None:
    model, batches = model_and_batches()
    with torch.inference_mode():
        calibrate(model, batches, 2.0)
    before = model[0].gates[0].budget_shift.clone()
    model(3 * batches[0] + 1).sum().backward()
    Budgets(model).step()
    assert not torch.equal(model[0].gates[0].budget_shift, before)


def test_a_wrapped_gate_is_calibrated() -> None:
    """As a tool wraps it: by a module in the gate's place."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *arguments: Any, **options: Any) -> Any:
            return self.inner(*arguments, **options)

    model, batches = model_and_batches()
    model[1].gates[0] = Wrapped(model[1].gates[0])
    found = calibrate(model, batches, 2.0)
    assert found == {"0.gates.0": pytest.approx(2.0, rel=0.1), "1.gates.0.inner": pytest.approx(2.0, rel=0.1)}
    assert mean_k(model, batches) == [pytest.approx(k) for k in found.values()]


def test_a_training_that_goes_on_holds_the_new_target_until_its_own_is_given_back() -> None:
    model, batches = model_and_batches(target_k=4.0)
    calibrate(model, batches, 1.5)
    assert [(layer.gates[0].target_k, layer.gates[0].max_k) for layer in model] == [(1.5, None)] * 2

    def trained_k() -> float:
        for _ in range(4):
            for x in batches:
                model.train()(x)
                budgets.step()
        return float(model[0].route(torch.cat(batches)).k_per_token.float().mean())

    budgets = Budgets(model)
    assert trained_k() < 2
    for layer in model:
        layer.gates[0].hold_budget(Budget(target_k=4.0))
    assert trained_k() == pytest.approx(4.0, rel=0.1)
