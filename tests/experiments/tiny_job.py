"""A job of a few seconds for the tests, and a program to kill in it: `python tiny_job.py FOLDER WHEN STEP`.

WHEN "kill": SIGKILL while the DynMoE run writes its checkpoint of that step. WHEN "wait": print "ready" in that step
and wait for a signal.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from dynmoe_tutel.experiments import job
from dynmoe_tutel.experiments.report import results
from dynmoe_tutel.experiments.run_folder import read_log
from dynmoe_tutel.experiments.runner import Run
from dynmoe_tutel.experiments.train import TrainConfig
from dynmoe_tutel.experiments.vision.vit import ViTConfig

CONFIG = TrainConfig(
    rows=("dense", "top-2", "dynmoe"),
    seeds=(0,),
    steps=12,
    batch_per_domain=2,
    experts=2,
    slots=4,
    update_every=4,
    log_every=2,
    eval_every=4,
    model=ViTConfig(dim=16, hidden=16, heads=2),
)


def quiet() -> Console:
    """A console that writes to `console.file`."""
    return Console(file=io.StringIO(), width=100)


def run_job(path: Path, config: TrainConfig = CONFIG) -> Path:
    """Run the whole job in this process."""
    assert job.start(config, path, quiet()) == 0
    return path


def untimed(path: Path, name: str) -> list[dict[str, Any]]:
    """A log's lines without their times."""
    return [{key: value for key, value in line.items() if key != "step_ms"} for line in read_log(path, name)]


def main(folder: str, when: str, step: int) -> int:
    train_step, rename = Run.train_step, os.rename

    def wait(run: Run) -> None:
        train_step(run)
        if run.row == "dynmoe" and run.step == step:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # until the handler has run
                time.sleep(0.02)

    def kill(source: Any, target: Any) -> None:
        if str(target).endswith(f"dynmoe-seed0/step-{step:06d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    results.write_plots = lambda *_: []
    if when == "wait":
        Run.train_step = wait  # type: ignore[method-assign]
    else:
        os.rename = kill
    return job.start(CONFIG, Path(folder), Console(file=sys.stderr, width=100))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
