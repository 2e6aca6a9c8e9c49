"""Retries a tool that could not start, then reports that, because it says nothing about the tool's input.

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

NOT_STARTED = 101  # exit status if nothing is wrong but a tool could not start; wrong kernels count up to 100
PAUSES = (0.5, 2.0, 8.0)  # seconds before each further try
_LASTING = (FileNotFoundError, PermissionError)  # waiting does not help
# the messages of C++ threads, of Python threads, of tools, and of Triton for a tool without memory
_REFUSALS = (
    os.strerror(errno.EAGAIN),
    os.strerror(errno.ENOMEM),
    "can't start new thread",
    f"error code -{signal.SIGKILL.value}",
)


class NotStartedError(RuntimeError):
    """The machine refused a process, a thread or memory at every try."""


def is_refusal(error: BaseException) -> bool:
    """Whether an error is the machine's fault, not the input's."""
    if isinstance(error, (OSError, MemoryError, BrokenExecutor, NotStartedError)):
        return True
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode == -signal.SIGKILL  # out of memory: nothing here kills a tool
    return any(refusal in str(error) for refusal in _REFUSALS)


def patiently(call: Callable[[], Result], pauses: Sequence[float] = PAUSES) -> Result:
    """The call's result. Retries after each pause while the machine refuses, then raises `NotStartedError`."""
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
    """`function(*task)` of every task in order, from `jobs` processes.

    If a process cannot start or dies, a single process goes on after a pause: it needs least of the machine, and the
    task at fault is then the first one left. After the last pause that task is given up, with its error.
    """
    left, tried = list(tasks), 0
    while left:
        done, before = 0, set(active_children())
        try:
            # a forked child would inherit torch's threads; a fresh interpreter imports for some seconds instead
            with ProcessPoolExecutor(min(jobs, len(left)), mp_context=get_context("spawn")) as pool:
                for result in pool.map(function, *zip(*left, strict=True)):
                    yield result
                    done, tried = done + 1, 0
        except (OSError, BrokenExecutor) as error:
            for child in set(active_children()) - before:  # started before another failed to: would wait for ever
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
