"""`dynmoe-tutel run`: an unedited training script finds `tutel` and `deepspeed` with what this package adds to them.

With Tutel installed, gate types are registered with it; without, `tutel_stand_in` stands in. `deepspeed` gets DynMoE's
`MoE` and `initialize` when the script imports it. The script then runs as python would run it.
"""

from __future__ import annotations

import builtins
import importlib.util
import logging
import os
import runpy
import sys
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType

from .. import tutel_stand_in
from ..adaptive.events import EVENTS, is_first_rank, is_shown
from .children import prepare_children
from .late_registration import provide_deepspeed

__all__ = ["main", "run"]

_TOOLS = {"tutel.checkpoint.gather": "gather", "tutel.checkpoint.scatter": "scatter"}
_USAGE = "give SCRIPT ARGS..., or -m MODULE ARGS..."
_HELP = """usage: dynmoe-tutel run SCRIPT ARGS...
       dynmoe-tutel run -m MODULE ARGS...

Run an unedited script that imports tutel, with this package's gate types, whether Tutel is installed or not; or one
that imports deepspeed, which must be installed, with DynMoE's MoE for k=-1.
"""


def run(arguments: list[str]) -> int:
    """Run SCRIPT ARGS..., or -m MODULE ARGS..., as `__main__`; its exit code.

    An uncaught exception is printed as python prints it. `sys.argv`, `sys.path`, `__main__` and Tutel's modules are put
    back afterwards; threads that the script leaves are not waited for. ValueError where there is no such script or
    module.
    """
    with ExitStack() as undo:
        return _run(arguments, undo)


def main(arguments: list[str]) -> int:
    """As `run`, in a process that ends with the script; what cannot be run becomes one line and exit code 1 or 2.

    Nothing is put back: the threads, pools and exit functions that the script leaves find everything as it was, and
    python itself waits for them or ends them.
    """
    if arguments[:1] == ["--help"]:
        sys.stdout.write(_HELP)
        return 0
    try:
        return _run(arguments, ExitStack())
    except (ValueError, ImportError, OSError) as error:
        sys.stderr.write(f"Error: {' '.join(str(error).split())}\n")
        return 1 if isinstance(error, ImportError) else 2


def _run(arguments: list[str], undo: ExitStack) -> int:
    """What `run` does; `undo` puts the process back."""
    target, is_module, rest = _split(arguments)
    tool = _TOOLS.get(target) if is_module else None
    _keep_process(undo)
    show_log(undo)
    _ask_for_events(undo)
    sys.argv[:] = [target, *rest]
    _set_first_path("" if is_module else target)
    provide_tutel(undo, needed=tool is not None)
    provide_deepspeed(undo)
    undo.callback(prepare_children())
    if tool is not None:
        from .. import tutel_backend

        return _exit_code(lambda: tutel_backend.checkpoint_tool(tool))
    if is_module:
        return _exit_code(lambda: _run_module(target))
    return _exit_code(lambda: _run_file(target))


def _split(arguments: list[str]) -> tuple[str, bool, list[str]]:
    """The script or module, whether it is a module, and its arguments."""
    if not arguments:
        raise ValueError(f"nothing to run: {_USAGE}")
    first, *rest = arguments
    if first.startswith("-m"):
        module, rest = (first[2:], rest) if len(first) > 2 else (rest[0] if rest else "", rest[1:])
        if not module or not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"-m {module!r} is not the name of a module: {_USAGE}")
        return module, True, rest
    if first.startswith("-"):
        raise ValueError(f"unknown option {first!r} before the script: {_USAGE}")
    if not os.path.exists(first):
        raise ValueError(f"script {first!r} does not exist: {_USAGE}")
    if os.path.isdir(first) and not os.path.isfile(os.path.join(first, "__main__.py")):
        raise ValueError(f"script {first!r} is a folder without __main__.py: {_USAGE}")
    return first, False, rest


def _is_archive(path: str) -> bool:
    """Whether python would look for `__main__` in it, or for bytecode: runpy's part."""
    return os.path.isdir(path) or path.endswith(".pyc") or zipfile.is_zipfile(path)


def _run_file(path: str) -> None:
    if _is_archive(path):
        runpy.run_path(path, run_name="__main__")
        return
    path = os.path.abspath(path)
    main = ModuleType("__main__")  # runpy's would have the relative path, and sys.argv[0] the absolute one
    main.__dict__.update(__file__=path, __builtins__=builtins, __loader__=SourceFileLoader("__main__", path))
    sys.modules["__main__"] = main
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, main.__dict__)


class _NoModule(Exception):
    """There is no module of that name; becomes a ValueError of `run`."""


def _run_module(name: str) -> None:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # what one of its packages imports is missing
        found = None
    except ValueError:  # __main__ and other modules without a spec
        found = None
    if found is None:
        raise _NoModule(f"module {name!r} does not exist: {_USAGE}")
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _set_first_path(script: str) -> None:
    """What python puts first: the script's folder, links followed; for a module (""), the current folder."""
    if sys.flags.isolated or getattr(sys.flags, "safe_path", False):
        return
    if not script:
        first = os.getcwd()
    elif _is_archive(script) and not script.endswith(".pyc"):
        first = os.path.abspath(script)
    else:
        first = os.path.dirname(os.path.realpath(script))
    sys.path[:1] = [first]


def provide_tutel(undo: ExitStack, needed: bool = False) -> None:
    """Tutel with this package's gate types, or the stand-in unless Tutel itself is `needed`."""
    if tutel_stand_in.tutel_is_importable():
        from .. import tutel_backend

        if not tutel_backend.registered():
            undo.callback(tutel_backend.unregister)
        tutel_backend.register()
        return
    if not tutel_stand_in.installed():
        undo.callback(tutel_stand_in.remove)
    if not needed:
        tutel_stand_in.install()


def _keep_process(undo: ExitStack) -> None:
    """Let `undo` put `sys.argv`, `sys.path` and `__main__` back."""
    argv, path, main = list(sys.argv), list(sys.path), sys.modules.get("__main__")

    def put_back() -> None:
        sys.argv[:], sys.path[:] = argv, path
        if main is not None:
            sys.modules["__main__"] = main

    undo.callback(put_back)


def _exit_code(script: Callable[[], object]) -> int:
    """Call `script` and give the exit code that python would end with."""
    try:
        script()
    except _NoModule as error:
        raise ValueError(str(error)) from None
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return int(stop.code or 0)
        sys.stderr.write(f"{stop.code}\n")
        return 1
    except BaseException as error:
        error.__traceback__ = _frames_of_script(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _frames_of_script(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of this file and of runpy that lead to the script."""
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__") not in (__name__, "runpy", "importlib._bootstrap"):
            break
        traceback = traceback.tb_next
    return traceback


class _Shown(logging.Handler):
    """Writes this package's records to stderr until the script has configured logging, then hands them to its root.

    What is no warning, only the first rank writes.
    """

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if root.handlers:
            if record.levelno >= root.level:
                root.handle(record)
        elif self._is_alone() and (record.levelno >= logging.WARNING or is_first_rank()):
            sys.stderr.write(f"{self.format(record)}\n")

    def shows(self, level: int) -> bool:
        """Whether a record of this level is written, by this handler or the root's."""
        root = logging.getLogger()
        return is_shown(root, level) if root.handlers else self._is_alone()

    def _is_alone(self) -> bool:
        return logging.getLogger("dynmoe_tutel").handlers == [self]


def _ask_for_events(undo: ExitStack) -> None:
    """Let a script that logs warnings alone show how experts grow, and its child processes too."""
    if EVENTS not in os.environ:
        os.environ[EVENTS] = "1"
        undo.callback(os.environ.pop, EVENTS, None)


def show_log(undo: ExitStack) -> None:
    """INFO of "dynmoe_tutel" on stderr unless the script configures logging."""
    logger, handler = logging.getLogger("dynmoe_tutel"), _Shown()
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False  # the handler does it, by the level that the script gave to the root
    if level == logging.NOTSET:
        logger.setLevel(logging.INFO)

    def put_back() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate

    undo.callback(put_back)
