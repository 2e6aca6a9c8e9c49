"""The launches of a step, so that they cannot grow unseen, and that a remembered launch is Triton's own.

The test process may run Triton's interpreter, in which nothing is launched, so each test has a process of its own.
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
MOST = {  # launches of forward and backward
    "exact": (8, 13),
    "exact, temperature": (11, 18),
    "exact, GLU": (8, 13),
    "exact, autocast, fp32 weights": (12, 17),
    "exact, forward in eval": (8, 0),
    "bounded": (19, 13),
    "full": (8, 13),
}


def output_of(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_step_launches_no_more() -> None:
    table = output_of("-m", "benchmarks.launches", "--repeats", "0").splitlines()
    assert [line.count("|") for line in table] == [5] * (2 + len(MOST))
    for line in table[2:]:
        mode, *parts, total = (cell.strip() for cell in line.strip("|").split("|"))
        launches = tuple(sum(map(int, part.split(" + "))) for part in parts)
        assert int(total) == sum(launches)
        assert all(n <= most for n, most in zip(launches, MOST[mode], strict=True)), line


REMEMBERED = """
from unittest import mock
import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from benchmarks.launches.record import _specialise
from benchmarks.launches.step import MODES, Step, without_gpu
from dynmoe_tutel.kernels.gpu import launch
from dynmoe_tutel.kernels.gpu.row_sums import expert_sum_kernel as kernel

def described(a):
    return (a.dtype, tuple(a.shape)) if isinstance(a, torch.Tensor) else a

sent, own = [], []
run = JITFunction.run
reached = property(lambda self: lambda *a: sent.append((self.name, a[:4], *map(described, a[9:]))))
with (
    without_gpu(1200),
    mock.patch.object(CompiledKernel, "run", reached),
    mock.patch.object(JITFunction, "run", lambda self, *a, **given: own.append(self) or run(self, *a, **given)),
):
    step = Step(MODES["exact"])
    step.whole()
    first, by_triton = sent[:], len(own)
    sent.clear(), own.clear()
    step.whole()
    assert sent == first and not own, (sent, first, own)
    assert 10 < by_triton <= len(first)

    # a launch of another form, on another device or with a hook is Triton's own
    parts, out, offsets = torch.zeros(64), torch.zeros(64), torch.zeros(9, dtype=torch.int32)
    def launches(parts=parts, out=out, E=2, N=32, size=1024, warps=4):
        own.clear()
        kernel[(1,)](parts, offsets, out, E, N, BLOCK_M=16, BLOCK_N=size, BLOCK_E=16, num_warps=warps)
        return len(own)
    assert [launches(), launches(), launches(E=5), launches(N=48)] == [1, 0, 0, 0]
    assert [launches(N=1), launches(N=33), launches(parts=parts[1:]), launches(out=out.half())] == [1] * 4
    assert [launches(size=512), launches(warps=8), launches()] == [1, 1, 0]
    with mock.patch.object(driver.active, "get_current_device", lambda: 1):
        assert launches() == 1
    hooks = []
    kernel.add_pre_run_hook(lambda *a, **given: hooks.append(1))
    assert launches() == len(hooks) == 1
    kernel.pre_run_hooks.clear()

    # equal keys mean one form for Triton
    values = [1, 2, 16, 17, 2**31, 2**31 + 16, -16, -1, None, parts, parts[1:], parts.half(), parts.half()[1:]]
    for a in values:
        for b in values:
            if launch._key((a,), {}) == launch._key((b,), {}):
                assert _specialise(kernel.params[0], a, False) == _specialise(kernel.params[0], b, False), (a, b)
print("done")
"""


def test_a_remembered_launch_is_tritons_own() -> None:
    assert output_of("-c", REMEMBERED) == "done\n"
