"""`OverflowRepair`: a repeated step leaves what an exact model's step leaves; one that drops nothing runs once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FP32, HALF, relative_rms
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from waiting import NoWaiting

from dynmoe_tutel import MoELayer, OverflowRepair, validation
from dynmoe_tutel.adaptive import Budgets
from dynmoe_tutel.adaptive.recording import RecordsRouting
from dynmoe_tutel.convert import aux_loss
from dynmoe_tutel.metrics import RoutingMeter

D, T = 16, 40
LITTLE = 0.5  # a capacity that drops


def moe(capacity: Any = "exact", gate: Any = None, seed: int = 1) -> MoELayer:
    gate = gate if gate and "type" in gate else {"type": "top_any", "max_expert_num": 6, **(gate or {})}
    experts = {"num_experts_per_device": 4, "hidden_size_per_expert": 12, "activation_fn": F.gelu}
    return MoELayer(gate, D, experts, seeds=(seed, seed), capacity=capacity)


class Model(nn.Module):
    """Three layers, each with state of its own kind, around a BatchNorm and two dropouts."""

    def __init__(self, capacity: Any, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.checkpointing = checkpointing
        self.first, self.norm, self.drop = moe(capacity, seed=1), nn.BatchNorm1d(D), nn.Dropout(0.3)
        self.second = moe(capacity, {"budget": {"target_k": 1.5}}, seed=2)
        self.third = moe(gate={"type": "expert_threshold", "target_k": 2.0}, seed=3)
        for layer in (self.first, self.second):
            layer.record.keep_tokens = 5
        self.meter = RoutingMeter(self)

    def layers(self) -> tuple[MoELayer, ...]:
        return self.first, self.second, self.third

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.drop(x))
        second = partial(checkpoint, self.second, use_reentrant=False) if self.checkpointing else self.second
        return x + self.drop(self.third(x + second(self.norm(x))))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, T, D, generator=generator).unbind() for _ in range(count)]


def left_behind(model: Model) -> dict[str, Tensor]:
    """All that a step changes."""
    found = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    found |= {f"buffer {n}": b for n, b in model.named_buffers()}
    for i, layer in enumerate(model.layers()):
        found[f"dropped {i}"] = layer.dropped_assignments
        found |= {f"record {i}, {n}": t for n, t in enumerate(layer.record.tensors())}
    found |= {f"meter, {n} {key}": t for n, sums in model.meter.state_dict().items() for key, t in sums.items()}
    found["sample"], found["counts"] = model.second.gates[0]._sample, model.third.gates[0].step_counts()
    found["random"] = torch.get_rng_state()
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if tensor.is_floating_point():
            assert relative_rms(tensor, expected[name]) < tolerance, name
        else:
            assert torch.equal(tensor, expected[name]), name


def trained(capacity: Any, autocast: bool, checkpointing: bool, micro: int, steps: int = 2) -> Any:
    """Losses and what each step leaves behind, of a training with `micro` gradients accumulated, each repaired alone;
    the repair."""
    model = Model(capacity, checkpointing)
    optimizer, repair = torch.optim.AdamW(model.parameters(), lr=1e-2), OverflowRepair(model)
    budgets, left, losses = Budgets(model), [], []
    for layer in model.layers():
        layer.begin_record_routing()
    torch.manual_seed(4)

    def step(x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (model(x) - target).square().mean() + aux_loss(model, weight=0.01)
        repair.forwards_done()
        loss.backward()
        return loss.detach()

    data = iter(batches(steps * micro))
    for _ in range(steps):
        optimizer.zero_grad()
        losses += [repair(partial(step, *next(data))) for _ in range(micro)]
        left.append(left_behind(model))
        optimizer.step()
        budgets.step()
    return torch.stack(losses), left, repair


@pytest.mark.parametrize(
    ("autocast", "checkpointing", "micro"), [(False, False, 1), (False, True, 2), (True, False, 2), (True, True, 1)]
)
def test_a_repeated_step_is_the_exact_step(autocast: bool, checkpointing: bool, micro: int) -> None:
    """Losses, gradients, records, budgets, buffers, random state and counts, over two optimizer steps."""
    losses, left, repair = trained(LITTLE, autocast, checkpointing, micro)
    expected_losses, expected, never = trained("exact", autocast, checkpointing, micro)
    assert (repair.steps, repair.repeated, never.repeated) == (2 * micro, 2 * micro, 0)
    tolerance = HALF if autocast else FP32
    assert relative_rms(losses, expected_losses) < tolerance
    for found, of_exact in zip(left, expected, strict=True):
        assert_alike(found, of_exact, tolerance)
    assert int(expected[-1]["record 0, 0"].sum()) > 0
    assert int(expected[-1]["counts"].sum()) > 0


def test_a_step_that_drops_nothing_runs_once_and_reads_one_number() -> None:
    model = Model(6.0)
    repair, (x, target) = OverflowRepair(model), batches(1)[0]
    waited = []

    def step() -> Tensor:
        with NoWaiting():  # a CPU reads what a GPU reads late, for warnings
            for layer in model.layers():
                layer._silence.see = lambda routing: None
            loss = (model(x) - target).square().mean()
            loss.backward()
        waited.append(False)
        return loss.detach()

    looked = repair._look

    def look(layers: Any) -> None:
        with NoWaiting():
            looked(layers)

    repair._look = look  # type: ignore[method-assign]
    torch.manual_seed(4)
    loss = repair(step)
    found = left_behind(model)
    assert (repair.steps, repair.repeated, len(waited)) == (1, 0, 1)
    model = Model("exact")
    torch.manual_seed(4)
    expected = (model(x) - target).square().mean()
    expected.backward()
    assert relative_rms(loss, expected) < FP32
    assert_alike(found, left_behind(model), FP32)


def dropped_in(repair: OverflowRepair, run: Callable[[], Any]) -> bool:
    """Whether a step was repeated."""
    before = repair.repeated
    repair(run)
    return repair.repeated > before


class OtherLayer(RecordsRouting, nn.Module):
    """As Tutel's layers with a fixed k: a record window in a module that is no MoELayer."""

    def __init__(self, like: MoELayer) -> None:
        super().__init__()
        self.gates, self.model_dim, self.max_num_global_experts = like.gates, D, like.max_num_global_experts
        self.register_buffer("_num_global_experts", torch.tensor(4))

    def forward(self, x: Tensor) -> Tensor:
        self.record.add(x, self.gates[0](x))
        return x


def test_records_of_layers_of_other_kinds_count_once() -> None:
    layer, x = moe(LITTLE), batches(1)[0][0]
    other = OtherLayer(moe())
    other.begin_record_routing()
    repair = OverflowRepair(nn.ModuleList([layer, other]))
    repair(lambda: other(layer(x)))
    assert (repair.repeated, int(other.record.tokens)) == (1, T)


def test_what_comes_after_forwards_done_counts_too() -> None:
    layer, fits = moe(LITTLE), moe(LITTLE)
    few, many = batches(1)[0][0][:, :], batches(1)[0][1]
    with torch.no_grad():
        few = -layer.gates[0].sim_matrix.t().sum(dim=0).expand(T, D)  # no expert
    model = nn.ModuleList([layer, fits])
    repair = OverflowRepair(model)

    def step(*calls: Tensor) -> None:
        layer(few)
        repair.forwards_done()
        for x in calls:
            fits(x)

    assert not dropped_in(repair, step)
    assert dropped_in(repair, partial(step, many))
    assert not dropped_in(repair, step)


def test_capacities_and_warnings_come_back(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the step raises, at first or in the repetition; a repaired drop does not warn, others do."""
    monkeypatch.setattr(validation, "_warned", set())
    layer, x = moe(LITTLE), batches(1)[0][0]
    repair = OverflowRepair(layer)

    def fails(when: bool) -> None:
        layer(x)
        if repair.repeating == when:
            raise KeyError(when)

    with caplog.at_level(logging.WARNING, logger="dynmoe_tutel"):
        for when in (False, True):
            with pytest.raises(KeyError):
                repair(partial(fails, when))
            assert (layer.capacity, repair.repeating, layer.drops_are_repaired) == (LITTLE, False, False)
        assert not caplog.records
        layer(x)
    assert "was too small" in caplog.text


def test_a_call_within_a_step_is_a_part_of_it() -> None:
    """As of micro-batches that are each repaired, in a step that is repaired too."""
    layer, x = moe(LITTLE), batches(1)[0][0]
    repair = OverflowRepair(layer)
    y = repair(lambda: repair(lambda: layer(x)))
    assert (repair.steps, repair.repeated) == (1, 1)
    assert relative_rms(y, moe("exact")(x)) < FP32


def test_a_buffer_that_is_expanded_stays() -> None:
    """Nothing can write to it in place, so it is not put back."""
    model = nn.Sequential(moe(LITTLE))
    model.register_buffer("ones", torch.ones(1).expand(5))
    assert dropped_in(OverflowRepair(model), lambda: model(batches(1)[0][0]))


def test_a_repetition_that_is_none_is_told() -> None:
    """As where the step replays a CUDA graph of the bounded layer."""
    layer, x = moe(LITTLE), batches(1)[0][0]

    def replays() -> None:
        layer.capacity = LITTLE
        layer(x)

    with pytest.raises(RuntimeError, match=r"repair\.repeating"):
        OverflowRepair(layer)(replays)
    assert layer.capacity == LITTLE


@pytest.mark.parametrize("capacity", ["exact", "full", None])
def test_without_a_factor_nothing_is_copied_or_read(capacity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynmoe_tutel.overflow._Before", None)
    layer, x = moe(capacity), batches(1)[0][0]
    repair = OverflowRepair(layer)
    y = repair(lambda: layer(x))
    assert y.shape == x.shape
    assert (repair.steps, repair.repeated) == (1, 0)


def test_a_compiled_layer_is_compiled_once_more() -> None:
    layer, x = moe(LITTLE), batches(1)[0][0]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run, repair = torch.compile(layer, fullgraph=True, backend=counter), OverflowRepair(layer)
    for _ in range(2):
        y = repair(lambda: run(x))
    assert (repair.repeated, counter.frame_count) == (2, 2)
    assert relative_rms(y, moe("exact")(x)) < FP32
    torch._dynamo.reset()
