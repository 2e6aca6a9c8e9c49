"""A tool that could not be started says nothing of what it was to work on: it is tried again, then reported as such.

A busy machine refuses processes, threads or memory for a while. Imports nothing heavy: `gpu` runs without torch.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

Result = TypeVar("Result")

NOT_STARTED = 101  # exit status where nothing is wrong, but a tool could not be started; wrong kernels count up to 100
PAUSES = (0.5, 2.0, 8.0)  # seconds before each further try
_LASTING = (FileNotFoundError, PermissionError)  # no pause brings a missing program
# how threads of C++ and of Python, tools in what they print, and Triton of a tool without memory say it
_REFUSALS = (
    os.strerror(errno.EAGAIN),
    os.strerror(errno.ENOMEM),
    "can't start new thread",
    f"error code -{signal.SIGKILL.value}",
)


class NotStartedError(RuntimeError):
    """The machine refused a process, a thread or memory, at every try."""


def is_refusal(error: BaseException) -> bool:
    """Whether an error is the machine's, not that of what was worked on."""
    if isinstance(error, (OSError, MemoryError, BrokenExecutor, NotStartedError)):
        return True
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode == -signal.SIGKILL  # of a machine without memory: nothing here kills a tool
    return any(refusal in str(error) for refusal in _REFUSALS)


def patiently(call: Callable[[], Result], pauses: Sequence[float] = PAUSES) -> Result:
    """The call's result, tried again after each pause while the machine refuses; then a `NotStartedError`."""
    for pause in (*pauses, None):
        try:
            return call()
        except Exception as error:
            if not is_refusal(error):
                raise
            if pause is None or isinstance(error, _LASTING):
                raise NotStartedError(_reason(error)) from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def in_processes(
    function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], jobs: int, pauses: Sequence[float] = PAUSES
) -> Iterator[Result | NotStartedError]:
    """`function(*task)` of every task in their order, from `jobs` processes.

    Where one cannot be started, or ends in the middle, a single one goes on after a pause: it asks least of the
    machine, and the task at fault is the first that is left. After the last pause that one is given up, with the error.
    """
    left, tried = list(tasks), 0
    while left:
        done, before = 0, set(active_children())
        try:
            # a forked child would inherit the threads of torch; a fresh interpreter imports for some seconds instead
            with ProcessPoolExecutor(min(jobs, len(left)), mp_context=get_context("spawn")) as pool:
                for result in pool.map(function, *zip(*left, strict=True)):
                    yield result
                    done, tried = done + 1, 0
        except (OSError, BrokenExecutor) as error:
            for child in set(active_children()) - before:  # started before another could not be: it waits for ever
                child.kill()
            if tried < len(pauses):
                time.sleep(pauses[tried])
                tried, jobs = tried + 1, 1
            else:
                yield NotStartedError(_reason(error))
                done += 1
        left = left[done:]


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
