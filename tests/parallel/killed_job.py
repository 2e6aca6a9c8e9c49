"""A torchrun job that saves every four steps; at the first start, one rank is killed during a save.

The arguments are a folder and "kill" or "resume". The folder gets each rank's first step, and its final states in an
uninterrupted and in the resumed job.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import leave
from training import STEPS, Job

from dynmoe_tutel.checkpoint import distributed

KILLED_AFTER = 12


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, job, begun = dist.get_rank(), Job(max_new_experts=2), distributed.latest(folder)
    if begun is not None:
        job.load(begun)
    (folder / f"{what}-{rank}").write_text(begun.name if begun else "nothing")
    while job.step < STEPS:
        job.train(job.step + 4)
        if what == "kill" and job.step == KILLED_AFTER and rank == 1:
            # the temporary folder exists, and rank 0 waits for this rank's files
            dcp.FileSystemWriter.write_data = _die  # type: ignore[assignment]
        job.save(folder / f"step-{job.step}")
    whole = Job(max_new_experts=2).train(STEPS)
    torch.save([whole.state(), job.state()], folder / f"end-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave()
