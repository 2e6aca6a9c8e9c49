"""Runs: a task's rows trained with equal budgets, with logs, evaluations, checkpoints and a clean stop.

A `Task` says what is trained and on what; a `Run` trains one row of it with one seed. All randomness of a run comes
from its key through private streams, dropout included, so that a run is a pure function of the settings and a resumed
run is bitwise the uninterrupted one. The controller sees training forwards alone.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynmoe_tutel import metrics
from dynmoe_tutel.adaptive import Budgets
from dynmoe_tutel.experiments.run_folder import EVENTS, METRICS, RunFolder
from dynmoe_tutel.experiments.task import KINDS, Part, RunKey, Task


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
    def close(self) -> None: ...


def run_all(
    task: Task,
    plan: list[RunKey],
    folder: RunFolder,
    reporter: Reporter,
    stop_request: Callable[[], int | None] | None = None,
) -> None:
    """Do what of the plan is not in the folder yet; its runs share the folder's logs, in the order of the plan.

    `stop_request`: of `stop_requests`, where the caller waits for signals; by default they are waited for here. Raises
    Interrupted after one, when the state is saved; ValueError where the folder cannot be written or its checkpoints do
    not fit.
    """
    if stop_request is None:
        with stop_requests() as stop_request:
            return run_all(task, plan, folder, reporter, stop_request)
    steps = task.settings.steps
    pending = _rewind(plan, steps, folder)
    for key in plan[: len(plan) - len(pending)]:
        reporter.run_skipped(key.name, steps)
    with thread_count(task.settings.threads):
        for key, state in pending:
            run = Run(task, key, folder, reporter)
            if state is not None:
                run.load_state(state)
            run.finish(stop_request)


def _rewind(plan: list[RunKey], steps: int, folder: RunFolder) -> list[tuple[RunKey, dict[str, Any] | None]]:
    """The runs that are to be done, the first with the state it stopped at; the logs are cut back to that state."""
    latest: dict[str, Any] | None = None
    pending: list[tuple[RunKey, dict[str, Any] | None]] = []
    for key in plan:
        state = folder.load(key.name)
        if state is not None:
            if pending and pending[-1][1] is None:
                raise ValueError(
                    f"run folder {folder.path} has a checkpoint of {key.name} but none of "
                    f"{pending[-1][0].name}, which runs earlier: remove the former to repeat both"
                )
            latest = state
        if state is None or state["step"] < steps:
            pending.append((key, state))
    folder.rewind(latest)
    return pending


class Run:
    """One run: model, optimizer, controller, and the sums since the last line of the log."""

    def __init__(self, task: Task, key: RunKey, folder: RunFolder, reporter: Reporter) -> None:
        self.task, self.key, self.folder, self.reporter = task, key, folder, reporter
        self.settings, self.row, self.name = task.settings, key.row, key.name
        self.model = task.build(key).to(task.device).train()  # libraries hand over models in eval mode
        self.optimizer = task.optimizer(self.model)
        self.meter = metrics.RoutingMeter(self.model)
        self.controller = task.controller(key, self.model, self.optimizer)
        self.budgets = Budgets(self.model)  # for routers without a controller, which moves what gates hold itself
        self.step, self.resumed = 0, False
        self.sums = {"loss": 0.0, "aux": 0.0, "correct": 0, "items": 0, "steps": 0}
        self.layers_at_eval: dict[str, Any] = {}
        self.step_ms: list[float] = []
        self._batches: Iterator[tuple[Any, Tensor]] | None = None

    def finish(self, stop_request: Callable[[], int | None]) -> None:
        """Train to the last step, with evaluations and checkpoints; Interrupted once a signal came and all is saved."""
        settings = self.settings
        self.reporter.run_started(self.name, self.step, settings.steps)
        line: dict[str, Any] = {}
        if not self.resumed:
            self.evaluate()
        while self.step < settings.steps:
            signum = stop_request()
            if signum is not None:
                self.save()
                raise Interrupted(signum)
            self.train_step()
            last = self.step == settings.steps
            if self.step % settings.log_every == 0 or last:
                self.log()
            self.adapt()
            if self.step % settings.eval_every == 0 or last:
                line = self.evaluate()
                if self.task.checkpoints or last:
                    self.save()
            self.reporter.stepped(self.name, self.step)
        self.reporter.run_ended(self.name, line)
        signum = stop_request()
        if signum is not None:
            raise Interrupted(signum)

    def train_step(self) -> None:
        """One optimizer step."""
        if self._batches is None:
            self._batches = self.task.batches(self.key, self.step)
        inputs, label = to_device(next(self._batches), self.task.device)
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.task.learning_rate_share(self.step)
        with random_stream(self.key.seed, self.step, self.task.device):
            logits = self.task.logits(self.model, inputs)
            loss = nn.functional.cross_entropy(logits, label)
            aux = self._aux_loss()
            self.optimizer.zero_grad(set_to_none=True)
            (loss + self.settings.aux_weight * aux).backward()
        self.optimizer.step()
        self.sums["loss"] += loss.item()
        self.sums["aux"] += aux.item()
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        self.step += 1
        self.sums["correct"] += int((logits.argmax(1) == label).sum())
        self.sums["items"] += len(label)
        self.sums["steps"] += 1

    def adapt(self) -> None:
        """Let what gates hold move after the step, or the controller count it, and log what grew and was pruned."""
        if self.controller is None:
            self.budgets.step()
            return
        for event in self.controller.step():
            self.folder.log(EVENTS, {**self.key.fields, **asdict(event)})

    def log(self) -> None:
        """Write the means since the last line, and start anew."""
        sums = self.sums
        loss = sums["loss"] / sums["steps"]
        if not math.isfinite(loss):
            raise ValueError(
                f"{self.name} diverged: its loss is {loss} at step {self.step} with learning_rate "
                f"{self.settings.learning_rate}: lower it"
            )
        line = {
            "kind": "train",
            **self.key.fields,
            "step": self.step,
            "loss": loss,
            "aux": sums["aux"] / sums["steps"],
            "accuracy": sums["correct"] / sums["items"],
            "layers": self.meter.read(),
            "step_ms": statistics.median(self.step_ms) if self.step_ms else None,
        }
        self.folder.log(METRICS, line)
        self.reporter.logged(self.name, line)
        self.meter.reset()
        self.step_ms.clear()
        self.sums = dict.fromkeys(sums, 0) | {"loss": 0.0, "aux": 0.0}

    def evaluate(self) -> dict[str, Any]:
        """Write accuracy by part and by kind of part, and how the tokens of these data were routed."""
        kept = self.meter.state_dict()
        self.model.eval()
        parts: dict[str, Any] = {}
        sums: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        for part in self.task.parts(self.key, self.step):
            self.meter.reset()
            accuracy, items = self._accuracy(part)
            k = {name: layer["k"] for name, layer in self.meter.read().items()}
            parts[part.name] = {"kind": part.kind, "accuracy": accuracy, "items": items, "k": k}
            sums[part.kind].append(self.meter.state_dict())
        self.model.train()
        layers = {}
        for kind in KINDS:
            self.meter.load_state_dict(metrics.total(sums[kind]) if sums[kind] else metrics.total([kept], scale=0))
            layers[kind] = self.meter.read()
        self.meter.load_state_dict(kept)
        inside = layers["in"] if sums["in"] else layers["validation"]
        self.layers_at_eval = inside
        activated, total = metrics.parameter_counts(self.model, {name: layer["k"] for name, layer in inside.items()})
        line = {
            "kind": "eval",
            **self.key.fields,
            "step": self.step,
            **_mean_accuracies(parts),
            "activated_parameters": activated,
            "total_parameters": total,
            "parts": parts,
            "layers": inside,
            "layers_out": layers["out"],
        }
        self.folder.log(METRICS, line)
        self.reporter.logged(self.name, line)
        return line

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.folder.save(self.name, self.step, self.state())

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, and the last statistics of the layers."""
        state: dict[str, Any] = {**self.key.fields, "step": self.step, "layers": self.layers_at_eval}
        model = dict(self.model.state_dict())
        if self.step == self.settings.steps and not self.task.keep_weights:
            return {**state, "model": {name: tensor for name, tensor in model.items() if ".gates." in name}}
        return {
            **state,
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
            "meter": self.meter.state_dict(),
            "sums": dict(self.sums),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        key = RunKey(state["row"], state["seed"], state.get("test", ""))
        if key != self.key:
            raise ValueError(f"the checkpoint is of {key.name}, not of {self.name}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        self.meter.load_state_dict(state["meter"])
        self.step, self.sums, self.layers_at_eval = state["step"], dict(state["sums"]), state["layers"]
        self.resumed = True

    def _aux_loss(self) -> Tensor:
        aux = torch.zeros((), device=self.task.device)
        for layer in self.meter.layers.values():
            assert layer.l_aux is not None
            aux = aux + layer.l_aux
        return aux

    @torch.no_grad()
    def _accuracy(self, part: Part) -> tuple[float, int]:
        correct = items = 0
        for batch in part.batches:
            inputs, label = to_device(batch, self.task.device)
            correct += int((self.task.logits(self.model, inputs).argmax(1) == label).sum())
            items += len(label)
        return correct / items, items


def to_device(value: Any, device: torch.device) -> Any:
    """The tensors in dicts, tuples and lists, moved."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return type(value)(to_device(item, device) for item in value)


@contextmanager
def random_stream(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """torch's random state is that of the seed and the step; the caller's is put back. Dropout draws from it."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.default_generator.manual_seed(seed * 1_000_003 + step)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed * 1_000_003 + step)
        yield


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """torch computes with so many threads; the caller's number is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Gives a function that returns the signal that asked to stop, or None. A second signal stops at once.

    These are SIGINT, SIGTERM, and SIGHUP, which a terminal sends when it closes, unless `nohup` had it ignored.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def remember(signum: int, _frame: Any) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])

    stopping: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        stopping.append(signal.SIGHUP)
    before: dict[int, Any] = {signum: signal.signal(signum, remember) for signum in stopping}
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _mean_accuracies(parts: Mapping[str, Any]) -> dict[str, float]:
    """By kind, every part counting the same; in domain is validation where nothing else is held out."""
    by_kind = {kind: [part["accuracy"] for part in parts.values() if part["kind"] == kind] for kind in KINDS}
    result = {f"{kind}_accuracy": statistics.fmean(values) for kind, values in by_kind.items() if values}
    return {"in_accuracy": result["validation_accuracy"], **result} if "in_accuracy" not in result else result
