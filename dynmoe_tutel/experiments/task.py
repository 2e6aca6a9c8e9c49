"""What a job trains: its settings, the keys of its runs, the parts of its data, and the `Task` over them.

`train` and the experiments are tasks; `runner` trains them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from dynmoe_tutel.adaptive.controller import ExpertController, Schedule
from dynmoe_tutel.experiments import options
from dynmoe_tutel.experiments.options import option

MAX_THREADS = 1024
MAX_SEED = 2**31
KINDS = ("validation", "in", "out")

S = TypeVar("S", bound="Settings")
T = TypeVar("T", bound="Task")


@dataclass(frozen=True)
class Settings:
    """What every row of a job has in common. ValueError for values out of range; a task adds its own by inheritance.

    Fields declared with `option` become options of the task's command.
    """

    rows: tuple[str, ...] = option(
        (),
        "Rows of the table, by comma: dense, top-K-of-E (such as top-2-of-8), dynmoe, dynmoe-kX (mean k held at X), "
        "relu-kX, top-p-kX, expert-threshold-kX, null-experts-kX, quantile-top-K-of-E.",
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2),
        "Number of seeds (0, 1, ...), or seeds by comma. Default: 3, with --quick 1.",
        options.seeds,
    )
    steps: int = option(200, "Optimizer steps of each run.")
    learning_rate: float = option(2e-3, "Learning rate, the same for all rows.")
    warmup: float = 0.1  # share of the steps
    aux_weight: float = 0.01  # GMoE's and upstream DynMoE's
    update_every: int = 25  # steps from one adaptive update of DynMoE to the next
    log_every: int = 5
    eval_every: int = 25
    threads: int = option(1, "CPU threads of torch. The last bits of the result depend on it.")
    experts: int = 8  # active in DynMoE's layers at start
    slots: int = 16  # how many experts a layer may grow to

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {list(self.seeds)}")
        if not all(0 <= seed < MAX_SEED for seed in self.seeds):
            raise ValueError(f"seeds must be from 0 to {MAX_SEED - 1}, got {list(self.seeds)}")
        self.refuse_below_one("steps", "update_every", "log_every", "eval_every", "threads", "experts", "slots")
        if self.threads > MAX_THREADS:  # the system refuses them in the middle of a computation, and ends the process
            raise ValueError(f"threads must be at most {MAX_THREADS}, got {self.threads}")
        if self.experts > self.slots:
            raise ValueError(f"experts must be at most slots ({self.slots}), got {self.experts}")
        if not isinstance(self.learning_rate, float) or not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")

    def refuse_below_one(self, *names: str) -> None:
        """ValueError that names the first of these settings that is not an integer of at least 1."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def quick(self: S) -> S:
        """Fewer steps."""
        return self

    @classmethod
    def of_options(cls: type[S], given: Mapping[str, Any], quick: bool) -> S:
        """Build the settings of a command: `given` overrides `quick`, which overrides the defaults. ValueError for
        values that do not fit."""
        settings = cls()
        return replace(settings.quick() if quick else settings, **given)

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[S], content: Mapping[str, Any]) -> S:
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
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"the configuration is of another job or version: {error}") from error


@dataclass(frozen=True)
class RunKey:
    """What tells a run from the others of its job: row, seed, and the part left out (`test`) where a task has one."""

    row: str
    seed: int
    test: str = ""

    @property
    def name(self) -> str:
        """The name of the run, in folders and messages."""
        return f"{self.row}-seed{self.seed}" + f"-{self.test}" * bool(self.test)

    @property
    def fields(self) -> dict[str, Any]:
        """The key as it stands in every line of the logs."""
        return {"row": self.row, "seed": self.seed} | ({"test": self.test} if self.test else {})


class Batches(Protocol):
    """A list of batches, a DataLoader, or the like."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Part:
    """Data that are evaluated together. `kind`: "validation" (from the training domains, to select by), "in" (held out,
    from the training domains), "out" (from domains never trained on). `batches` can be iterated repeatedly."""

    name: str
    kind: str
    batches: Batches


class Task(ABC):
    """What a job trains. Every method is a pure function of its arguments and the settings.

    A batch is (inputs, label int64 [B]); inputs are a tensor or a dict of tensors. The task's docstring is the help of
    its command, and the docstring of its settings' `quick` is the help of --quick.
    """

    command = ""  # the words after dynmoe-tutel
    settings_type: type[Settings]
    settings: Settings
    axes: tuple[str, ...] = ("rows", "seeds")  # settings that say which runs, not what a run computes
    identity: tuple[str, ...] = ()  # keys that `protocol` adds to the settings
    movable: tuple[str, ...] = ()  # settings that the folder does not store: allowed together with --resume
    selection = "last"  # or "validation": the evaluation that the table takes, see report/table.py
    keep_weights = True  # False: the last checkpoint of a finished run keeps the gates alone, a few kilobytes
    checkpoints = True  # False: only at the end, and when stopped
    device = torch.device("cpu")
    resume_options = ""  # of the command line, what --resume needs beside the folder
    about = ""  # a sentence to print under the table

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @classmethod
    def of(cls: type[T], content: Mapping[str, Any], **moved: Any) -> T:
        """Rebuild the task from a folder's protocol and axes. ValueError if they belong to another job or version."""
        known = {name: value for name, value in content.items() if name not in cls.identity}
        return cls(cls.settings_type.from_dict({**known, **moved}))

    @classmethod
    def experiment_name(cls) -> str:
        """The experiment's name in config.json."""
        return cls.command.split()[-1]

    @property
    def plan(self) -> list[RunKey]:
        """The runs in their order: rows are interleaved, so that a busy machine slows all of them alike."""
        return [RunKey(row, seed) for seed in self.settings.seeds for row in self.settings.rows]

    def protocol(self) -> dict[str, Any]:
        """What two jobs must share for their runs to be compared: the settings but the axes, and what identifies the
        data and weights where a task adds it."""
        return {name: value for name, value in self.settings.to_dict().items() if name not in self.axes}

    @abstractmethod
    def build(self, key: RunKey) -> nn.Module:
        """The model at its start, on the CPU; what rows have in common starts with equal weights."""

    @abstractmethod
    def batches(self, key: RunKey, first_step: int) -> Iterator[tuple[Any, Tensor]]:
        """The training batches of the steps from `first_step` on (0-based), the same for every row."""

    @abstractmethod
    def parts(self, key: RunKey, step: int) -> Iterable[Part]:
        """What is evaluated after `step` steps; names and kinds are the same at every step."""

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        """Class scores [B, C] of a batch."""
        return cast(Tensor, model(inputs))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer; the runner sets its learning rate in every step."""
        return torch.optim.Adam(model.parameters(), lr=self.settings.learning_rate, fused=True)

    def learning_rate_share(self, step: int) -> float:
        """Of step 0, 1, ...: linear warm-up, then half a cosine to zero."""
        settings = self.settings
        warmup = max(1, round(settings.warmup * settings.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))

    def adaptive(self, row: str) -> bool:
        """Whether a controller grows and prunes this row's experts."""
        return row.startswith("dynmoe")

    def controller(self, key: RunKey, model: nn.Module, optimizer: torch.optim.Optimizer) -> ExpertController | None:
        """What grows and prunes the run's experts; None where nothing does."""
        if not self.adaptive(key.row):
            return None
        every = self.settings.update_every
        # No update in the last stretch: an expert that grew is trained before it is judged.
        schedule = Schedule(every=every, stop=max(every, self.settings.steps - every))
        return ExpertController(model, optimizer, schedule, seed=key.seed)

    def seconds_beside_runs(self, path: Path) -> float:
        """How long what the job has to do in its folder beside its runs will take; part of the estimate."""
        return 0.0

    def measure(self, path: Path, stop_request: Callable[[], int | None]) -> None:
        """Do that, and keep the results in the folder `path`; return early once `stop_request()` gives a signal."""
        return None

    def report(self, path: Path, console: Any) -> bool:
        """Write the job's results into the folder `path`; False: they are the table of rows and its plots."""
        return False


def walk(size: int, step: int, count: int, stream: Callable[[int], torch.Generator]) -> Tensor:
    """Positions [count] int64 in 0 ... size - 1 that step 0, 1, ... takes.

    Epoch 1, 2, ... is a permutation drawn from `stream(epoch)`; a step may span the end of one, or several.
    """
    first, last = step * count, (step + 1) * count
    picked = []
    for epoch in range(first // size, (last - 1) // size + 1):
        order = torch.randperm(size, generator=stream(epoch + 1))
        start = epoch * size
        picked.append(order[max(first - start, 0) : last - start])
    return torch.cat(picked)


def refuse_bad_choice(name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """ValueError unless `values` are different ones of `allowed`, at least one."""
    unknown = [value for value in values if value not in allowed]
    if unknown or not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be different ones of {', '.join(allowed)}, got {', '.join(values) or 'none'}")
