"""When record windows open and experts are updated, counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """When to update, in optimizer steps.

    Updates come after steps `start + n * every` (n = 0, 1, ...), from the first that has a whole window before it
    up to step `stop`. The window of an update holds the forwards of the last `window` optimizer steps (None:
    `every`, so that windows touch). `Schedule(every=900, window=300, start=600)` is the built-in schedule of
    DynMoE-DeepSpeed: updates at 600, 1500, 2400, ..., each from 300 steps.

    Raises ValueError if a value is not a positive integer (`start` may be 0), `window` > `every`, or `stop` comes
    before the first update.
    """

    every: int = 300
    window: int | None = None
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("window", 1), ("start", 0), ("stop", 1)):
            value = getattr(self, name)
            if value is None and name in ("window", "stop"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"schedule: {name} must be an integer of at least {least}, got {value!r}")
        if self.window_steps > self.every:
            raise ValueError(f"schedule: window must be at most every ({self.every}), got {self.window}")
        if self.stop is not None and self.stop < self._update_after(0):
            first = self._update_after(0)
            raise ValueError(f"schedule: stop must be at least {first}, the first update, got {self.stop}")

    @classmethod
    def of(cls, value: Schedule | Mapping[str, Any] | int | None) -> Schedule:
        """A schedule from a `Schedule`, a mapping of its fields, the number `every`, or None (the defaults)."""
        if isinstance(value, Schedule):
            return value
        if value is None:
            return cls()
        if isinstance(value, int):
            return cls(every=value)
        if not isinstance(value, Mapping):
            raise ValueError(f"schedule must be a Schedule, a dict, an int (every) or None, got {value!r}")
        allowed = [f.name for f in fields(cls)]
        unknown = [key for key in value if key not in allowed]
        if unknown:
            raise ValueError(f"schedule: unknown key {unknown[0]!r}, allowed are {', '.join(allowed)}")
        return cls(**value)

    @property
    def window_steps(self) -> int:
        """Optimizer steps in a window."""
        return self.every if self.window is None else self.window

    def updates_at(self, step: int) -> bool:
        """Whether an update follows the `step`-th optimizer step."""
        return step > 0 and self._update_after(step - 1) == step and not self._stopped(step)

    def records_at(self, step: int) -> bool:
        """Whether forwards made after `step` optimizer steps belong to a window."""
        update = self._update_after(step)
        return update - self.window_steps <= step and not self._stopped(update)

    def opens_at(self, step: int) -> bool:
        """Whether a window opens after the `step`-th optimizer step (0: at construction)."""
        return self.records_at(step) and self._update_after(step) - self.window_steps == step

    def _update_after(self, step: int) -> int:
        earliest = max(step + 1, self.window_steps)
        return self.start + max(0, -(-(earliest - self.start) // self.every)) * self.every

    def _stopped(self, update: int) -> bool:
        return self.stop is not None and update > self.stop
