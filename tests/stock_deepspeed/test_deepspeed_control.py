"""When the engine records and updates: upstream's flags, its schedule, and what does not count; and what is refused."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_jobs import BF16, TOKENS, WITHOUT, Model, batches, config_of, engine_of, launch, model_of, train
from torch import Tensor

pytestmark = WITHOUT
BEGIN, END = {"if_begin_record_routing": True}, {"if_end_record_routing": True}
WORLD = 2


class Knowing(Model):
    """A model that hands the flags to its layer."""

    def forward(  # type: ignore[override]
        self, x: Tensor, target: Tensor, if_begin_record_routing: bool = False, if_end_record_routing: bool = False
    ) -> Tensor:
        hidden = self.inner(x)
        for _ in range(2):  # the second call must not lose what the first has recorded
            y, l_aux, _ = self.moe(hidden, None, if_begin_record_routing, if_end_record_routing=if_end_record_routing)
            hidden = hidden + y
        return self.outer(hidden).square().mean() + 0.01 * l_aux


class Deciding(Knowing):
    """A model that makes its own flags."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, target, True, True)


def seen(engine: Any) -> list[tuple[int, int]]:
    """Step and window tokens of each growth."""
    return [(event.step, int(re.search(r"of (\d+) tokens", event.reason)[1])) for event in engine.events]  # type: ignore[index]


def flags(rank: int) -> dict[str, Any]:
    from dynmoe_tutel.deepspeed.engine import SCHEDULE

    found: dict[str, Any] = {}
    data = batches(rank, 4)
    engine = engine_of(model_of(), config_of())
    found["built in"] = engine.controller.schedule == SCHEDULE
    found["schedule"] = [step for step in range(2500) if SCHEDULE.updates_at(step)]
    found["begins"] = [step for step in range(2500) if SCHEDULE.opens_at(step)]
    train(engine, data[:1])
    found["before"] = engine.module.moe.record_routing
    train(engine, data[1:2], **BEGIN, **END)
    found["one forward"] = seen(engine)
    train(engine, data[2:3], **BEGIN)
    engine.eval()
    engine(*data[0])
    engine.train()
    with torch.no_grad():
        engine(*data[0])
    train(engine, data[2:3], if_begin_record_routing=False)
    train(engine, data[3:4], **END)
    train(engine, data[3:4])
    found["three steps"] = seen(engine)[1:]
    try:
        engine(*data[0], **END)
    except ValueError as error:
        found["no window"] = str(error)
    for recompute in (True, False):
        engine = engine_of(model_of(recompute=recompute), config_of(2, {"schedule": None}))
        train(engine, data[:1])
        train(engine, data[:1], **BEGIN, **END)
        found[f"recompute {recompute}"] = seen(engine)
    engine = engine_of(model_of(), config_of(1, {"schedule": 2}, gradient_accumulation_steps=2, **BF16))
    train(engine, data)
    found["accumulated"] = seen(engine)
    engine = engine_of(model_of(), config_of(0, {"schedule": None}, gradient_accumulation_steps=2))
    train(engine, data[:2], **BEGIN, **END)
    found["accumulated flags"] = seen(engine)
    for kind, given in ((Knowing, {**BEGIN, **END}), (Deciding, {})):
        torch.manual_seed(0)
        engine = engine_of(kind(ep_size=2), config_of(1))
        train(engine, data[:1], **given)
        found[kind.__name__] = seen(engine)
    return found


def refusals(rank: int) -> dict[str, str]:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    from dynmoe_tutel.deepspeed import initialize

    def adam(model: Any) -> Any:
        return torch.optim.Adam(model.parameters(), lr=0.01)

    def scheduled(model: Any) -> dict[str, Any]:
        optimizer = adam(model)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    parallel = SimpleNamespace(get_model_parallel_world_size=lambda: 2)
    moe, native = model_of(ep_size=1), model_of()
    calls: dict[str, dict[str, Any]] = {
        "zero 3": {"model": moe, "config": config_of(3), "optimizer": adam(moe)},
        "autotp": {"model": native, "config": config_of(tensor_parallel={"autotp_size": 2}), "optimizer": adam(native)},
        "mpu": {"model": native, "config": config_of(), "mpu": parallel, "optimizer": adam(native)},
        "pipeline": {"model": PipelineModule([native.inner, native.moe], num_stages=1), "config": config_of()},
        "lr_scheduler": {"model": moe, "config": config_of(1), **scheduled(moe)},
    }
    found = {}
    for name, call in calls.items():
        try:
            initialize(**call)
        except ValueError as error:
            found[name] = str(error)
    del deepspeed
    return found


def groups(rank: int) -> dict[str, Any]:
    """Optimizers without groups for experts, given in every way."""
    from dynmoe_tutel.deepspeed import initialize

    def parts(model: Any) -> list[dict[str, Any]]:
        own = {id(p) for p in model.inner.parameters()}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        return [
            {"params": list(model.inner.parameters()), "lr": 0.02},
            {"params": rest, "lr": 0.01, "weight_decay": 0.1},
        ]

    found = {}
    in_config = {"optimizer": {"type": "AdamW", "params": {"lr": 0.03, "torch_adam": True}}}
    for name in ("client", "callable", "config", "decayed"):
        model = model_of(ep_size=2)
        call: dict[str, Any] = {"config": config_of(2)}
        if name == "client":
            call["optimizer"] = torch.optim.AdamW(parts(model))
        elif name == "callable":
            call |= {"optimizer": torch.optim.AdamW, "model_parameters": parts(model)}
        elif name == "config":
            call = {"config": config_of(2, **in_config), "model_parameters": parts(model)}
        else:
            call["optimizer"] = torch.optim.AdamW(parts(model))
            call["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        engine, _, _, _ = initialize(model=model, **call)
        train(engine, batches(rank, 1))
        found[name] = [
            (group["lr"], group["weight_decay"], bool(group.get("moe"))) for group in engine.optimizer.param_groups
        ]
    return found


def silent(rank: int) -> list[str]:
    """Trainings in which the second rank's tokens reach no expert; a hang would be a failure."""
    done = []
    for stage in (0, 1, 2):
        for ep_size in (1, 2):
            model = model_of(ep_size=ep_size)
            torch.nn.init.zeros_(model.inner.bias)
            engine = engine_of(model, config_of(stage, {"schedule": 1}))
            x, target = batches(rank, 1)[0]
            train(engine, [(x * (rank == 0), target)] * 2)
            if rank == 1 and engine.module.layer.record.tokens:
                raise AssertionError("a window is open that should have been used")
            done.append(f"{stage} {ep_size}: {[event.slot for event in engine.events]}")
    return done


def all_of(rank: int) -> dict[str, Any]:
    jobs = {"flags": flags, "refusals": refusals, "groups": groups, "silent": silent}
    return {name: job(rank) for name, job in jobs.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(all_of, tmp_path_factory.mktemp("control"))


@pytest.fixture
def found(results: list[dict[str, Any]]) -> dict[str, Any]:
    first, second = (result["flags"] for result in results)
    assert first == second
    return first


def test_the_built_in_schedule_is_upstreams(found: dict[str, Any]) -> None:
    assert found["built in"]
    assert (found["begins"], found["schedule"]) == ([300, 1200, 2100], [600, 1500, 2400])
    assert not found["before"]


def test_flags_of_one_forward_record_that_forward_of_all_ranks(found: dict[str, Any]) -> None:
    assert found["one forward"] == [(2, WORLD * TOKENS)]


def test_a_window_goes_over_steps_and_counts_no_eval(found: dict[str, Any]) -> None:
    assert found["three steps"] == [(5, 3 * WORLD * TOKENS)]


def test_an_end_needs_a_window(found: dict[str, Any]) -> None:
    assert "no record window is open" in found["no window"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recompute_is_not_recorded(found: dict[str, Any], reentrant: bool) -> None:
    assert found[f"recompute {reentrant}"] == [(2, WORLD * TOKENS)]


def test_steps_count_not_micro_batches(found: dict[str, Any]) -> None:
    assert found["accumulated"] == [(2, 4 * WORLD * TOKENS)]
    assert found["accumulated flags"] == [(1, 2 * WORLD * TOKENS)]


@pytest.mark.parametrize("kind", ["Knowing", "Deciding"])
def test_models_may_hand_flags_to_their_layers(found: dict[str, Any], kind: str) -> None:
    assert found[kind] == [(1, 2 * WORLD * TOKENS)], "the layer is called twice"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero 3", r"moe is a deepspeed\.moe\.layer\.MoE, which ZeRO stage 3 does not train: choose stage 0, 1 or 2"),
        ("autotp", r"moe cannot be split by tensor parallelism over 2 ranks"),
        ("mpu", r"moe cannot be split by tensor parallelism over 2 ranks"),
        ("pipeline", r"PipelineModule"),
        ("lr_scheduler", r"give lr_scheduler as a function of the optimizer"),
    ],
)
def test_refused_by_name(results: list[dict[str, Any]], name: str, message: str) -> None:
    for result in results:
        assert re.search(message, result["refusals"][name])


def test_experts_get_groups_of_their_own(results: list[dict[str, Any]]) -> None:
    first, second = (0.02, 0.01, False), (0.01, 0.1, False)
    halved = [(0.01, 0.01, False), (0.005, 0.1, False), (0.005, 0.1, True)]
    for result in results:
        given = result["groups"]
        for name in ("client", "callable", "config"):
            assert given[name] == [first, second, (0.01, 0.1, True)], name
        assert given["decayed"] == halved, "the schedule reaches the experts"


def test_a_rank_without_assignments_does_not_hang(results: list[dict[str, Any]]) -> None:
    assert results[0]["silent"] == results[1]["silent"]
    assert len(results[0]["silent"]) == 6
