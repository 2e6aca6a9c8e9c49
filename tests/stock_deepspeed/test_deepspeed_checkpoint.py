"""Save and load through the engine: bitwise, in the middle of a record window too, and upstream's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_jobs import BF16, COPIED, WITHOUT, batches, config_of, difference, engine_of, launch, model_of, train, whole

pytestmark = WITHOUT
STEPS, SAVED, EVERY = 7, 4, 3  # windows of steps 1 to 3, 4 to 6: the second is open when it is saved
ENGINES: dict[str, tuple[int, dict[str, Any], int | None]] = {
    "native zero 0": (0, {}, None),
    "native zero 2 bf16": (2, BF16, None),
    "native zero 3": (3, {}, None),
    "ep 2 zero 0": (0, {}, 2),
    "ep 2 zero 0 bf16": (0, BF16, 2),
    "ep 2 zero 1": (1, {}, 2),
    "ep 1 zero 2 bf16": (2, BF16, 1),
    "ep 2 BF16_Optimizer": (1, COPIED, 2),
}


def state(engine: Any) -> dict[str, Any]:
    record = engine.module.layer.record
    return {
        "weights": whole(engine.module),
        "events": [str(event) for event in engine.events],
        "tokens": int(record.tokens),
        "counts": record.counts.tolist(),
        "steps": engine.controller.steps,
    }


def resumed(rank: int, folder: str) -> dict[str, Any]:
    found = {}
    for name, (stage, options, ep_size) in ENGINES.items():
        data, config = batches(rank, STEPS), config_of(stage, {"schedule": EVERY}, **options)
        where = f"{folder}/{name}"

        def fresh(config: Any = config, ep_size: Any = ep_size) -> Any:
            return engine_of(model_of(ep_size=ep_size, residual=ep_size == 1), config)

        engine = fresh()
        train(engine, data[:SAVED])
        engine.save_checkpoint(where, client_state={"mine": rank}, tag="middle")
        saved = state(engine)
        train(engine, data[SAVED:])
        other = fresh()
        train(other, batches(rank, 1, seed=9))  # so that it has optimizer state, and other weights, to begin with
        _, client_state = other.load_checkpoint(where)
        loaded = state(other)
        train(other, data[SAVED:])
        found[name] = {"saved": saved, "loaded": loaded, "whole": state(engine), "resumed": state(other)}
        found[name]["client state"] = {k: client_state.get(k) for k in ("mine", "dynmoe_tutel")}
    return found


def by_hand(rank: int, folder: str) -> dict[str, Any]:
    """A window of the flags, saved while it is open; and one process's sums of the records of three ranks."""
    data, config = batches(rank, 3), config_of(2)
    flags: list[dict[str, bool]] = [{"if_begin_record_routing": True}, {}, {"if_end_record_routing": True}]
    ends = []
    for interrupted in (False, True):
        engine = engine_of(model_of(ep_size=2), config)
        for number, (batch, flag) in enumerate(zip(data, flags, strict=True)):
            if interrupted and number == 2:
                engine.save_checkpoint(f"{folder}/flags")
                engine = engine_of(model_of(ep_size=2), config)
                engine.load_checkpoint(f"{folder}/flags")
            train(engine, [batch], **flag)
        ends.append(state(engine))
    engine = engine_of(model_of(), config_of(0, {"schedule": 3}))
    train(engine, data[:1])
    kept = engine._state()
    own, tokens = engine.module.layer.record, []
    for records in (kept["records"], [*kept["records"], kept["records"][0]]):
        engine._resume({**kept, "records": records})
        total = own.tokens.clone()
        dist.all_reduce(total)
        tokens.append((int(own.tokens), int(total)))
    return {"ends": ends, "tokens": tokens}


def upstreams(rank: int, folder: str) -> dict[str, Any]:
    """Checkpoints as DynMoE's own DeepSpeed writes them: the mask by its name, no client state, no fp32 copies here."""
    engine = engine_of(model_of(ep_size=2), config_of(1, {"schedule": 1}, **BF16))
    train(engine, batches(rank, 2))
    engine.save_checkpoint(f"{folder}/upstream", tag="step")
    main = Path(folder, "upstream", "step", "mp_rank_00_model_states.pt")
    if rank == 0:
        saved = torch.load(main, weights_only=False)
        del saved["dynmoe_tutel"]
        stem = "moe.deepspeed_moe.gate.wg."
        saved["module"][f"{stem}experts_mask"] = saved["module"].pop(f"{stem}active").float()
        torch.save(saved, main)
    dist.barrier()
    found = {"names": sorted(path.name for path in main.parent.iterdir())}
    for how in ({"load_optimizer_states": False}, {"load_module_only": True}):
        other = engine_of(model_of(ep_size=2), config_of(1, {"schedule": 1}, **BF16))
        before = whole(other.module)
        other.load_checkpoint(f"{folder}/upstream", **how)
        found[next(iter(how))] = {
            "off": difference(whole(other.module), whole(engine.module)),
            "before": difference(before, whole(engine.module)),
            "experts": other.module.layer.num_global_experts,
            "same": other.module.layer.num_global_experts == engine.module.layer.num_global_experts,
            "loss": train(other, batches(rank, 1, seed=3)),
            "steps": other.controller.steps,
        }
    return found


def all_of(rank: int, folder: str) -> dict[str, Any]:
    return {job.__name__: job(rank, folder) for job in (resumed, by_hand, upstreams)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return launch(all_of, folder, 2, str(folder))


@pytest.mark.parametrize("name", ENGINES)
def test_a_resumed_run_is_bitwise_the_whole_one(results: list[dict[str, Any]], name: str) -> None:
    for rank, result in enumerate(results):
        found = result["resumed"][name]
        for first, second in (("saved", "loaded"), ("whole", "resumed")):
            one, other = dict(found[first]), dict(found[second])
            assert difference(one.pop("weights"), other.pop("weights")) == 0, (first, second)
            assert one == other
        assert found["saved"]["tokens"] > 0, "no window was open"
        assert len(found["whole"]["events"]) == 2, "nothing grew from the window that was interrupted"
        mine = rank if "zero 3" in name else 0  # who wrote the file that the rank reads
        assert found["client state"] == {"mine": mine, "dynmoe_tutel": None}


def test_each_rank_keeps_its_record(results: list[dict[str, Any]]) -> None:
    first, second = (result["resumed"]["native zero 0"]["loaded"]["counts"] for result in results)
    assert first != second


def test_a_window_of_the_flags_is_resumed(results: list[dict[str, Any]]) -> None:
    for result in results:
        whole_run, interrupted = (dict(end) for end in result["by_hand"]["ends"])
        assert difference(whole_run.pop("weights"), interrupted.pop("weights")) == 0
        assert whole_run == interrupted
        assert len(whole_run["events"]) == 1


def test_another_number_of_ranks_resumes_the_sums(results: list[dict[str, Any]]) -> None:
    tokens = [result["by_hand"]["tokens"] for result in results]
    assert tokens[0] == [(24, 48), (72, 72)]
    assert tokens[1] == [(24, 48), (0, 72)]


def test_upstreams_checkpoints_load(results: list[dict[str, Any]]) -> None:
    for result in results:
        found = result["upstreams"]
        assert "layer_0_expert_3_mp_rank_00_model_states.pt" in found["names"]
        for how in ("load_optimizer_states", "load_module_only"):
            loaded = found[how]
            assert loaded["off"] == 0 < loaded["before"]
            assert loaded["same"]
            assert loaded["experts"] > 2
            assert loaded["steps"] == 1, "the adaptive process starts anew"
