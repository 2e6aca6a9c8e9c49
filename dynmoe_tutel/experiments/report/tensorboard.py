"""TensorBoard scalars of a job, where tensorboard is installed: a reporter that writes what is logged.

They are a view of metrics.jsonl: when a run is resumed its scalars are written anew from the log, and when they cannot
be written the job goes on without them.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynmoe_tutel.experiments.run_folder import METRICS, read_log
from dynmoe_tutel.experiments.task import RunKey
from dynmoe_tutel.metrics import layer_scalars

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"


def available() -> bool:
    """Whether tensorboard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


class ScalarWriter:
    """Writes to FOLDER/<run> in the run folder `path`. Needs tensorboard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: Any = None

    def run_skipped(self, run: str, steps: int) -> None:
        pass

    def run_started(self, run: str, step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.path / FOLDER / run
        try:
            shutil.rmtree(folder, ignore_errors=True)
            self._writer = SummaryWriter(str(folder))
        except (OSError, UnicodeError) as error:
            self._give_up(error)
        for line in read_log(self.path, METRICS):
            if RunKey(line["row"], line["seed"], line.get("test", "")).name == run:
                self.logged(run, line)

    def stepped(self, run: str, step: int) -> None:
        pass

    def logged(self, run: str, line: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        try:
            for name, value in scalars(line):
                self._writer.add_scalar(name, value, line["step"])
        except (OSError, UnicodeError) as error:
            self._give_up(error)

    def run_ended(self, run: str, line: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        """Write what is left."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except (OSError, UnicodeError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        logger.warning("TensorBoard scalars cannot be written, going on without: %s", error)


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of every number in a line of the metrics that is worth a curve."""
    kind = line["kind"]
    for key in ("loss", "aux", "accuracy", "validation_accuracy", "in_accuracy", "out_accuracy", "step_ms"):
        if line.get(key) is not None:
            yield f"{kind}/{key}", line[key]
    for name, value in layer_scalars(line["layers"]):
        yield f"{kind}/{name}", value
