"""What `doctor` prints: what this machine can run, what is missing, and what to do about it.

Optional packages are looked up without importing them; Tutel, whose import may compile or abort, is tried in a process
of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from dynmoe_tutel.experiments.registry import EXPERIMENTS, MODULES
from dynmoe_tutel.kernels.operation import numba_is_installed
from dynmoe_tutel.version import __version__

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 11)
TUTEL_TIMEOUT = 60
# the packages of every extra; the registry lists those of experiments
EXTRAS: dict[str, tuple[str, ...]] = {
    "experiments": ("scikit-learn", "scipy", "matplotlib", "rich", "typer", "safetensors"),
    **{each.name: each.packages for each in EXPERIMENTS if each.packages},
    "emoe": ("k-means-constrained",),
    "lightning": ("lightning",),
    "tensorboard": ("tensorboard",),
}
MARKS = {"ok": "[green]ok[/green]", "missing": "[red]missing[/red]", "absent": "[yellow]absent[/yellow]"}


@dataclass(frozen=True)
class Finding:
    """One line: `status` is "ok", "missing" (needed) or "absent" (can be done without); `advice` says what to do."""

    name: str
    status: str
    detail: str
    advice: str = ""


def examine() -> list[Finding]:
    """All findings on this machine."""
    gpu = torch.cuda.is_available()
    return [
        Finding("dynmoe_tutel", "ok", __version__),
        _python(),
        _torch(),
        Finding("threads", "ok", f"{torch.get_num_threads()} of torch, {os.cpu_count()} cores"),
        _bf16(),
        _numba(),
        _gpu(gpu),
        _triton(gpu),
        _compiler(),
        _tutel(),
        *(_package(extra, name) for extra, packages in EXTRAS.items() for name in packages),
    ]


def report(console: Console) -> bool:
    """Print the findings and what follows from them; whether everything that is needed is there."""
    findings = examine()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "", "found", "what to do"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        table.add_row(finding.name, MARKS[finding.status], finding.detail, finding.advice)
    console.print(table)
    status = {finding.name: finding.status for finding in findings}
    needed = all(value != "missing" for value in status.values())
    extras = {extra: all(status[name] == "ok" for name in packages) for extra, packages in EXTRAS.items()}
    console.print()
    for what, can, how in (
        ("train the layer", needed, "on the CPU"),
        *_experiments(extras),
        ("torch.compile on the CPU", status["C++ compiler"] == "ok", "with the compiler above"),
    ):
        console.print(f"{'can   ' if can else 'cannot'} {what}{', ' + how if can and how else ''}", highlight=False)
    return needed


def _experiments(extras: Mapping[str, bool]) -> Iterator[tuple[str, bool, str]]:
    """(command, whether it can run, note); twice where only one option needs the extra: without it and with it."""
    for each in EXPERIMENTS:
        if not each.packages or each.with_option:
            yield f"`dynmoe-tutel {each.command}`", extras["experiments"], ""
        if each.packages:
            command = f"{each.command} {each.with_option}".strip()
            yield f"`dynmoe-tutel {command}`", extras["experiments"] and extras[each.name], ""


def _python() -> Finding:
    version, right = platform.python_version(), sys.version_info[:2] >= MIN_PYTHON
    wanted = ".".join(map(str, MIN_PYTHON))
    return Finding("Python", "ok" if right else "missing", version, "" if right else f"install {wanted} or later")


def _torch() -> Finding:
    version = torch.__version__
    right = tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= MIN_TORCH
    wanted = ".".join(map(str, MIN_TORCH))
    return Finding("torch", "ok" if right else "missing", version, "" if right else f"install {wanted} or later")


def _bf16() -> Finding:
    """Whether the CPU has instructions for bf16."""
    instructions = [
        name
        for name, probe in (("AVX512-BF16", "_is_avx512_bf16_supported"), ("AMX", "_is_amx_tile_supported"))
        if getattr(torch.cpu, probe, lambda: False)()
    ]
    capability = torch.backends.cpu.get_cpu_capability()
    if instructions:
        return Finding("bf16 on the CPU", "ok", f"native ({', '.join(instructions)}; {capability})")
    return Finding("bf16 on the CPU", "absent", f"emulated ({capability})", "works, but fp32 is faster here")


def _numba() -> Finding:
    version = _version("numba", "numba")
    if version is None:
        return Finding("numba", "absent", "not installed", "pip install numba, for speed in fp32 on a CPU")
    if not numba_is_installed():
        return Finding("numba", "absent", version, "off by DYNMOE_TUTEL_NUMBA=0 or NUMBA_DISABLE_JIT=1, or broken")
    return Finding("numba", "ok", version)


def _gpu(available: bool) -> Finding:
    if not available:
        build = torch.version.cuda or torch.version.hip
        detail = f"none visible to torch (built for {build})" if build else "none: this torch is built for the CPU only"
        return Finding("GPU", "absent", detail, "everything runs on the CPU")
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB)"
        )
    return Finding("GPU", "ok", "; ".join(names))


def _triton(gpu: bool) -> Finding:
    version = _version("triton", "triton", "pytorch-triton", "triton-windows")
    if version is not None:
        return Finding("triton", "ok", version)
    if gpu:
        return Finding("triton", "absent", "not installed, and there is a GPU", "pip install triton, for torch.compile")
    return Finding("triton", "absent", "not installed", "useful on a GPU only")


def _compiler() -> Finding:
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++", "cl"]:
        found = shutil.which(command)
        if found:
            return Finding("C++ compiler", "ok", found)
    advice = "install g++ or clang++, or set CXX; only torch.compile on the CPU needs it"
    return Finding("C++ compiler", "absent", f"CXX={named} is not found" if named else "none found", advice)


def _tutel() -> Finding:
    if importlib.util.find_spec("tutel") is None:
        return Finding("Tutel", "absent", "not installed", "not needed: `dynmoe-tutel run` has a stand-in")
    try:
        tried = subprocess.run(
            [sys.executable, "-c", "import tutel.moe"], capture_output=True, text=True, timeout=TUTEL_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return Finding("Tutel", "absent", f"its import takes over {TUTEL_TIMEOUT} s", "reinstall it for this torch")
    if tried.returncode != 0:
        lines = tried.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"its import ended with code {tried.returncode}"
        return Finding("Tutel", "absent", f"does not import: {reason}", "reinstall it for this torch")
    return Finding("Tutel", "ok", _version("tutel", "tutel") or "installed")


def _package(extra: str, distribution: str) -> Finding:
    version = _version(MODULES.get(distribution, distribution.replace("-", "_")), distribution)
    if version is not None:
        return Finding(distribution, "ok", version)
    return Finding(distribution, "absent", "not installed", f"pip install 'dynmoe_tutel[{extra}]'")


def _version(module: str, *distributions: str) -> str | None:
    """The version of an installed package, "installed" where it has none, None where it is not there."""
    if importlib.util.find_spec(module) is None:
        return None
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "installed"
