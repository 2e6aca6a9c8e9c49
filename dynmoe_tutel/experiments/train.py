"""The main job: domain generalisation on rotated digits, dense against top-1, top-2 and DynMoE.

Every row is trained with the same seeds, batches, steps, optimizer and learning rate, and its experts are as wide as
the dense MLP. Nothing is selected by its result: the numbers are those after the last step. All randomness comes from
the seed through private generators, so a run is a pure function of its configuration, and a resumed one is bitwise
the uninterrupted one.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynmoe_tutel import meters, moe
from dynmoe_tutel.controller import ExpertController, Schedule
from dynmoe_tutel.experiments import digits
from dynmoe_tutel.experiments.run_folder import EVENTS, METRICS, RunFolder
from dynmoe_tutel.experiments.vit import ViT, ViTConfig

ROWS = ("dense", "top-1", "top-2", "dynmoe")
MAX_SEED = 2**31


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a job computes. ValueError for values out of range."""

    rows: tuple[str, ...] = ROWS
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    test_domain: int = 75  # the last angle: nothing beyond it is trained on, so the model must extrapolate
    batch_per_domain: int = 16
    learning_rate: float = 2e-3
    warmup: float = 0.1  # share of the steps; cosine decay to zero after it
    aux_weight: float = 0.01  # GMoE's and upstream DynMoE's
    experts: int = 4  # in the top-k rows always, in DynMoE's at start
    slots: int = 8  # DynMoE may grow up to these
    update_every: int = 25  # steps from one adaptive update of DynMoE to the next
    log_every: int = 5
    eval_every: int = 25  # a checkpoint follows every evaluation
    threads: int = 1  # a step is so small that more gain little, and lose much on a busy machine
    model: ViTConfig = field(default_factory=ViTConfig)

    def __post_init__(self) -> None:
        _refuse_bad_choice("rows", self.rows, ROWS)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {list(self.seeds)}")
        if not all(0 <= seed < MAX_SEED for seed in self.seeds):
            raise ValueError(f"seeds must be from 0 to {MAX_SEED - 1}, got {list(self.seeds)}")
        if self.test_domain not in digits.ANGLES:
            raise ValueError(f"test_domain must be one of {list(digits.ANGLES)}, got {self.test_domain!r}")
        names = ("steps", "batch_per_domain", "experts", "slots", "update_every", "log_every", "eval_every", "threads")
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.experts > self.slots:
            raise ValueError(f"experts must be at most slots ({self.slots}), got {self.experts}")
        if not isinstance(self.learning_rate, float) or not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TrainConfig:
        """What `to_dict` gave. ValueError where a value is missing or unknown."""
        expected, given = {f.name for f in fields(cls)}, set(content)
        if expected != given:
            raise ValueError(
                f"the configuration is of another job or version: missing {sorted(expected - given)}, "
                f"unknown {sorted(given - expected)}"
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        try:
            values["model"] = ViTConfig(**content["model"])
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"the configuration is of another job or version: {error}") from error

    def quick(self) -> TrainConfig:
        """The same job, short: one seed, fewer steps, updates as often in proportion."""
        return replace(self, seeds=self.seeds[:1], steps=80, update_every=20, eval_every=20)

    @property
    def plan(self) -> list[tuple[str, int]]:
        """(row, seed) in the order in which they run: rows are interleaved, so that a busy machine slows all alike."""
        return [(row, seed) for seed in self.seeds for row in self.rows]


class Interrupted(Exception):
    """The job was asked to stop by `signum` and has saved its state."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Reporter(Protocol):
    """Who is told how the job goes."""

    def run_skipped(self, run: str, steps: int) -> None: ...
    def run_started(self, run: str, step: int, steps: int) -> None: ...
    def stepped(self, run: str, step: int) -> None: ...
    def logged(self, run: str, line: Mapping[str, Any]) -> None: ...
    def run_ended(self, run: str, line: Mapping[str, Any]) -> None: ...


def run_name(row: str, seed: int) -> str:
    """The name of a run, in folders and messages."""
    return f"{row}-seed{seed}"


def train(config: TrainConfig, folder: RunFolder, reporter: Reporter) -> None:
    """Do what of the plan is not in the folder yet.

    Raises Interrupted after SIGINT or SIGTERM, when the state is saved; ValueError where the folder cannot be written
    or its checkpoints do not fit.
    """
    pending = _rewind(config, folder)
    for row, seed in config.plan[: len(config.plan) - len(pending)]:
        reporter.run_skipped(run_name(row, seed), config.steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with _stop_requests() as stop_request:
            for row, seed, state in pending:
                run = Run(config, row, seed, folder, reporter)
                if state is not None:
                    run.load_state(state)
                run.finish(stop_request)
    finally:
        torch.set_num_threads(threads)


def _rewind(config: TrainConfig, folder: RunFolder) -> list[tuple[str, int, dict[str, Any] | None]]:
    """The runs that are to be done, the first with the state it stopped at; the logs are cut back to that state."""
    latest: dict[str, Any] | None = None
    pending: list[tuple[str, int, dict[str, Any] | None]] = []
    for row, seed in config.plan:
        state = folder.load(run_name(row, seed))
        if state is not None:
            if pending and pending[-1][2] is None:
                raise ValueError(
                    f"run folder {folder.path} has a checkpoint of {run_name(row, seed)} but none of "
                    f"{run_name(*pending[-1][:2])}, which runs earlier: remove the former to repeat both"
                )
            latest = state
        if state is None or state["step"] < config.steps:
            pending.append((row, seed, state))
    folder.rewind(latest)
    return pending


class Run:
    """One row with one seed: model, optimizer, controller, and the sums since the last line of the log."""

    def __init__(self, config: TrainConfig, row: str, seed: int, folder: RunFolder, reporter: Reporter) -> None:
        self.config, self.row, self.seed, self.folder, self.reporter = config, row, seed, folder, reporter
        self.name = run_name(row, seed)
        self.data = digits.load_digits(config.test_domain, seed)
        self.model = build_model(config, row, seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, fused=True)
        self.meter = meters.RoutingMeter(self.model)
        self.controller: ExpertController | None = None
        if row == "dynmoe":
            # No update in the last stretch: an expert that grew is trained before it is judged.
            stop = max(config.update_every, config.steps - config.update_every)
            schedule = Schedule(every=config.update_every, stop=stop)
            self.controller = ExpertController(self.model, self.optimizer, schedule, seed=seed)
        self.step, self.resumed = 0, False
        self.sums = {"loss": 0.0, "aux": 0.0, "correct": 0, "images": 0, "steps": 0}
        self.layers_at_eval: dict[str, Any] = {}
        self.step_ms: list[float] = []

    def finish(self, stop_request: Callable[[], int | None]) -> None:
        """Train to the last step, with evaluations and checkpoints; Interrupted once a signal came and all is saved."""
        self.reporter.run_started(self.name, self.step, self.config.steps)
        line: dict[str, Any] = {}
        if not self.resumed:
            self.evaluate()
        while self.step < self.config.steps:
            signum = stop_request()
            if signum is not None:
                self.save()
                raise Interrupted(signum)
            self.train_step()
            last = self.step == self.config.steps
            if self.step % self.config.log_every == 0 or last:
                self.log()
            self.adapt()
            if self.step % self.config.eval_every == 0 or last:
                line = self.evaluate()
                self.save()
            self.reporter.stepped(self.name, self.step)
        self.reporter.run_ended(self.name, line)
        signum = stop_request()
        if signum is not None:
            raise Interrupted(signum)

    def train_step(self) -> None:
        """One optimizer step."""
        config = self.config
        image, label = digits.batch(self.data, self.seed, self.step, config.batch_per_domain)
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * _learning_rate_share(config, self.step)
        logits = self.model(image)
        loss = nn.functional.cross_entropy(logits, label)
        aux = self._aux_loss()
        self.optimizer.zero_grad(set_to_none=True)
        (loss + config.aux_weight * aux).backward()
        self.optimizer.step()
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        self.step += 1
        sums = self.sums
        sums["loss"] += loss.item()
        sums["aux"] += aux.item()
        sums["correct"] += int((logits.argmax(1) == label).sum())
        sums["images"] += len(label)
        sums["steps"] += 1

    def adapt(self) -> None:
        """Let the controller count the step, and log what grew and what was pruned."""
        if self.controller is None:
            return
        for event in self.controller.step():
            self.folder.log(EVENTS, {"row": self.row, "seed": self.seed, **asdict(event)})

    def log(self) -> None:
        """Write the means since the last line, and start anew."""
        sums = self.sums
        loss = sums["loss"] / sums["steps"]
        if not math.isfinite(loss):
            raise ValueError(
                f"{self.name} diverged: its loss is {loss} at step {self.step} with learning_rate "
                f"{self.config.learning_rate}: lower it"
            )
        line = {
            "kind": "train",
            "row": self.row,
            "seed": self.seed,
            "step": self.step,
            "loss": loss,
            "aux": sums["aux"] / sums["steps"],
            "accuracy": sums["correct"] / sums["images"],
            "layers": self.meter.read(),
            "step_ms": statistics.median(self.step_ms) if self.step_ms else None,
        }
        self.folder.log(METRICS, line)
        self.reporter.logged(self.name, line)
        self.meter.reset()
        self.step_ms.clear()
        self.sums = dict.fromkeys(sums, 0) | {"loss": 0.0, "aux": 0.0}

    def evaluate(self) -> dict[str, Any]:
        """Write accuracy in and out of domain, and how the tokens of all these images were routed."""
        kept = self.meter.state_dict()
        self.meter.reset()
        self.model.eval()
        inside = self._accuracy(list(self.data.validation.values()))
        layers_in = self.meter.read()
        self.meter.reset()
        outside = self._accuracy([self.data.test])
        layers_out = self.meter.read()
        self.model.train()
        self.meter.load_state_dict(kept)
        self.layers_at_eval = layers_in
        mean_k = {name: layer["k"] for name, layer in layers_in.items()}
        activated, total = meters.parameter_counts(self.model, mean_k)
        line = {
            "kind": "eval",
            "row": self.row,
            "seed": self.seed,
            "step": self.step,
            "in_accuracy": inside,
            "out_accuracy": outside,
            "activated_parameters": activated,
            "total_parameters": total,
            "layers": layers_in,
            "layers_out": layers_out,
        }
        self.folder.log(METRICS, line)
        self.reporter.logged(self.name, line)
        return line

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.folder.save(self.name, self.step, self.state())

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, and the last statistics of the layers."""
        return {
            "row": self.row,
            "seed": self.seed,
            "step": self.step,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
            "meter": self.meter.state_dict(),
            "sums": dict(self.sums),
            "layers": self.layers_at_eval,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        if (state["row"], state["seed"]) != (self.row, self.seed):
            raise ValueError(f"the checkpoint is of {run_name(state['row'], state['seed'])}, not of {self.name}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        self.meter.load_state_dict(state["meter"])
        self.step, self.sums, self.layers_at_eval = state["step"], dict(state["sums"]), state["layers"]
        self.resumed = True

    def _aux_loss(self) -> Tensor:
        aux = torch.zeros(())
        for layer in self.meter.layers.values():
            assert layer.l_aux is not None
            aux = aux + layer.l_aux
        return aux

    @torch.no_grad()
    def _accuracy(self, domains: list[digits.Images]) -> float:
        correct = images = 0
        for domain in domains:
            correct += int((self.model(domain.image).argmax(1) == domain.label).sum())
            images += len(domain)
        return correct / images


def build_model(config: TrainConfig, row: str, seed: int) -> ViT:
    """The model of a row. What rows have in common starts with equal weights."""
    if row == "dense":
        return ViT(config.model, seed)
    gate: dict[str, Any]
    if row == "dynmoe":
        gate = {"type": "top_any", "max_expert_num": config.slots, "fp32_gate": True}
    else:  # the cosine router, as in GMoE
        gate = {"type": "cosine_top", "k": int(row[-1]), "proj_dim": config.model.dim, "fp32_gate": True}
    experts = {
        "type": "ffn",
        "num_experts_per_device": config.experts,
        "hidden_size_per_expert": config.model.hidden,
        "activation_fn": nn.functional.gelu,
    }
    return ViT(
        config.model,
        seed,
        lambda _block: moe.moe_layer(gate_type=gate, experts=experts, model_dim=config.model.dim),
    )


def _learning_rate_share(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


@contextmanager
def _stop_requests() -> Iterator[Callable[[], int | None]]:
    """Gives a function that returns the signal that asked to stop, or None. A second signal stops at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def remember(signum: int, _frame: Any) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])

    before: dict[int, Any] = {signum: signal.signal(signum, remember) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _refuse_bad_choice(name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    unknown = [value for value in values if value not in allowed]
    if unknown or not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be different ones of {', '.join(allowed)}, got {', '.join(values) or 'none'}")
