"""Controller, rebalance and checkpoints on 4, 2 and 1 real processes: one start, one process group per number.

The processes report and the test compares: equal to one process, the same on every rank, bitwise after a resume.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import GROUP_PATIENCE, spawn_ranks
from torch.distributed.fsdp import fully_shard
from training import EVERY, SLOTS, STEPS, Job, Net, gathered, global_batch, same

from dynmoe_tutel import ExpertController, MoELayer, parallel
from dynmoe_tutel.checkpoint import distributed

WORLDS = (4, 2, 1)
INITS = ("nearest", "mean", "fresh", "keep")
SAVED = 12  # in the middle of the second window
SAMPLED = {"max_new_experts": 2, "init": "mean"}


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            return
        store = f"file://{folder}/store-{world}"
        dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=GROUP_PATIENCE)
        try:
            torch.save(_report(Path(folder), world), f"{folder}/{world}-{rank}.pt")
        finally:
            dist.destroy_process_group()


def _report(folder: Path, world: int) -> dict[str, Any]:
    report: dict[str, Any] = {"trained": Job().train(STEPS).result()}
    for init in INITS:
        job = Job(init=init).train(EVERY)
        slot = job.controller.events[0].slot
        report[init] = slot, [gathered(p.detach()) for p in job.model.mlp.experts.parameters()]
    report["rebalanced"] = _rebalanced(folder, world)
    report["averages"] = _averages()
    report["checkpoints"] = _checkpoints(folder, world)
    if world == 2:
        report["refused"] = _refused_kinds()
    if world == 4:
        report["replicated"] = _replicated(folder)
    return report


def _rebalanced(folder: Path, world: int) -> dict[str, Any]:
    """Two jobs, of which one exchanges experts in the middle of a window and is resumed after that."""
    stays, moves = Job().train(SAVED), Job().train(SAVED)
    before = moves.result()["output"]
    report = moves.controller.rebalance(1.05)
    found = {"before": before, "after": moves.result()["output"], "text": str(report), "report": report}
    counts = [record_counts(job) for job in (stays, moves)]
    for move in report.layers[0].moves:
        assert counts[1][move.to_slot] == counts[0][move.slot]
    found["counts"] = [sorted(each) for each in counts]
    again = moves.controller.rebalance(report.layers[0].expected)
    moves.save(folder / f"rebalanced-{world}")
    resumed = Job()
    resumed.load(folder / f"rebalanced-{world}")
    loads = [[list(site.load) for site in job.controller._histories] for job in (moves, resumed)]
    found |= {"again": again.moves, "loads": loads}
    for job in (stays, moves, resumed):
        job.train(STEPS)
    return {
        **found,
        "stays": stays.result(),
        "moves": moves.result(),
        "resumed": same(moves.state(), resumed.state()),
    }


def _averages() -> dict[str, Any]:
    """What an average of the weights has after growth, and its outputs before and after experts change ranks."""
    job = Job().train(EVERY - 1)
    average = copy.deepcopy(job.model)
    torch._foreach_mul_([p.detach() for p in average.parameters()], 0.5)
    job.train(EVERY)
    slot, layers = job.controller.events[0].slot, (job.model.mlp, average.mlp)
    entries = [[t[index].clone() for t, index in layer.slot_parameters(slot)] for layer in layers]
    found = {"grown": len(entries[0]), "follows": same(*entries), "masks": [mask_of(layer) for layer in layers]}
    job.train(SAVED)
    x = global_batch(99).chunk(dist.get_world_size())[dist.get_rank()]
    before = gathered(average.eval()(x).detach())
    found["moved"] = job.controller.rebalance(1.05).moves
    return {**found, "before": before, "after": gathered(average(x).detach())}


def mask_of(layer: MoELayer) -> list[float]:
    mask: list[float] = layer.gates[0].experts_mask.tolist()  # type: ignore[operator]
    return mask


def record_counts(job: Job) -> list[int]:
    """Each slot's assignments in the window so far, over all ranks."""
    counts = job.model.mlp.record.counts.clone()
    dist.all_reduce(counts)
    return counts.tolist()


def _checkpoints(folder: Path, world: int) -> dict[str, Any]:
    """A save of 4 ranks, loaded on as many and on fewer; and states that do not fit."""
    found: dict[str, Any] = {}
    target = folder / f"step-{SAVED}"
    if world == 4:
        job = Job(**SAMPLED).train(SAVED)
        job.save(target)
        found["samples"] = int(job.controller._histories[0].record.unrouted_sample.shape[0])
        found["refused"] = [_refusal(lambda: job.save(target))]
        found["refused"].append(_refusal(lambda: distributed.save(folder / "x", job.model, extra=_refusal)))
        found["written"] = sorted(path.name for path in folder.iterdir() if "x" in path.name)
        whole = job.train(STEPS)
        found["whole"], state = whole.result(), whole.state()
    resumed = Job(**SAMPLED, seed=5)
    restored = resumed.load(target)
    found["restored"] = (restored.extra, restored.rank_state, restored.ranks)
    found["window"] = resumed.result()["totals"]
    found["resumed"] = resumed.train(STEPS).result()
    if world == 4:
        found["bitwise"] = same(resumed.state(), state)
        other = Net(None, slots=4)
        found["refused"].append(_refusal(lambda: distributed.load(target, other)))
        found["refused"].append(_refusal(lambda: distributed.load(folder, other)))
        alone = torch.optim.SGD(resumed.model.head.parameters(), lr=0.1)
        found["refused"].append(_refusal(lambda: distributed.load(target, resumed.model, alone)))
        found["unchanged"] = same(resumed.state(), state)
    return found


def _replicated(folder: Path) -> dict[str, Any]:
    """Experts divided over two ranks and replicated over two: as many ranks as before, another layout."""
    rank = dist.get_rank()
    pairs, replicas = ([dist.new_group(ranks) for ranks in layout] for layout in (([0, 1], [2, 3]), ([0, 2], [1, 3])))
    job = Job(pairs[rank // 2], replicas[rank % 2]).train(SAVED)
    moved = job.controller.rebalance(1.05).moves
    job.save(folder / "replicated")
    resumed = Job(pairs[rank // 2], replicas[rank % 2])
    resumed.load(folder / "replicated")
    divided = Job()  # over all four
    divided.load(folder / "replicated")
    for each in (job, resumed, divided):
        each.train(STEPS)
    parameters = [gathered(p.detach()[None]) for p in job.model.mlp.experts.parameters()]
    return {
        "trained": job.result(),
        "divided": divided.result(),
        "moved": moved,
        "bitwise": same(job.state(), resumed.state()),
        "replicas": all(torch.equal(p[:2], p[2:]) for p in parameters),
    }


def _refused_kinds() -> list[str]:
    """A controller refuses FSDP shards; a checkpoint refuses a list of modules divided over ranks."""
    sharded = Net(None)
    fully_shard(sharded, ignored_params={p for _, p in parallel.expert_parameters(sharded)})
    modules = [torch.nn.Linear(8, 8) for _ in range(4)]
    custom = MoELayer(
        {"type": "top_any", "max_expert_num": 4},
        8,
        {"type": "custom", "module": modules, "num_experts_per_device": 2},
        group=dist.group.WORLD,
    )
    return [
        _refusal(lambda: ExpertController(sharded)),
        _refusal(lambda: distributed.save("nowhere", custom)),
    ]


def _refusal(action: Any) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_ranks_train_adapt_move_and_resume_as_one(tmp_path: Path) -> None:
    spawn_ranks(_process, (str(tmp_path),), max(WORLDS))
    reports = {w: [torch.load(tmp_path / f"{w}-{r}.pt", weights_only=False) for r in range(w)] for w in WORLDS}
    check_training(reports)
    check_inits(reports)
    check_rebalance(reports)
    check_averages(reports)
    check_checkpoints(reports)
    check_replicated(reports)
    for rank in reports[2]:
        sharded, custom = rank["refused"]
        assert "mlp.gates.0.sim_matrix is sharded (a DTensor)" in sharded
        assert "are a list of modules divided over ranks" in custom


def check_training(reports: dict[int, list[Any]]) -> None:
    """Events and outputs of 20 steps with two updates; at 4 ranks, one saw only unrouted tokens in the first window."""
    [one] = reports[1]
    events = one["trained"]["events"]
    assert [(step, action) for step, action, *_ in events] == [
        (EVERY, "grown"),
        (2 * EVERY, "pruned"),
        (2 * EVERY, "grown"),
    ]
    for world in WORLDS:
        for rank in reports[world]:
            assert rank["trained"]["events"] == events
            assert rank["trained"]["slots"] == reports[world][0]["trained"]["slots"]
            assert relative_rms(rank["trained"]["output"], one["trained"]["output"]) < 1e-6
    grown = {world: reports[world][0]["trained"]["slots"][0] for world in WORLDS}
    # the lowest free slot: of all with one rank, else of the last rank, which has the least load
    assert grown == {1: (3, "grown"), 2: (5, "grown"), 4: (6, "grown")}


def check_inits(reports: dict[int, list[Any]]) -> None:
    """The new expert's weights come from another rank and equal one process's."""
    [one] = reports[1]
    for init in INITS:
        slot, expected = one[init]
        for rank in (rank for world in (2, 4) for rank in reports[world]):
            grown, found = rank[init]
            of_one = grown if init == "keep" else slot
            for rows, expected_rows in zip(found, expected, strict=True):
                assert relative_rms(rows[grown], expected_rows[of_one]) < 1e-6, init
    assert len({tuple(one[init][1][0][one[init][0]].flatten().tolist()) for init in INITS}) == len(INITS)


def check_rebalance(reports: dict[int, list[Any]]) -> None:
    """The function stays and the load changes; optimizer rows and the window in progress move too."""
    for world in WORLDS:
        first = reports[world][0]["rebalanced"]
        for rank in reports[world]:
            found = rank["rebalanced"]
            assert found["report"] == first["report"]
            [layer] = found["report"].layers
            assert (len(layer.moves) > 0) == (world > 1)
            assert layer.expected < layer.before if world > 1 else layer.expected == layer.before == 1.0
            assert found["again"] == 0
            assert relative_rms(found["after"], found["before"]) < 1e-6
            assert relative_rms(found["moves"]["output"], found["stays"]["output"]) < 1e-6
            assert found["moves"]["events"] == found["stays"]["events"]
            assert torch.equal(found["moves"]["totals"][-1], found["stays"]["totals"][-1])
            assert found["counts"][0] == found["counts"][1]
            assert found["loads"][0] == found["loads"][1]
            assert sum(found["loads"][0][0]) > 0
            assert found["resumed"], f"a resume at {world} ranks differs"
    text = reports[2][0]["rebalanced"]["text"]
    assert text.startswith(f"step {SAVED}: mlp: moved expert ")
    assert "load max/mean over 2 ranks was" in text


def check_averages(reports: dict[int, list[Any]]) -> None:
    """They follow growth, each rank in its own slots, and their experts move along."""
    for world in WORLDS:
        found = [rank["averages"] for rank in reports[world]]
        for rank in found:
            assert rank["follows"]
            assert rank["masks"][0] == rank["masks"][1]
            assert (rank["moved"] > 0) == (world > 1)
            assert relative_rms(rank["after"], rank["before"]) < 1e-6
        assert max(rank["grown"] for rank in found) == 6  # on the rank that holds the slot; the gate's two on all
        assert relative_rms(found[0]["before"], reports[1][0]["averages"]["before"]) < 1e-6


def check_checkpoints(reports: dict[int, list[Any]]) -> None:
    """Bitwise on as many ranks, else equal; a window in progress has the same totals; refusals name the fault."""
    whole = reports[4][0]["checkpoints"]["whole"]
    assert len(whole["events"]) > 2, "the resumed part must have something to get wrong"
    for world in WORLDS:
        for number, rank in enumerate(reports[world]):
            found = rank["checkpoints"]
            extra = {"step": SAVED, "note": ("any", 1.5, None)}
            assert found["restored"] == (extra, {"rank": number} if world == 4 else None, 4)
            assert relative_rms(found["window"], reports[4][0]["checkpoints"]["window"]) < 1e-6
            assert found["window"][-1] == 32 * (SAVED - EVERY)
            assert found["resumed"]["events"] == whole["events"]
            assert relative_rms(found["resumed"]["output"], whole["output"]) < 1e-6
    assert [rank["checkpoints"]["samples"] for rank in reports[4]] == [0, 0, 0, 16]
    for rank in reports[4]:
        found = rank["checkpoints"]
        assert found["bitwise"]
        assert found["unchanged"]
        exists, extra, slots, folder, groups = found["refused"]
        assert "exists already: a checkpoint is never overwritten" in exists
        assert "extra holds what a checkpoint cannot store" in extra
        assert found["written"] == []
        assert f"gates.0.sim_matrix of shape [8, {SLOTS}], this model [8, 4]" in slots
        assert "max_expert_num" in slots
        assert "is not a whole checkpoint" in folder
        assert "optimizer 0, group 0" in groups
        assert "mlp.experts.batched_fc1_w" in groups


def check_replicated(reports: dict[int, list[Any]]) -> None:
    """Replicas of an expert stay bitwise equal; experts divided differently can read their checkpoint."""
    [one] = reports[1]
    for rank in reports[4]:
        found = rank["replicated"]
        assert found["trained"]["events"] == one["trained"]["events"]
        assert relative_rms(found["trained"]["output"], one["trained"]["output"]) < 1e-6
        assert relative_rms(found["divided"]["output"], one["trained"]["output"]) < 1e-6
        assert found["moved"] > 0
        assert found["bitwise"]
        assert found["replicas"]


def test_the_data_leave_one_rank_of_four_unrouted() -> None:
    last = global_batch(0).chunk(4)[3]
    assert (last @ torch.eye(8)[:, :4]).max() < 0.4
