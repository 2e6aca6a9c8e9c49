"""ExpertController: schedule, optimizer surgery, events, resume; real layers, optimizers and processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import spawn_ranks
from torch import Tensor, nn

from dynmoe_tutel import moe
from dynmoe_tutel.controller import ExpertController, ExpertEvent, Schedule
from dynmoe_tutel.policy import Decision, DynMoEPolicy

D, H, SLOTS = 8, 6, 6


def make_layer(experts: int = 2, slots: int = SLOTS, gate: Any = None) -> Any:
    """A layer whose slot e answers to the axis e of the token space, with thresholds at cosine 0.5."""
    layer = moe.moe_layer(
        gate_type=gate or {"type": "top_any", "max_expert_num": slots},
        experts={
            "type": "ffn",
            "num_experts_per_device": experts,
            "hidden_size_per_expert": H,
            "activation_fn": torch.nn.functional.gelu,
        },
        model_dim=D,
    )
    with torch.no_grad():
        for each in layer.gates:
            if hasattr(each, "experts_mask"):
                each.sim_matrix.copy_(torch.eye(D)[:, : each.sim_matrix.shape[1]])
                each.gates.fill_(0.5)
    return layer


class Net(nn.Module):
    mlp: Any

    def __init__(self, **layer: Any) -> None:
        super().__init__()
        self.mlp = make_layer(**layer)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mlp(x))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These tensors are tiny: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def near(*axes: int, each: int = 4, sign: float = 1.0) -> Tensor:
    """`each` tokens around each of the axes, [each * len(axes), D], always the same ones."""
    generator = torch.Generator().manual_seed(len(axes) * 100 + sum(axes))
    noise = 0.05 * torch.randn(each * len(axes), D, generator=generator)
    return sign * (torch.eye(D)[list(axes)].repeat_interleave(each, 0) + noise)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, controller: ExpertController, *micro: Tensor
) -> list[ExpertEvent]:
    """One optimizer step over the micro-batches."""
    for x in micro:
        y = model(x)
        (y.float().square().mean() + 0.01 * _layer(model).l_aux).backward()
    if optimizer is not None:
        optimizer.step()
    events = controller.step()
    model.zero_grad()
    return events


def _layer(model: nn.Module) -> Any:
    return next(m for m in model.modules() if hasattr(m, "experts") and hasattr(m, "gates"))


def active_slots(layer: Any, gate: int = 0) -> list[int]:
    return layer.gates[gate].experts_mask.nonzero().flatten().tolist()


def slot_mask(name: str, parameter: Tensor, slots: list[int]) -> Tensor:
    """True at the entries of `slots`, by the shapes that the design fixes; nothing for other parameters."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    if name.endswith("sim_matrix"):
        mask[:, slots] = True
    elif "batched_fc" in name or name.endswith("gates.0.gates"):
        mask[slots] = True
    return mask


def recording_policy(seen: list[tuple[int, list[int]]]) -> Callable[..., Decision]:
    """A policy that changes nothing and notes (tokens, counts) of every window."""

    def note(record: Any, active: Tensor, free_slots: int, silent: list[int]) -> Decision:
        seen.append((int(record.tokens), record.counts.tolist()))
        return Decision()

    return note


class TestSchedule:
    @pytest.mark.parametrize(
        ("schedule", "windows"),
        [
            (Schedule(every=5), [(0, 5), (5, 10), (10, 15), (15, 20), (20, 25)]),
            (Schedule(every=5, window=5, stop=14), [(0, 5), (5, 10)]),
            (Schedule(every=5, window=2), [(3, 5), (8, 10), (13, 15), (18, 20)]),
            (Schedule(every=5, window=1, stop=10), [(4, 5), (9, 10)]),
            (Schedule(every=6, start=3), [(3, 9), (9, 15), (15, 21)]),  # before step 3 no whole window fits
            (Schedule(every=6, window=2, start=3), [(1, 3), (7, 9), (13, 15), (19, 21)]),
            (Schedule(every=9, window=3, start=6), [(3, 6), (12, 15)]),  # DynMoE-DeepSpeed's, in hundreds
            (Schedule(every=1), [(i, i + 1) for i in range(21)]),
            (Schedule(every=7, window=3, start=17), [(14, 17)]),
        ],
    )
    def test_windows_and_updates(self, schedule: Schedule, windows: list[tuple[int, int]]) -> None:
        opened = [first for first, _ in windows]
        closed = [last for _, last in windows if last <= 21]
        assert [s for s in range(21) if schedule.opens_at(s)] == opened
        assert [s for s in range(22) if schedule.updates_at(s)] == closed
        inside = {s for first, last in windows for s in range(first, last)}
        assert [s for s in range(21) if schedule.records_at(s)] == sorted(inside & set(range(21)))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"every": 0}, "every must be an integer of at least 1, got 0"),
            ({"every": -3}, "every must be an integer of at least 1, got -3"),
            ({"every": 2.5}, "every must be an integer of at least 1, got 2.5"),
            ({"every": True}, "every must be an integer of at least 1, got True"),
            ({"window": 0}, "window must be an integer of at least 1, got 0"),
            ({"start": -1}, "start must be an integer of at least 0, got -1"),
            ({"stop": 0}, "stop must be an integer of at least 1, got 0"),
            ({"every": 10, "window": 11}, r"window must be at most every \(10\), got 11"),
            ({"every": 10, "start": 5, "stop": 14}, "stop must be at least 15, the first update, got 14"),
        ],
    )
    def test_bad_values_are_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"schedule: {message}"):
            Schedule(**fields)

    def test_forms(self) -> None:
        assert Schedule.of(None) == Schedule()
        assert Schedule.of(7) == Schedule(every=7)
        assert Schedule.of({"every": 7, "window": 3}) == Schedule(every=7, window=3)
        with pytest.raises(ValueError, match="unknown key 'evry', allowed are every, window, start, stop"):
            Schedule.of({"evry": 7})
        with pytest.raises(ValueError, match=r"must be a Schedule, a dict, an int \(every\) or None, got '7'"):
            Schedule.of("7")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="every must be an integer of at least 1, got False"):
            Schedule.of(False)


class TestWindows:
    @pytest.mark.parametrize(
        ("schedule", "windows"),
        [
            ({"every": 4}, [1 + 2 + 4 + 8, 16 + 32 + 64 + 128]),
            ({"every": 4, "window": 2}, [4 + 8, 64 + 128]),
            ({"every": 4, "window": 1, "start": 2}, [2, 32]),
        ],
    )
    def test_a_window_holds_the_forwards_of_its_steps(self, schedule: dict[str, int], windows: list[int]) -> None:
        """Batch sizes are powers of two, so the number of tokens tells which forwards were recorded."""
        seen: list[tuple[int, list[int]]] = []
        model = Net()
        controller = ExpertController(model, None, schedule, recording_policy(seen))
        for step in range(8):
            train(model, None, controller, near(0, each=2**step))
        assert [tokens for tokens, _ in seen] == windows

    def test_gradient_accumulation_counts_once(self) -> None:
        seen: list[tuple[int, list[int]]] = []
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        controller = ExpertController(model, optimizer, {"every": 3, "window": 2}, recording_policy(seen))
        for _ in range(6):
            train(model, optimizer, controller, near(0, each=1), near(1, each=2), near(0, 1, each=4))
        assert controller.steps == 6
        assert seen == [(22, [10, 12, 0, 0, 0, 0])] * 2

    def test_eval_forwards_do_not_count(self) -> None:
        """Regression for upstream's defect D12: held-out data fed the records of the next update."""
        seen: list[tuple[int, list[int]]] = []
        model = Net()
        controller = ExpertController(model, None, 1, recording_policy(seen))
        train(model, None, controller, near(0))
        model.eval()
        model(near(1))
        model.train()
        train(model, None, controller, near(0))
        assert seen == [(4, [4, 0, 0, 0, 0, 0])] * 2

    def test_the_window_is_right_from_construction(self) -> None:
        model = Net()
        ExpertController(model, None, Schedule(every=4, window=4))
        assert model.mlp.record_routing
        ExpertController(model, None, Schedule(every=4, window=3))
        assert not model.mlp.record_routing

    def test_nothing_is_recorded_after_the_last_update(self) -> None:
        model = Net()
        controller = ExpertController(model, None, Schedule(every=2, stop=3))
        train(model, None, controller, near(0))
        assert model.mlp.record_routing
        train(model, None, controller, near(0))
        assert not model.mlp.record_routing


class TestUpdates:
    def test_events_say_what_happened_and_why(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Net(experts=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        controller = ExpertController(model, optimizer, 2)
        batch = torch.cat([near(0, each=90), near(1, each=18), near(4, each=12)])
        assert train(model, optimizer, controller, batch) == []
        with caplog.at_level(logging.INFO, logger="dynmoe_tutel.controller"):
            events = train(model, optimizer, controller, batch)
        assert events == [
            ExpertEvent(2, "mlp", 0, 2, "pruned", "no assignment in 240 tokens of the window", 2),
            ExpertEvent(2, "mlp", 0, 2, "grown", "24 of 240 tokens unrouted (10.0%)", 3),
        ]
        assert controller.events == events
        assert caplog.messages[0] == (
            "step 2: pruned expert 2 of mlp, now 2 active: no assignment in 240 tokens of the window"
        )
        assert active_slots(model.mlp) == [0, 1, 2]
        direction = model.mlp.gates[0].sim_matrix[:, 2]
        total = near(4, each=12).sum(0)
        torch.testing.assert_close(direction.detach(), total / total.norm())
        assert model.mlp.gates[0].gates[2] == 0
        assert model.mlp.num_global_experts == 3

    def test_an_empty_window_changes_nothing(self) -> None:
        """Regression for upstream's defect D3: an update without a forward left no expert."""
        model = Net(experts=3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        controller = ExpertController(model, None, 1, patience=1)
        assert [controller.step() for _ in range(3)] == [[], [], []]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert controller.state_dict()["values"]["gates"]["mlp.gates.0"]["silent_windows"] == [0] * SLOTS

    def test_a_layer_keeps_an_expert_when_all_are_silent(self) -> None:
        """Regression for upstream's defect D3: every silent expert was pruned, the last one too."""
        model = Net(experts=3)
        controller = ExpertController(model, None, 1)
        opposite = torch.cat([near(5), near(5, sign=-1)])
        events = train(model, None, controller, opposite)
        assert [(e.slot, e.action, e.experts) for e in events] == [(1, "pruned", 2), (2, "pruned", 1)]
        assert active_slots(model.mlp) == [0]
        assert model(near(0)).isfinite().all()

    def test_a_policy_cannot_take_the_last_expert(self) -> None:
        model = Net(experts=3)

        def prune_all(record: Any, active: Tensor, free_slots: int, silent: list[int]) -> Decision:
            return Decision([(slot, "on a whim") for slot in active.nonzero().flatten().tolist()])

        controller = ExpertController(model, None, 1, prune_all)
        for _ in range(3):
            train(model, None, controller, near(0, 1, 2))
            assert len(active_slots(model.mlp)) >= 1
        assert controller.events[-1].experts == len(active_slots(model.mlp))

    def test_opposite_unrouted_tokens_cancel(self) -> None:
        """Regression for upstream's defect D13: the zero sum became a NaN column of the gate."""
        model = Net()
        controller = ExpertController(model, None, 1)
        events = train(model, None, controller, torch.cat([near(0, 1), near(5), near(5, sign=-1)]))
        assert events == []
        assert active_slots(model.mlp) == [0, 1]
        assert all(p.isfinite().all() for p in model.parameters())

    def test_min_experts(self) -> None:
        model = Net(experts=4)
        controller = ExpertController(model, None, 1, min_experts=3)
        events = train(model, None, controller, near(3))
        assert [(e.slot, e.action) for e in events] == [(2, "pruned")]
        assert train(model, None, controller, near(3)) == []
        assert active_slots(model.mlp) == [0, 1, 3]

    def test_patience_needs_consecutive_silent_windows(self) -> None:
        model = Net(experts=2)
        controller = ExpertController(model, None, 1, patience=2)
        silent, busy = near(0), near(0, 1)
        assert [train(model, None, controller, x) for x in (silent, busy, silent)] == [[], [], []]
        controller.step()  # an empty window says nothing about a slot
        [event] = train(model, None, controller, silent)
        assert (event.slot, event.action) == (1, "pruned")
        assert event.reason == "no assignment in 4 tokens of the window, nor in the 1 before"

    def test_a_grown_expert_starts_its_patience_anew(self) -> None:
        model = Net(experts=2)
        controller = ExpertController(model, None, 1, patience=2)
        train(model, None, controller, near(0))
        events = train(model, None, controller, near(0, 5))
        assert [(e.slot, e.action) for e in events] == [(1, "pruned"), (1, "grown")]
        assert train(model, None, controller, near(0)) == []
        assert [(e.slot, e.action) for e in train(model, None, controller, near(0))] == [(1, "pruned")]

    def test_several_experts_land_on_separate_clusters(self) -> None:
        model = Net(experts=1)
        controller = ExpertController(model, None, 2, max_new_experts=3)
        clusters = [near(axis, each=10 + axis) for axis in (3, 4, 5)]
        train(model, None, controller, near(0), *clusters[:1])
        events = train(model, None, controller, torch.cat(clusters[1:]))
        assert [(e.slot, e.action, e.experts) for e in events] == [
            (1, "grown", 2),
            (2, "grown", 3),
            (3, "grown", 4),
        ]
        for slot, tokens in zip((3, 2, 1), clusters, strict=True):  # the largest cluster takes the first slot
            routing = model.mlp.route(tokens)
            best = routing.scores.masked_fill(~routing.assigned, 0).argmax(1)
            assert best.tolist() == [slot] * len(tokens)
            assert not routing.unrouted.any()

    def test_every_adaptive_layer_is_found_and_decided_alone(self) -> None:
        first, second = make_layer(), make_layer()
        model = nn.Sequential(first, nn.Sequential(second), make_layer(gate={"type": "top", "k": 1}))
        controller = ExpertController(model, None, 1)
        first(near(0, 1, 4))
        second(near(0))
        events = controller.step()
        assert [(e.layer, e.slot, e.action) for e in events] == [("0", 2, "grown"), ("1.0", 1, "pruned")]

    def test_each_gate_of_a_list_has_its_own_record(self) -> None:
        gate = {"type": "top_any", "max_expert_num": SLOTS}
        layer = make_layer(gate=[gate, gate])
        controller = ExpertController(layer, None, 1)
        layer(near(0, 1, 4), gate_index=1)
        [event] = controller.step()
        assert (event.layer, event.gate, event.slot, event.action) == ("", 1, 2, "grown")
        assert str(event).startswith("step 1: grown expert 2 of the layer, gate 1, now 3 active")
        assert (active_slots(layer, 0), active_slots(layer, 1)) == ([0, 1], [0, 1, 2])

    def test_a_slot_that_another_gate_uses_is_not_free(self) -> None:
        gate = {"type": "top_any", "max_expert_num": SLOTS}
        layer = make_layer(gate=[gate, gate])
        layer.gates[1].experts_mask[2:5] = 1
        free: list[int] = []

        def note(record: Any, active: Tensor, free_slots: int, silent: list[int]) -> Decision:
            free.append(free_slots)
            return Decision()

        controller = ExpertController(layer, None, 1, note)
        layer(near(0), gate_index=0)
        layer(near(0), gate_index=1)
        controller.step()
        assert free == [1, 1]

    def test_a_network_that_another_gate_uses_is_left_alone(self) -> None:
        gate = {"type": "top_any", "max_expert_num": 3}
        layer = make_layer(gate=[gate, gate])
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
        controller = ExpertController(layer, optimizer, 1)
        with torch.no_grad():
            layer.gates[1].experts_mask[2] = 1  # slot 2 is free in gate 0 only
        for parameter in layer.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
        layer(near(0, 5), gate_index=0)
        layer(near(0, 1, 2), gate_index=1)
        changes = [(e.gate, e.slot, e.action, e.experts) for e in controller.step()]
        assert changes == [(0, 1, "pruned", 1)], "slots 1 and 2 belong to gate 1: none is free to grow into"
        for name, parameter in layer.named_parameters():
            zero = slot_mask(name, parameter, [1]) & name.startswith("gates.0")
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"] == 0, zero), name

    @pytest.mark.parametrize("init", ["nearest", "mean", "fresh", "keep"])
    def test_initial_weights_of_a_grown_expert(self, init: str) -> None:
        model = Net(experts=2)
        controller = ExpertController(model, None, 1, init=init, seed=3)
        weight = model.mlp.experts.batched_fc1_w
        before, state = weight.detach().clone(), torch.get_rng_state()
        lean = 0.4 * torch.eye(D)[1:2].repeat(8, 1) + near(4, each=8)  # unrouted, nearer to expert 1 than to 0
        train(model, None, controller, near(0, 1), lean)
        assert torch.equal(torch.get_rng_state(), state), "the global random state moved"
        grown = weight[2].detach()
        expected = {"nearest": before[1], "mean": before[:2].mean(0), "keep": before[2]}
        if init == "fresh":
            assert not any(torch.allclose(grown, old) for old in before)
            assert 0 < grown.abs().max() < 10
        else:
            torch.testing.assert_close(grown, expected[init])
        assert torch.equal(weight[[0, 1, 3]], before[[0, 1, 3]])

    def test_fresh_weights_come_from_the_seed(self) -> None:
        grown = []
        for seed in (3, 3, 4):
            torch.manual_seed(0)
            model = Net()
            train(model, None, ExpertController(model, None, 1, init="fresh", seed=seed), near(0, 1, 4))
            grown.append(model.mlp.experts.batched_fc1_w[2].detach())
        assert torch.equal(grown[0], grown[1])
        assert not torch.equal(grown[0], grown[2])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "sgd-nesterov-foreach": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.0),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.0, foreach=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.0, amsgrad=True, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.0),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.0, fused=True),
    "adamw-fused-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.0, amsgrad=True, fused=True),
}


class TestOptimizers:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_exactly_the_rows_of_changed_slots_go_to_zero(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        """Regression for upstream's defect D9: stale moments kept moving pruned experts and kicked grown ones."""
        model = Net(experts=3)
        optimizer = OPTIMIZERS[name](model.parameters())
        controller = ExpertController(model, optimizer, {"every": 2, "window": 1})
        batch = near(0, 1, 5)
        train(model, optimizer, controller, batch)
        for state in optimizer.state.values():
            for key, value in state.items():
                if key != "step":
                    value.fill_(7.0)
        model(batch).sum().backward()  # lr is 0: the step below changes moments only, of active slots
        reference = {id(p): dict(optimizer.state[p]) for p in model.parameters()}
        optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
        model.zero_grad()
        events = train(model, optimizer, controller, batch)
        assert [(e.slot, e.action) for e in events] == [(2, "pruned"), (2, "grown")]
        touched = 0
        for parameter_name, parameter in model.named_parameters():
            expected_zero = slot_mask(parameter_name, parameter, [2])
            assert set(optimizer.state[parameter]) == set(reference[id(parameter)])
            for key, value in optimizer.state[parameter].items():
                if key == "step":
                    assert float(value) == 1
                    continue
                touched += int(expected_zero.any())
                assert torch.equal(value == 0, expected_zero), f"{key} of {parameter_name}"
                assert (value[~expected_zero] == 7).all(), f"{key} of {parameter_name}"
        assert touched >= 6
        assert caplog.messages == []

    def test_a_pruned_slot_that_stays_free_is_reset_too(self) -> None:
        model = Net(experts=3)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        controller = ExpertController(model, optimizer, 2)
        train(model, optimizer, controller, near(0, 1, 2))
        train(model, optimizer, controller, near(0, 1, 2))
        train(model, optimizer, controller, near(0, 1))
        parameter = model.mlp.experts.batched_fc1_w
        assert optimizer.state[parameter]["exp_avg"][2].abs().sum() > 0
        assert [e.action for e in train(model, optimizer, controller, near(0, 1))] == ["pruned"]
        assert optimizer.state[parameter]["exp_avg"][2].abs().sum() == 0
        assert optimizer.state[parameter]["exp_avg"][1].abs().sum() > 0
        frozen = parameter[2].detach().clone()
        for _ in range(3):
            train(model, optimizer, controller, near(0, 1))
        assert torch.equal(parameter[2], frozen)

    def test_optimizers_in_a_list_share_the_model(self) -> None:
        model = Net(experts=3)
        gate, rest = list(model.mlp.gates.parameters()), list(model.mlp.experts.parameters())
        both = [torch.optim.SGD(gate, lr=0.0, momentum=0.9), torch.optim.AdamW(rest, lr=0.0)]
        controller = ExpertController(model, both, 1)
        model.mlp(near(0, 1, 2)).sum().backward()
        model.mlp.l_aux.backward()
        for optimizer in both:
            optimizer.step()
        controller.step()
        model.mlp(near(0, 1)).sum().backward()
        assert [e.action for e in controller.step()] == ["pruned"]
        assert both[0].state[gate[0]]["momentum_buffer"][:, 2].abs().sum() == 0
        assert both[0].state[gate[0]]["momentum_buffer"][:, :2].abs().sum() > 0
        for parameter in rest:
            moments = both[1].state[parameter]["exp_avg_sq"]
            assert moments[2].abs().sum() == 0
            assert moments[:2].abs().sum() > 0
        assert not any(parameter in both[0].state for parameter in rest), "an empty state entry was made"

    def test_master_copies_take_the_new_value(self) -> None:
        """Regression for upstream's defect S5: a grown expert was overwritten from its stale master copy."""
        model = Net(experts=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        controller = ExpertController(model, optimizer, 1)
        for parameter in model.parameters():
            optimizer.state[parameter]["master_param"] = parameter.detach().double() + 1
        before = {name: p.detach().double() for name, p in model.named_parameters()}
        assert [e.slot for e in train(model, optimizer, controller, near(0, 1, 5))] == [2]
        for name, parameter in model.named_parameters():
            mask = slot_mask(name, parameter, [2])
            expected = torch.where(mask, parameter.detach().double(), before[name] + 1)
            assert torch.equal(optimizer.state[parameter]["master_param"], expected), name

    def test_state_of_another_shape_is_left_alone_with_one_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Net(experts=2)
        optimizer = torch.optim.Adafactor(model.parameters(), lr=0.0)
        controller = ExpertController(model, optimizer, 1)
        train(model, optimizer, controller, near(0, 1))
        for axis in (5, 4):
            train(model, optimizer, controller, near(0, 1, 2, axis))
        about_fc1 = [m for m in caplog.messages if f"{(SLOTS, H, D)}" in m and "row_var" in m]
        assert len(about_fc1) == 1

    def test_averages_and_copies_take_the_new_value_and_unknown_state_is_warned_of(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Of SGD's average and of schedule-free optimizers' z, zero would be a weight."""
        model = Net(experts=2)
        optimizer = torch.optim.ASGD(model.parameters(), lr=1e-3)
        controller = ExpertController(model, optimizer, 1)
        train(model, optimizer, controller, near(0, 1))
        for parameter in model.parameters():
            optimizer.state[parameter] |= {"z": parameter.detach() + 1, "curvature": torch.ones_like(parameter)}
        assert [e.slot for e in train(model, optimizer, controller, near(0, 1, 5))] == [2]
        for parameter in model.mlp.experts.parameters():
            state = optimizer.state[parameter]
            assert torch.equal(state["ax"][2], parameter[2])
            assert torch.equal(state["z"][2], parameter[2])
            assert not torch.equal(state["z"][1], parameter[1])
            assert not state["curvature"][2].any()
        assert [m for m in caplog.messages if "optimizer state 'curvature' is not known here" in m] == caplog.messages
        assert len(caplog.messages) == 1

    def test_no_optimizer_warns_once(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Net(experts=3)
        controller = ExpertController(model, None, 1)
        for _ in range(3):
            train(model, None, controller, near(0))
        assert [m for m in caplog.messages if "no optimizer given" in m] == caplog.messages
        assert len(caplog.messages) == 1
        caplog.clear()
        ExpertController(Net().requires_grad_(False), None, 1)
        assert caplog.messages == []


def _equal(a: Any, b: Any, path: str = "") -> None:
    """Bitwise equality of nested states, with the path of the first difference."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            _equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _equal(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def _resumable_run(directory: Path, start: int = 0, save_at: tuple[int, ...] = ()) -> dict[str, Any]:
    """Steps `start` to 38 on data whose clusters move; loads what an earlier run saved there, saves at `save_at`.

    A resumed run starts from other seeds than the first, so that whatever it does not load differs.
    """
    torch.manual_seed(start)
    model = Net(experts=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = {"every": 5, "window": 4}
    controller = ExpertController(model, optimizer, schedule, init="fresh", patience=2, max_new_experts=2, seed=start)
    if start:
        saved = torch.load(directory / f"{start}.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        values = json.loads((directory / f"{start}.json").read_text())
        controller.load_state_dict({"tensors": saved["tensors"], "values": values})
    for step in range(start, 38):
        if step in save_at:
            state = controller.state_dict()
            (directory / f"{step}.json").write_text(json.dumps(state["values"]))
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**states, "tensors": state["tensors"]}, directory / f"{step}.pt")
        phase = step // 8
        train(model, optimizer, controller, near(phase % D, (phase + 3) % D, (2 * phase + 1) % D, each=8))
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "controller": controller.state_dict(),
        "events": controller.events,
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run")
    return directory, _resumable_run(directory, save_at=(11, 15, 18))


class TestResume:
    # 11: a window has just opened; 15: after an update, before the next window; 18: in the middle of a window
    @pytest.mark.parametrize("save_at", [11, 15, 18])
    def test_twenty_steps_after_a_resume_are_bitwise_equal(
        self, uninterrupted: tuple[Path, dict[str, Any]], save_at: int
    ) -> None:
        directory, whole = uninterrupted
        resumed = _resumable_run(directory, start=save_at)
        late = {event.action for event in resumed["events"] if event.step > 18}
        assert late == {"grown", "pruned"}, "the resumed part must have something to get wrong"
        _equal(whole, resumed)

    def test_state_is_a_copy_of_plain_values_and_tensors(self) -> None:
        model = Net()
        controller = ExpertController(model, None, 3, max_new_experts=2)
        train(model, None, controller, near(0, 1, 5))
        state = controller.state_dict()
        assert json.loads(json.dumps(state["values"])) == state["values"]
        assert all(type(value) is Tensor for value in state["tensors"].values())
        assert int(state["tensors"]["mlp.gates.0:tokens"]) == 12
        train(model, None, controller, near(0, 1, 5))
        assert int(state["tensors"]["mlp.gates.0:tokens"]) == 12
        assert state["values"]["step"] == 1
        assert state["values"]["window_open"] is True

    def test_safetensors_holds_the_tensors(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        model = Net()
        controller = ExpertController(model, None, 3, max_new_experts=2)
        train(model, None, controller, near(0, 1, 5))
        state = controller.state_dict()
        safetensors.save_file(state["tensors"], tmp_path / "controller.safetensors")
        _equal(safetensors.load_file(tmp_path / "controller.safetensors"), state["tensors"])

    def test_a_loaded_schedule_change_drops_a_window_it_does_not_know(self) -> None:
        first = ExpertController(Net(), None, 4)
        state = first.state_dict()
        assert state["values"]["window_open"]
        model = Net()
        second = ExpertController(model, None, {"every": 4, "window": 1})
        second.load_state_dict(state)
        assert not model.mlp.record_routing
        train(model, None, second, near(0))
        assert not model.mlp.record_routing

    def test_an_update_whose_window_was_never_open_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        first = ExpertController(Net(), None, {"every": 4, "window": 1})
        model = Net()
        second = ExpertController(model, None, 4)
        second.load_state_dict(first.state_dict())
        assert [train(model, None, second, near(0)) for _ in range(4)] == [[]] * 4
        assert "step 4: no update, the state loaded had no window open for it" in caplog.messages
        assert model.mlp.record_routing

    def test_a_state_that_does_not_fit_is_refused_by_name(self) -> None:
        model = Net()
        controller = ExpertController(model, None, 3)
        state = controller.state_dict()

        def changed(**values: Any) -> dict[str, Any]:
            return {"tensors": state["tensors"], "values": {**state["values"], **values}}

        def of_gate(**values: Any) -> dict[str, Any]:
            return changed(gates={"mlp.gates.0": {**state["values"]["gates"]["mlp.gates.0"], **values}})

        cases: list[tuple[Any, str]] = [
            (None, "'tensors' and 'values'"),
            ({"values": {}}, "'tensors' and 'values'"),
            ({"tensors": {}, "values": {"step": 1}}, "state lacks events, gates, version, window_open"),
            ({**state, "tensors": {}}, "state lacks the tensor generator"),
            (changed(version=99), "state has version 99, this package reads 1"),
            (changed(events=[{"step": 1}]), "state has events or a generator that cannot be read"),
            (
                {**state, "tensors": {**state["tensors"], "generator": torch.zeros(3, dtype=torch.uint8)}},
                "state has events or a generator that cannot be read",
            ),
            (changed(gates={"mlp.gates.0": {}}), "state of mlp.gates.0 lacks silent_windows or record"),
            (changed(gates={}), r"only the model has \['mlp.gates.0'\]"),
            (
                changed(gates={**state["values"]["gates"], "other.gates.0": {}}),
                r"only it has \['other.gates.0'\]",
            ),
            (
                {**state, "tensors": {**state["tensors"], "mlp.gates.0:unrouted_sum": torch.zeros(D + 1)}},
                r"mlp.gates.0: the record to load has unrouted_sum of shape \[9\], this layer \[8\]",
            ),
            (
                ExpertController(Net(slots=5), None, 3).state_dict(),
                "mlp.gates.0 has 5 slots in silent_windows, the layer has 6",
            ),
            ({"tensors": None, "values": None}, "'tensors' and 'values'"),
            (changed(step="3"), "state has step '3', must be an integer of at least 0"),
            (changed(step=-1), "state has step -1"),
            ({**state, "tensors": {**state["tensors"], "generator": 3}}, "a generator that cannot be read"),
            ({**state, "tensors": {**state["tensors"], "mlp.gates.0:counts": 3}}, "has no tensor 'counts'"),
            (of_gate(load=[1]), "mlp.gates.0 has 1 slots in load, the layer has 6"),
            (of_gate(silent_windows=["a"] * 6), "has silent_windows .* must be integers of at least 0"),
            (
                {**state, "tensors": {"generator": state["tensors"]["generator"]}},
                "state of mlp.gates.0 lacks counts of its record",
            ),
        ]
        before = controller.state_dict()
        for wrong, message in cases:
            with pytest.raises(ValueError, match=message):
                controller.load_state_dict(wrong)
            _equal(controller.state_dict(), before)


class TestWrappers:
    def test_names_and_state_move_between_wrappers(self, tmp_path: Path) -> None:
        plain = ExpertController(Net(), None, 2)
        compiled_model = torch.compile(Net(), backend="eager")
        inner = Net()
        inner.mlp = torch.compile(inner.mlp, backend="eager")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            ddp = nn.parallel.DistributedDataParallel(Net())
            wrapped: list[Any] = [compiled_model, inner, ddp, torch.compile(ddp, backend="eager")]
            wrapped.append(nn.DataParallel(ddp))
            for model in wrapped:
                controller = ExpertController(model, None, 2)
                assert controller.state_dict()["values"] == plain.state_dict()["values"]
                controller.load_state_dict(plain.state_dict())
                plain.load_state_dict(controller.state_dict())
        finally:
            dist.destroy_process_group()

    def test_a_wrapped_model_trains_and_grows(self, tmp_path: Path) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(Net(), find_unused_parameters=True)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            controller = ExpertController(model, optimizer, 2)
            for _ in range(4):
                train(model, optimizer, controller, near(0, 1, 5))
        finally:
            dist.destroy_process_group()
        assert [(e.step, e.layer, e.slot, e.action) for e in controller.events] == [(2, "mlp", 2, "grown")]


def _rank(rank: int, world: int, directory: str) -> None:
    """One data-parallel rank: rank 1 sees no unrouted token in window 1, no token in window 2."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    model = Net(experts=3)
    controller = ExpertController(model, None, 1, max_new_experts=2, init="fresh")
    for batches in ((near(0, 4, 5), near(0, 1)), (near(0, 1, 4), None)):
        if batches[rank] is not None:
            model(batches[rank])
        controller.step()
    torch.save({"model": model.state_dict(), "events": [str(e) for e in controller.events]}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_decide_as_one(tmp_path: Path) -> None:
    """Regression for upstream's defect D7: a rank without unrouted tokens stayed away from the reduction."""
    spawn_ranks(_rank, (2, str(tmp_path)), 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    _equal(ranks[0], ranks[1])
    torch.manual_seed(0)
    model = Net(experts=3)
    controller = ExpertController(model, None, 1, max_new_experts=2, init="fresh")
    for batch in (torch.cat([near(0, 4, 5), near(0, 1)]), near(0, 1, 4)):
        model(batch)
        controller.step()
    assert [str(e) for e in controller.events] == ranks[0]["events"]
    assert [e.action for e in controller.events] == ["pruned", "grown", "grown", "pruned"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ranks[0]["model"][name], value, msg=name)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"policy": "paper"}, "policy must be 'dynmoe' or a callable .* got 'paper'"),
            ({"init": "copy"}, "init must be one of nearest, mean, fresh, keep, got 'copy'"),
            ({"schedule": {"every": 0}}, "schedule: every must be an integer of at least 1, got 0"),
            ({"schedule": 0}, "schedule: every must be an integer of at least 1, got 0"),
            ({"schedule": {"every": 2, "window": 3}}, r"schedule: window must be at most every \(2\), got 3"),
            ({"min_experts": 0}, "min_experts must be an integer of at least 1, got 0"),
            ({"min_experts": 7}, "min_experts must be at most the slots .* got 7 and mlp.gates.0 has 6"),
            ({"policy": DynMoEPolicy(min_experts=7)}, "got 7 and mlp.gates.0 has 6"),
            ({"max_new_experts": -1}, "max_new_experts must be an integer of at least 1, got -1"),
            ({"patience": 0}, "patience must be an integer of at least 1, got 0"),
            ({"policy": DynMoEPolicy(), "patience": 2}, "patience=2 configures policy 'dynmoe'"),
            ({"seed": None}, r"seed must be an integer below 2\*\*63, got None"),
            ({"seed": 2**70}, r"seed must be an integer below 2\*\*63"),
            ({"group": 3}, "group must be a process group of torch.distributed or None, got 3"),
            ({"optimizer": "adam"}, "optimizer must be a torch optimizer, a list of them or None"),
            ({"optimizer": [3]}, "optimizer must be a torch optimizer, a list of them or None, got 3"),
        ],
    )
    def test_bad_arguments_are_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ExpertController(Net(), **arguments)

    def test_a_model_without_adaptive_layers_is_refused(self) -> None:
        for model in (nn.Linear(2, 2), make_layer(gate={"type": "top", "k": 1})):
            with pytest.raises(ValueError, match="model must have a MoELayer with an adaptive gate"):
                ExpertController(model)
        with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got 3"):
            ExpertController(3)  # type: ignore[arg-type]

    def test_a_policy_that_clusters_gets_tokens_to_cluster(self) -> None:
        model = Net(experts=1)
        controller = ExpertController(model, None, 1, DynMoEPolicy(max_new_experts=2))
        events = train(model, None, controller, near(0, 4, 5))
        assert [e.action for e in events] == ["grown", "grown"]

    def test_the_decision_of_a_policy_is_checked(self) -> None:
        def wrong(record: Any, active: Tensor, free_slots: int, silent: list[int]) -> Decision:
            return Decision([(0, "why not")], [(torch.full((D,), torch.nan), "why not")])

        model = Net()
        controller = ExpertController(model, None, 1, wrong)
        with pytest.raises(ValueError, match=r"policy: the decision for mlp.gates.0 .* norm nan"):
            train(model, None, controller, near(0, 1))
        assert active_slots(model.mlp) == [0, 1]
        assert controller.events == []

    def test_a_refused_decision_changes_no_layer(self) -> None:
        answers = [Decision([(1, "why not")]), Decision([(9, "why not")])]
        first, second = make_layer(), make_layer()
        controller = ExpertController(nn.Sequential(first, second), None, 1, lambda *_: answers.pop(0))
        first(near(0, 1))
        second(near(0, 1))
        with pytest.raises(ValueError, match=r"decision for 1.gates.0 prunes slot 9"):
            controller.step()
        assert active_slots(first) == [0, 1]
