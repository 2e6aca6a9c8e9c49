"""What the questions time: everything that is compared takes turns in one process, so that ratios are those of a round.

Every block is repeated for some seeds and kept in the job's folder, as timing/<question>-<block>-seed<n>.json: the
milliseconds of each round by subject, and how it routed.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive import Budgets
from dynmoe_tutel.checkpoint import write_file
from dynmoe_tutel.experiments.questions.plain import PlainTopK
from dynmoe_tutel.experiments.questions.variants import BUDGET, FIXED, PLAIN, ROUTED_EXPERTS, K
from dynmoe_tutel.experiments.report.reporters import Several
from dynmoe_tutel.experiments.run_folder import NoFolder
from dynmoe_tutel.experiments.runner import Run, thread_count
from dynmoe_tutel.experiments.task import RunKey
from dynmoe_tutel.experiments.vision.vit import MLP, seeded
from dynmoe_tutel.routing import Routing

if TYPE_CHECKING:
    from dynmoe_tutel.experiments.questions.task import QuestionsTask

FOLDER = "timing"
STEP, LAYER, WIDE, RAGGED, WIDE_RAGGED = "step", "layer", "wide-layer", "ragged", "wide-ragged"
DENSE, LINEAR, COSINE = "dense", f"top-{K}", f"top-{K}, cosine"
UNMODIFIED, HELD = f"top-{K}, loop over experts", f"top-any, k held at {K}"
SIZES = {LAYER: (64, 256, 720), WIDE: (256, 1024, 1024)}  # D, H, T; the first are the digits' model's
RAGGED_SIZES = {RAGGED: SIZES[LAYER], WIDE_RAGGED: SIZES[WIDE]}
TIMED_SEEDS = 3
SETTLING = 60  # steps before a step is timed: the budget has reached its target by then
AUX_WEIGHT = 0.01
# shares of the tokens by k, all with a mean of K; the last has an uneven load in place of an uneven k
RAGGED_K: dict[str, dict[int, float]] = {
    "k = 2": {2: 1.0},
    "k = 1 or 3": {1: 0.5, 3: 0.5},
    "k = 0 or 4": {0: 0.5, 4: 0.5},
    "k = 0 or 8": {0: 0.75, 8: 0.25},
}
UNEVEN = "k = 2, half of it on 2 of 8 experts"


@dataclass(frozen=True)
class Block:
    """Subjects by name that take turns; `settling` rounds come first, untimed. `routed` reads the mean k and the
    experts of each after the timed rounds; `facts` are what else is known of a subject."""

    subjects: Mapping[str, Callable[[], None]]
    settling: int = 2
    start: Callable[[], None] = lambda: None  # called between settling and timing
    routed: Callable[[], dict[str, tuple[float, float]]] = dict
    facts: dict[str, Any] = field(default_factory=dict)


Build = Callable[[int], Block]


def measure(task: QuestionsTask, path: Path, stop_request: Callable[[], int | None]) -> None:
    """Time what the folder does not have yet; returns early, and keeps whole blocks alone, after a signal."""
    (path / FOLDER).mkdir(exist_ok=True)
    # what else the machine does makes a long subject wait more often than a short one; a processor's clock stands then
    alone = task.config.threads == 1
    clock, read_clock = ("processor time", time.process_time) if alone else ("time on the wall", time.perf_counter)
    with thread_count(task.config.threads):
        for file, seed, build in _pending(task, path):
            block = build(seed)
            for _ in range(block.settling):
                for subject in block.subjects.values():
                    subject()
                if stop_request() is not None:
                    return
            block.start()
            ms: dict[str, list[float]] = {name: [] for name in block.subjects}
            names = list(ms)
            for turn in range(task.config.rounds):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    ms[name].append(_milliseconds(block.subjects[name], read_clock))
                if stop_request() is not None:
                    return
            content = {"seed": seed, "clock": clock, "ms": ms, "routed": block.routed(), "facts": block.facts}
            write_file(file, json.dumps(content) + "\n")


def seconds(task: QuestionsTask, path: Path) -> float:
    """How long `measure` will take: from one round of every block that it lacks."""
    total, by_block = 0.0, dict[str, float]()
    with thread_count(task.config.threads):
        for file, seed, build in _pending(task, path):
            name = file.stem.rpartition("-")[0]
            if name not in by_block:
                block = build(seed)
                for subject in block.subjects.values():
                    subject()
                round_ms = sum(_milliseconds(subject) for subject in block.subjects.values())
                by_block[name] = round_ms / 1e3 * (block.settling + task.config.rounds)
            total += by_block[name]
    return total


def read(path: Path, question: int, block: str) -> list[dict[str, Any]]:
    """What was measured of a block, by seed."""
    return [json.loads(file.read_text()) for file in sorted((path / FOLDER).glob(f"{question}-{block}-seed*.json"))]


def questions_of(path: Path) -> set[int]:
    """The numbers of the questions that something was measured for."""
    return {int(file.name.partition("-")[0]) for file in (path / FOLDER).glob("*-seed*.json")}


def ratios(measured: Sequence[Mapping[str, Any]], subject: str, over: str) -> list[float]:
    """Of the two times in every round of every seed."""
    return [a / b for each in measured for a, b in zip(each["ms"][subject], each["ms"][over], strict=True)]


def seeds_range(measured: Sequence[Mapping[str, Any]], subject: str, over: str) -> tuple[float, float]:
    """The smallest and the largest median ratio of a seed."""
    medians = [statistics.median(ratios([each], subject, over)) for each in measured]
    return min(medians), max(medians)


def _pending(task: QuestionsTask, path: Path) -> Iterator[tuple[Path, int, Build]]:
    """The file, the seed and the builder of each block that is not in the folder."""
    blocks: dict[tuple[int, str], Build] = {(1, STEP): partial(_steps, task)}
    if not task.config.language:  # a layer's time depends on no data
        blocks |= {(1, name): partial(_layers, *size) for name, size in SIZES.items()}
        blocks |= {(11, name): partial(_ragged, *size) for name, size in RAGGED_SIZES.items()}
    for (question, name), build in blocks.items():
        for seed in task.config.seeds[:TIMED_SEEDS] if question in task.config.questions else ():
            file = path / FOLDER / f"{question}-{name}-seed{seed}.json"
            if not file.exists():
                yield file, seed, build


def _milliseconds(subject: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    subject()
    return 1e3 * (clock() - start)


def _steps(task: QuestionsTask, seed: int) -> Block:
    """Whole steps of training: batch, forward, backward, optimizer, controller."""
    names = ["dense", *[PLAIN] * (not task.config.language), FIXED, BUDGET, "dynmoe"]
    runs = {name: Run(task, RunKey(name, seed), NoFolder(), Several()) for name in names}

    def step(run: Run) -> None:
        run.train_step()
        run.adapt()

    def start() -> None:
        for run in runs.values():
            run.meter.reset()

    def routed() -> dict[str, tuple[float, float]]:
        read = {name: run.meter.read().values() for name, run in runs.items()}
        means = {
            name: (statistics.fmean(each["k"] for each in layers), statistics.fmean(each["experts"] for each in layers))
            for name, layers in read.items()
            if layers
        }
        return {PLAIN: (K, ROUTED_EXPERTS), **means} if PLAIN in runs else means

    subjects = {name: partial(step, run) for name, run in runs.items()}
    # the last step of the settings is no limit: batches go on
    return Block(subjects, min(SETTLING, task.config.steps), start, routed)


def _layers(D: int, H: int, T: int, seed: int) -> Block:
    """A MLP and MoE layers of eight such MLPs, forward and backward, on one batch of random tokens."""
    layer = partial(_moe_layer, D, H, seed)
    modules: dict[str, nn.Module] = {
        DENSE: seeded(seed, 0, lambda: MLP(D, H)),
        UNMODIFIED: seeded(seed, 1, lambda: PlainTopK(D, H, ROUTED_EXPERTS, K)),
        LINEAR: layer({"type": "top", "k": K, "fp32_gate": True}),
        COSINE: layer({"type": "cosine_top", "k": K, "proj_dim": D, "fp32_gate": True}),
        HELD: layer({"type": "top_any", "fp32_gate": True, "budget": {"target_k": float(K)}}),
    }
    x_TD, dy_TD = (torch.randn(T, D, generator=torch.Generator().manual_seed(seed + n)) for n in (0, 10_000))
    held, budgets = modules[HELD], Budgets(modules[HELD])
    assert isinstance(held, MoELayer)
    for _ in range(SETTLING):
        held(x_TD)
        budgets.step()

    def routed() -> dict[str, tuple[float, float]]:
        fixed = {name: (float(K), float(ROUTED_EXPERTS)) for name in modules if name not in (DENSE, HELD)}
        return {**fixed, HELD: (_mean_k(held, x_TD), float(ROUTED_EXPERTS))}

    return Block({name: partial(_pass, module, x_TD, dy_TD) for name, module in modules.items()}, routed=routed)


def _ragged(D: int, H: int, T: int, seed: int) -> Block:
    """One layer under routings with equally many assignments."""
    x_TD, dy_TD = (torch.randn(T, D, generator=torch.Generator().manual_seed(seed + n)) for n in (0, 10_000))
    routed = {name: assignments(shares, T, seed) for name, shares in RAGGED_K.items()}
    routed[UNEVEN] = uneven_assignments(T, seed)
    subjects, facts = {}, {}
    for name, assigned_TE in routed.items():
        gate = {"type": "custom", "module": FixedRouting(assigned_TE)}
        module = _moe_layer(D, H, seed, gate, aux_losses={})
        subjects[name] = partial(_pass, module, x_TD, dy_TD)
        k_T, load_E = assigned_TE.sum(1).float(), assigned_TE.sum(0)
        facts[name] = {
            "assignments": int(load_E.sum()),
            "variance": float(k_T.var(correction=0)),
            # rows that a layout of equally many rows an expert has, over those that are needed
            "padded": ROUTED_EXPERTS * int(load_E.max()) / int(load_E.sum()),
        }
    return Block(subjects, facts=facts)


class FixedRouting(nn.Module):
    """A gate that routes every batch of T tokens by one map [T, E]; a token's experts count equally."""

    def __init__(self, assigned_TE: Tensor) -> None:
        super().__init__()
        self.assigned_TE = assigned_TE

    def forward(self, x_TD: Tensor) -> Routing:
        return Routing.from_assignments(self.assigned_TE)


def assignments(shares: dict[int, float], tokens: int, seed: int) -> Tensor:
    """A map bool [T, E]: shares of the tokens by k, in random order, the load as even as can be."""
    k_T = torch.cat([torch.full((math.ceil(share * tokens),), k) for k, share in shares.items()])[:tokens]
    k_T = k_T[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))]
    first_T = k_T.cumsum(0) - k_T  # experts are dealt in turn
    place_TE = (torch.arange(ROUTED_EXPERTS) - first_T.unsqueeze(1)) % ROUTED_EXPERTS
    return place_TE < k_T.unsqueeze(1)


def uneven_assignments(tokens: int, seed: int) -> Tensor:
    """A map bool [T, E] of K = 2 experts a token: half of the tokens take the first two experts."""
    assigned_TE = assignments({K: 1.0}, tokens, seed)
    assigned_TE[: tokens // 2] = False
    assigned_TE[: tokens // 2, :K] = True
    return assigned_TE[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))]


def _moe_layer(D: int, H: int, seed: int, gate: dict[str, Any], **options: Any) -> MoELayer:
    experts = {
        "type": "ffn",
        "num_experts_per_device": ROUTED_EXPERTS,
        "hidden_size_per_expert": H,
        "activation_fn": nn.functional.gelu,
    }
    return seeded(seed, 1, lambda: MoELayer(gate_type=gate, experts=experts, model_dim=D, **options))


def _pass(module: nn.Module, x_TD: Tensor, dy_TD: Tensor) -> None:
    """Forward and backward, to the tokens and all parameters."""
    module.zero_grad(set_to_none=True)
    y_TD = module(x_TD.detach().requires_grad_())
    aux = getattr(module, "l_aux", None)
    outputs, gradients = [y_TD], [dy_TD]
    if aux is not None and aux.requires_grad:
        outputs, gradients = [y_TD, aux], [dy_TD, torch.full_like(aux, AUX_WEIGHT)]
    torch.autograd.backward(outputs, gradients)


def _mean_k(layer: MoELayer, x_TD: Tensor) -> float:
    return float(layer.route(x_TD).k_per_token.float().mean())
