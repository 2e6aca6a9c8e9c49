"""What a job trains: its settings, the keys of its runs, the parts of its data, and the `Task` over them.

`train` and the experiments are tasks; `runner` trains them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

MAX_SEED = 2**31
KINDS = ("validation", "in", "out")

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """What every row of a job has in common. ValueError for values out of range; a task adds its own by inheritance."""

    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    learning_rate: float = 2e-3
    warmup: float = 0.1  # share of the steps
    aux_weight: float = 0.01  # GMoE's and upstream DynMoE's
    update_every: int = 25  # steps from one adaptive update of DynMoE to the next
    log_every: int = 5
    eval_every: int = 25
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {list(self.seeds)}")
        if not all(0 <= seed < MAX_SEED for seed in self.seeds):
            raise ValueError(f"seeds must be from 0 to {MAX_SEED - 1}, got {list(self.seeds)}")
        self.refuse_below_one("steps", "update_every", "log_every", "eval_every", "threads")
        if not isinstance(self.learning_rate, float) or not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")

    def refuse_below_one(self, *names: str) -> None:
        """ValueError that names the first of these settings that is not an integer of at least 1."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

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

    A batch is (inputs, label int64 [B]); inputs are a tensor or a dict of tensors.
    """

    name = ""  # of the experiment, in config.json
    settings: Settings
    axes: tuple[str, ...] = ("rows", "seeds")  # settings that say which runs, not what a run computes
    selection = "last"  # or "validation": the evaluation that the table takes, see comparison.py
    keep_weights = True  # False: the last checkpoint of a finished run keeps the gates alone, a few kilobytes
    checkpoints = True  # False: only at the end, and when stopped
    device = torch.device("cpu")
    resume_options = ""  # of the command line, what --resume needs beside the folder

    @property
    def slots(self) -> int:
        """Expert slots of the adaptive rows, for the plots."""
        return 0

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


def refuse_bad_choice(name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """ValueError unless `values` are different ones of `allowed`, at least one."""
    unknown = [value for value in values if value not in allowed]
    if unknown or not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be different ones of {', '.join(allowed)}, got {', '.join(values) or 'none'}")
