"""The folder of a job: its configuration, its logs as JSON lines, its checkpoints and its results.

    config.json  metrics.jsonl  events.jsonl  table.md  table.json  *.png
    checkpoints/<run>/step-<n>/{state.json, tensors.safetensors}

A job is a sequence of runs that write to the same logs. A checkpoint says how long the logs were when it was
taken; to resume is to cut them back to that. One process at a time may write. Knows nothing of what is trained.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dynmoe_tutel.checkpoint import TEMPORARY, is_checkpoint, read_checkpoint, write_checkpoint, write_file

CONFIG = "config.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
CHECKPOINTS = "checkpoints"
RUNS = "runs"  # in an experiment's folder: its run folders
LOGS = (METRICS, EVENTS)
STEP = "step-"


class RunFolder:
    """An open run folder, to be used in a `with` statement. Made by `create` or `resume`.

    Every method raises ValueError that names the folder where it cannot be written (permissions, disk space),
    and says which checkpoint is the last one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_checkpoint: Path | None = None
        self._logs: dict[str, BinaryIO] = {}

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> RunFolder:
        """A new folder with this configuration. ValueError where the path is taken or cannot be written."""
        folder = cls(Path(path))
        if folder.path.is_dir() and any(folder.path.iterdir()):
            raise ValueError(
                f"run folder {folder.path} is not empty: name another, or continue the job in it with --resume"
            )
        with folder._writing():
            folder.path.mkdir(parents=True, exist_ok=True)
            (folder.path / CHECKPOINTS).mkdir()
        folder.write(CONFIG, json.dumps(config, indent=2) + "\n")
        folder._open_logs()
        return folder

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> RunFolder:
        """An existing folder. ValueError where it is none, is damaged, or another process writes to it."""
        folder = cls(Path(path))
        read_config(folder.path)
        folder._open_logs()
        with folder._writing():
            (folder.path / CHECKPOINTS).mkdir(exist_ok=True)
        for leftover in [*folder.path.glob(f"{TEMPORARY}*"), *folder.path.glob(f"{CHECKPOINTS}/*/{TEMPORARY}*")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for log in self._logs.values():
            log.close()
        self._logs.clear()

    def log(self, name: str, line: Mapping[str, Any]) -> None:
        """Append one line to METRICS or EVENTS; it has left this process when the method returns."""
        content = memoryview(json.dumps(line, allow_nan=False).encode() + b"\n")
        with self._writing():
            while content:
                content = content[self._logs[name].write(content) :]

    def write(self, name: str, content: bytes | str) -> None:
        """Put a file into the folder, atomically."""
        with self._writing():
            write_file(self.path / name, content)

    def save(self, run: str, step: int, state: Mapping[str, Any]) -> Path:
        """Write the run's checkpoint of that step, then remove its earlier ones. Repeated for a step: nothing."""
        folder = self.path / CHECKPOINTS / run / f"{STEP}{step:06d}"
        if not folder.exists():
            with self._writing():
                for log in self._logs.values():
                    os.fsync(log.fileno())
                folder.parent.mkdir(exist_ok=True)
                write_checkpoint(folder, {**state, "log_bytes": self._log_bytes()})
                for earlier in checkpoints_of(self.path, run)[:-1]:
                    shutil.rmtree(earlier)
        self.last_checkpoint = folder
        return folder

    def load(self, run: str) -> dict[str, Any] | None:
        """The state of the run's last checkpoint, or None where it has none."""
        found = checkpoints_of(self.path, run)
        if not found:
            return None
        self.last_checkpoint = found[-1]
        try:
            return read_checkpoint(found[-1])
        except ValueError as error:
            raise ValueError(f"{error}. Remove {found[-1]} to repeat this run from its start") from error

    def rewind(self, state: Mapping[str, Any] | None) -> None:
        """Cut the logs back to what they were when that state was saved (None: to nothing)."""
        for name, log in self._logs.items():
            length = 0 if state is None else state["log_bytes"][name]
            size = os.fstat(log.fileno()).st_size
            if size < length:
                raise ValueError(
                    f"{self.path / name} has {size} bytes, the checkpoint was taken at {length}: it was cut or replaced"
                )
            with self._writing():
                log.truncate(length)

    def _log_bytes(self) -> dict[str, int]:
        return {name: os.fstat(log.fileno()).st_size for name, log in self._logs.items()}

    def _open_logs(self) -> None:
        with self._writing():
            for name in LOGS:
                self._logs[name] = (self.path / name).open("ab", buffering=0)
        if not _lock(self._logs[METRICS]):
            self.__exit__(None, None, None)
            raise ValueError(f"run folder {self.path} is in use by another process")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = ""
            if self.last_checkpoint is not None:
                kept = (
                    f". The last checkpoint, {self.last_checkpoint}, is whole: when the cause is removed, "
                    f"continue with --resume {self.path}"
                )
            reason = error.strerror or str(error)
            raise ValueError(f"run folder {self.path} cannot be written: {reason}{kept}") from error


class NoFolder(RunFolder):
    """Takes the logs of runs that only measure, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__(Path())

    def log(self, name: str, line: Mapping[str, Any]) -> None:
        pass


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a run folder. ValueError where there is none, or it cannot be read or is not JSON."""
    try:
        config = json.loads((path / CONFIG).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not a run folder: it has no {CONFIG}") from None
    except OSError as error:
        raise ValueError(f"{path / CONFIG} cannot be read: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / CONFIG} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG} does not hold a configuration")
    return config


def read_log(path: Path, name: str) -> list[dict[str, Any]]:
    """The lines of METRICS or EVENTS in a run folder; a last line that is being written is left out."""
    try:
        content = (path / name).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is not a run folder: it has no {name}") from None
    except OSError as error:
        raise ValueError(f"{path / name} cannot be read: {error.strerror or error}") from error
    whole = content[: content.rfind(b"\n") + 1].splitlines()
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / name} is damaged: {error}") from error


def runs_of(path: Path) -> list[str]:
    """The names of the runs that have a checkpoint, sorted."""
    return sorted(folder.name for folder in (path / CHECKPOINTS).glob("*") if checkpoints_of(path, folder.name))


def checkpoints_of(path: Path, run: str) -> list[Path]:
    """The checkpoints of a run, earliest first."""
    found = (path / CHECKPOINTS / run).glob(f"{STEP}*")
    return sorted(folder for folder in found if is_checkpoint(folder))


def _lock(file: BinaryIO) -> bool:
    """Whether this process now holds the file; held until it is closed or the process dies."""
    try:
        import fcntl
    except ImportError:  # not on Windows; there the user takes care
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
