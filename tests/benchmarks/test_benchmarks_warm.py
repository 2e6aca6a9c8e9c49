"""Triton later finds what was compiled ahead in its disk cache; without a GPU.

The test process may run Triton's interpreter, in which nothing compiles, so each compilation has its own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]

CODE = """
import sys, time
import torch
from benchmarks import warm
from benchmarks.launches.operations import VARIANTS, run_all
from benchmarks.common.shapes import Shape

warm.run_benchmarks = lambda _, shape: run_all(shape, torch.bfloat16, VARIANTS["default"], ("router_losses",))
for share, shares, seconds in eval(sys.argv[1]):
    end = time.monotonic() + seconds
    found = warm.compile_share("sm_90", [Shape(64, 16, 16, 4, 2)], share, shares, end, False)
    print(len(found.planned), len(found.done), found.wrong, found.refused)
"""


def compile_shares(tmp_path: Path, *shares: tuple[int, int, float]) -> tuple[list[tuple[int, int]], set[str]]:
    """For shares (which, of how many, seconds): how many launches were to compile and did, and the cache's content."""
    script, cache = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(CODE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), repr(shares)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert all(failed_and_refused == "[] []" for *_, failed_and_refused in lines)
    kernels = {str(path.relative_to(cache)) for path in cache.glob("**/*.cubin")}
    return [(int(planned), int(compiled)) for planned, compiled, _ in lines], kernels


def test_shares_are_disjoint_and_another_process_finds_all_of_them(tmp_path: Path) -> None:
    """A share without time compiles nothing, two halves compile everything, and the whole then adds nothing."""
    (late, first, second), kernels = compile_shares(tmp_path, (0, 2, 0), (0, 2, PATIENCE), (1, 2, PATIENCE))
    assert late == (first[0], 0)
    assert first[0] == first[1] > 0
    assert second[0] == second[1] > 0
    assert len(kernels) == first[0] + second[0]
    assert compile_shares(tmp_path, (0, 1, PATIENCE)) == ([(len(kernels), len(kernels))], kernels)


REFUSED = """
import errno, subprocess
import torch
from benchmarks.common import patience; from benchmarks import warm
from benchmarks.launches.operations import VARIANTS, run_all

patience.time.sleep = lambda seconds: None
warm.run_benchmarks = lambda _, shape: run_all(shape, torch.bfloat16, VARIANTS["default"], ("router_losses",))
warm.in_processes = lambda function, tasks, jobs: (function(*task) for task in tasks)

class Refused(subprocess.Popen):
    def __init__(self, *_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

subprocess.Popen = Refused
print(warm.main(["--arch", "sm_90", "--shape", "vit-s", "--jobs", "1"]))
"""


def test_a_compiler_that_could_not_be_started_is_no_failure_of_the_kernel(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(REFUSED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True)
    *said, counts, status = done.stdout.splitlines()
    assert said, done.stderr
    assert all(line.startswith("NOT STARTED ") and "BlockingIOError" in line for line in said)
    assert counts.startswith(f"0 of {len(said)} kernels compiled in ")
    assert int(status) == 101


def run_program(program: str, *arguments: str, **variables: str) -> list[str]:
    """The lines that a program prints in a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_it_compiles_exactly_what_the_benchmarks_launch() -> None:
    """Plain, gated, and with a number of tokens that is no multiple of 16: exact, bounded and full capacity, with and
    without saving, other engines, smoke, the fit, skewed loads. The program records launches on tensors with values."""
    shapes = ("(400, 64, 96, 8, 2)", "(400, 64, 96, 8, 2, True)", "(401, 72, 88, 7, 2)")
    lines = run_program(str(Path(__file__).with_name("recorded_launches.py")), *shapes)
    assert len(lines) == 3, "\n".join(lines)
    assert all(int(line.split(": ")[1].split()[0]) > 35 and line.endswith(" in both") for line in lines)


SHAPE_AT_FAULT = """
from benchmarks import warm
from benchmarks.common.shapes import Shape

def run_benchmarks(_, shape):
    if shape.T == 1:
        raise RuntimeError("not this one")

warm.run_benchmarks = run_benchmarks
print(warm.compile_share("sm_90", [Shape(1, 8, 8, 2, 1), Shape(2, 8, 8, 2, 1)], 0, 1, float("inf"), False).wrong)
"""


def test_a_shape_whose_calls_fail_ends_no_other(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SHAPE_AT_FAULT)
    (line,) = run_program(str(tmp_path / "script.py"))
    assert line == "['the calls of T 1, D 8, H 8, E 2, k 1: RuntimeError: not this one']"


LAUNCHER = """
import torch
from triton.backends.nvidia import driver as nvidia
from benchmarks import warm
from benchmarks.common.shapes import Shape
from benchmarks.launches.operations import VARIANTS, run_all

made = []
nvidia.make_launcher = None  # as in 3.6; in 3.7 there is no code to compile
nvidia.CudaLauncher = lambda source, metadata: made.append((source.fn.__name__, metadata.num_warps))
warm.run_benchmarks = lambda _, shape: run_all(shape, torch.bfloat16, VARIANTS["default"], ("router_losses",))
found = warm.compile_share("sm_90", [Shape(64, 16, 16, 4, 2)], 0, 1, float("inf"), True)
print(len(made) == len(found.done) > 0, found.wrong)
"""


def test_launchers_in_c_are_compiled_too(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LAUNCHER)
    assert run_program(str(tmp_path / "script.py"), TRITON_CACHE_DIR=str(tmp_path / "cache")) == ["True []"]
