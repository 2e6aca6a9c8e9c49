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

from dynmoe_tutel.experiments import experiment
from dynmoe_tutel.experiments.experiment import VERSIONS
from dynmoe_tutel.experiments.report import plots
from dynmoe_tutel.experiments.run_folder import RUNS, RunFolder, checkpoints_of, read_log
from dynmoe_tutel.experiments.runner import Run, run_all
from dynmoe_tutel.experiments.vision.digits_task import DigitsTask, TrainConfig
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


def start(config: TrainConfig, path: Path, console: Console) -> int:
    return experiment.start(DigitsTask(config), path, console)


def resume(path: Path, console: Console) -> int:
    return experiment.resume(path, DigitsTask, console)


def run_job(path: Path, config: TrainConfig = CONFIG) -> Path:
    """Run the whole job in this process."""
    assert start(config, path, quiet()) == 0
    return path


def start_shared(path: Path, config: TrainConfig = CONFIG) -> None:
    """Do all runs in one run folder, as earlier versions of `train` did, without a table."""

    class Silent:
        def __getattr__(self, _name: str) -> Any:
            return lambda *_: None

    with RunFolder.create(path, {"job": config.to_dict(), **VERSIONS}) as folder:
        run_all(DigitsTask(config), DigitsTask(config).plan, folder, Silent())


def run_folder(path: Path, run: str) -> Path:
    """The run folder of a run: its own, or the one that all runs share."""
    return path / RUNS / run if (path / RUNS).exists() else path


def checkpoints(path: Path, run: str) -> list[Path]:
    """The checkpoints of a run of a job, earliest first."""
    return checkpoints_of(run_folder(path, run), run)


def lines(path: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a job's logs, or of a run folder's, run by run."""
    folders = [folder for folder in [path, *sorted((path / RUNS).glob("*"))] if (folder / name).exists()]
    found = [line for folder in folders for line in read_log(folder, name)]
    return sorted(found, key=lambda line: (line["row"], line["seed"]))


def untimed(path: Path, name: str) -> list[dict[str, Any]]:
    """The lines of these logs without their times."""
    return [{key: value for key, value in line.items() if key != "step_ms"} for line in lines(path, name)]


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

    plots.draw = lambda *_: {}
    experiment.estimate = lambda *_: 0.0
    if when == "wait":
        Run.train_step = wait  # type: ignore[method-assign]
    else:
        os.rename = kill
    return start(CONFIG, Path(folder), Console(file=sys.stderr, width=100))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
