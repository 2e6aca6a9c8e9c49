"""ExpertController: windows, updates, arguments, wrapped models, ranks; real layers, optimizers and processes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from controller_case import (
    SLOTS,
    D,
    Net,
    active_slots,
    assert_same,
    make_layer,
    near,
    recording_policy,
    slot_mask,
    train,
)
from helpers import GROUP_PATIENCE, spawn_ranks
from torch import Tensor, nn

from dynmoe_tutel.adaptive.controller import ExpertController, ExpertEvent, Schedule
from dynmoe_tutel.adaptive.policy import Decision, DynMoEPolicy

pytestmark = pytest.mark.usefixtures("seeded")


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
        """Batch sizes are powers of two, so the token count tells which forwards were recorded."""
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
        with caplog.at_level(logging.INFO, logger="dynmoe_tutel.adaptive.controller"):
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
        """Regression for upstream's defect D3: it pruned every silent expert, even the last one."""
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
        """Regression for upstream's defect D13: a zero sum became a NaN column of the gate."""
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
        controller.step()  # an empty window tells nothing about a slot
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
        timeout=GROUP_PATIENCE,
    )
    model = Net(experts=3)
    controller = ExpertController(model, None, 1, max_new_experts=2, init="fresh")
    for batches in ((near(0, 4, 5), near(0, 1)), (near(0, 1, 4), None)):
        if batches[rank] is not None:
            model(batches[rank])
        controller.step()
    torch.save({"model": model.state_dict(), "events": [str(e) for e in controller.events]}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_decide_as_one(tmp_path: Path) -> None:
    """Regression for upstream's defect D7: a rank without unrouted tokens skipped the reduction."""
    spawn_ranks(_rank, (2, str(tmp_path)), 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(ranks[0], ranks[1])
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
            ({"policy": "paper"}, "policy must be one of 'dynmoe', a dict .* or a callable .* got 'paper'"),
            ({"init": "copy"}, "init must be one of nearest, mean, fresh, keep, got 'copy'"),
            ({"schedule": {"every": 0}}, "schedule: every must be an integer of at least 1, got 0"),
            ({"schedule": 0}, "schedule: every must be an integer of at least 1, got 0"),
            ({"schedule": {"every": 2, "window": 3}}, r"schedule: window must be at most every \(2\), got 3"),
            ({"min_experts": 0}, "min_experts must be an integer of at least 1, got 0"),
            ({"min_experts": 7}, "min_experts must be at most the slots .* got 7 and mlp.gates.0 has 6"),
            ({"policy": DynMoEPolicy(min_experts=7)}, "got 7 and mlp.gates.0 has 6"),
            ({"policy": {"type": "dynmoe"}, "max_new_experts": 4}, "max_new_experts=4 configures policy 'dynmoe'"),
            ({"policy": {"type": "dynmoe", "most": 4}}, "unknown key 'most' in policy 'dynmoe'"),
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
            with pytest.raises(ValueError, match=r"MoELayer with an adaptive gate.*dynmoe_tutel.adaptive.Budgets"):
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


class TestWhatDoesNotLearn:
    """The first update says which layers or parameters the optimizer or the controller misses."""

    def messages(self, model: Net, optimizer: Any, caplog: pytest.LogCaptureFixture, change: Any = None) -> list[str]:
        controller = ExpertController(model, optimizer, 1)
        if change is not None:
            change()
        with caplog.at_level(logging.WARNING, "dynmoe_tutel"):
            for _ in range(2):
                train(model, None, controller, near(0, 1))
        return [record.getMessage() for record in caplog.records]

    def test_an_optimizer_made_before_the_layer(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters())
        model.mlp = make_layer()
        for part, message in zip(("experts", "gates.0"), self.messages(model, [optimizer], caplog), strict=True):
            assert f"none of the parameters of mlp.{part}: they do not learn" in message

    def test_new_experts_after_the_optimizer(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters())
        model.mlp.experts.load_state_dict(make_layer().experts.state_dict(), assign=True)
        (message,) = self.messages(model, optimizer, caplog)
        assert "mlp.experts" in message

    def test_a_layer_that_was_replaced(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters())
        (message,) = self.messages(model, optimizer, caplog, lambda: setattr(model, "mlp", make_layer()))
        assert message.startswith("mlp was replaced in the model after the controller was made")

    @pytest.mark.parametrize("how", ["all", "frozen", "one by one", "added later", "copies"])
    def test_what_is_meant_is_not_reported(self, how: str, caplog: pytest.LogCaptureFixture) -> None:
        model, change = Net(), None
        optimizer: Any = torch.optim.AdamW(model.parameters())
        if how == "frozen":
            model.mlp.requires_grad_(False)
            optimizer = torch.optim.AdamW(model.head.parameters())
        elif how == "one by one":
            optimizer = [torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()]
        elif how == "added later":
            optimizer = torch.optim.AdamW(model.head.parameters())
            change = lambda: optimizer.add_param_group({"params": model.mlp.parameters()})  # noqa: E731
        elif how == "copies":
            optimizer = torch.optim.AdamW([parameter.detach().clone() for parameter in model.parameters()])
        assert self.messages(model, optimizer, caplog, change) == []
