"""A torchrun job that saves every four steps, and of which, the first time, one rank is killed while it saves.

The argument is a folder. Written there: the state of each rank at the end, and where each start began.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from training import STEPS, Job

from dynmoe_tutel import distributed_checkpoint

KILLED_AFTER = 12


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank()
    job, begun = Job(max_new_experts=2), distributed_checkpoint.latest(folder)
    if begun is not None:
        job.load(begun)
    (folder / f"begun-{attempt}-{rank}").write_text(begun.name if begun else "nothing")
    while job.step < STEPS:
        job.train(job.step + 4)
        if attempt == 0 and job.step == KILLED_AFTER and rank == 1:
            # the temporary folder is there, and rank 0 waits for what this rank writes
            dcp.FileSystemWriter.write_data = _die  # type: ignore[assignment]
        job.save(folder / f"step-{job.step}")
    torch.save(job.state(), folder / f"end-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
