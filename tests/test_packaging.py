"""The wheel and the sdist: their content, importing it anywhere, and the cost and side effects of importing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "tutel",
    "deepspeed",
    "triton",
    "matplotlib",
    "rich",
    "typer",
    "sklearn",
    "safetensors",
    "tensorboard",
    "transformers",
)
SOURCES = ("dynmoe_tutel", "kernels", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def build(what: str, factory: pytest.TempPathFactory, links: bool = True) -> Path:
    """A wheel or an sdist from a copy of the sources, so that no build directory appears beside them."""
    pytest.importorskip("setuptools", reason="building without the network needs setuptools")
    pytest.importorskip("wheel", reason="building without the network needs wheel")
    source, out = factory.mktemp("source"), factory.mktemp(what)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    if not links:
        (source / "dynmoe_tutel" / "kernels").unlink()
        (source / "dynmoe_tutel" / "kernels").write_text("../kernels")  # git may write a file in place of the link
    code = f"import setuptools.build_meta as b; b.build_{what}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


def sources() -> set[str]:
    """Every module and table, by its path in the wheel."""
    found = set()
    for folder, target in (("dynmoe_tutel", "dynmoe_tutel"), ("kernels", "dynmoe_tutel/kernels")):
        files = [p for pattern in ("*.py", "*.json") for p in (ROOT / folder).rglob(pattern) if not in_link(p)]
        found |= {f"{target}/{p.relative_to(ROOT / folder).as_posix()}" for p in files}
    return found


def in_link(path: Path) -> bool:
    return (ROOT / "dynmoe_tutel" / "kernels") in path.parents


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory)


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(where)
    return where


@pytest.fixture
def python(unpacked: Path, tmp_path: Path) -> Callable[[str], dict]:
    """Run code in an empty directory with the unpacked wheel first on the path; the code puts a dict in `found`."""

    def run(code: str) -> dict:
        program = f"import json, sys\nsys.path.insert(0, {str(unpacked)!r})\n{code}\nprint(json.dumps(found))"
        done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not list(tmp_path.iterdir()), "importing wrote into the current directory"
        return json.loads(done.stdout.splitlines()[-1])

    return run


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def test_every_module_table_and_the_type_marker_are_in_it(wheel: Path) -> None:
    assert contents(wheel) == sorted({"dynmoe_tutel/py.typed", *sources()})


def test_a_checkout_without_symbolic_links_gives_the_same(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert contents(build("wheel", tmp_path_factory, links=False)) == contents(wheel)


def test_the_sdist_holds_each_file_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    with tarfile.open(build("sdist", tmp_path_factory)) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    modules = sorted(name for name in names if name.endswith((".py", ".json")) and name != "setup.py")
    assert modules == sorted(re.sub(r"^dynmoe_tutel/kernels/", "kernels/", name) for name in sources())


def test_its_metadata(wheel: Path) -> None:
    version = {}
    exec((ROOT / "dynmoe_tutel" / "version.py").read_text(), version)
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("METADATA"))
        (scripts,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    head = metadata.split("\n\n")[0]
    assert f"Version: {version['__version__']}\n" in head
    assert "Requires-Python: >=3.10" in head
    assert "Requires-Dist: torch>=2.11" in head
    assert "dynmoe-tutel = dynmoe_tutel.cli:main" in scripts


def test_no_upper_pins_and_exact_constraints() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    for extra in config["options.extras_require"].values():
        lines += extra.splitlines()
    required = [line.split(";")[0].strip() for line in lines if line]
    assert not [r for r in required if "<" in r or "==" in r or "~" in r]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in line for line in lines)
    pinned = {line.split("==")[0].strip().lower() for line in lines}
    names = {r.split(">")[0].lower() for r in required}
    assert names <= pinned, f"{names - pinned} are not pinned"


def test_it_imports_and_runs_in_an_empty_directory(python: Callable[[str], dict], unpacked: Path) -> None:
    found = python(
        """
import torch, dynmoe_tutel, dynmoe_tutel.kernels
layer = dynmoe_tutel.moe.moe_layer("top_any", 8, {"num_experts_per_device": 2, "hidden_size_per_expert": 4})
y = layer(torch.randn(3, 8))
y.sum().backward()
found = {"files": [dynmoe_tutel.__file__, dynmoe_tutel.kernels.__file__], "shape": list(y.shape),
         "names": sorted(dynmoe_tutel.__all__), "version": dynmoe_tutel.__version__}
"""
    )
    assert all(file.startswith(str(unpacked)) for file in found["files"])
    assert found["shape"] == [3, 8]
    surface = {"moe", "TopAnyGate", "MoELayer", "Routing", "ExpertController", "RoutingRecord"}
    assert surface <= set(found["names"])


def test_importing_is_light(python: Callable[[str], dict], record_property: Callable[[str, object], None]) -> None:
    """Nothing heavy is imported or even searched for; the time is reported, not judged."""
    found = python(
        f"""
import time, torch

class Watch:
    asked = []

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r} or name.startswith(("torch._dynamo", "torch._inductor")):
            self.asked.append(name)

before = set(sys.modules)
sys.meta_path.insert(0, Watch())
start = time.perf_counter()
import dynmoe_tutel
found = {{"seconds": time.perf_counter() - start, "asked": Watch.asked, "new": sorted(set(sys.modules) - before)}}
"""
    )
    record_property("seconds beyond torch", found["seconds"])
    assert found["asked"] == []
    assert not [name for name in found["new"] if name.split(".")[0] in HEAVY]


def test_the_folder_of_kernels_under_its_own_name() -> None:
    """transformers looks for a package `kernels` and, in a checkout, imports this folder: operations stay whole."""
    code = """
import torch
from dynmoe_tutel import moe
layer = moe.moe_layer("top_any", 8, {"num_experts_per_device": 2, "hidden_size_per_expert": 4})
import kernels
assert not hasattr(kernels, "top_any_ffn")
layer(torch.randn(3, 8)).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_importing_changes_no_global_state(python: Callable[[str], dict]) -> None:
    found = python(
        """
import logging, os, random, warnings, torch
torch.manual_seed(3)

def state():
    return [torch.get_rng_state().tolist(), random.getstate()[1][:5], str(torch.get_default_dtype()),
            torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            len(logging.getLogger().handlers), logging.getLogger().level, len(warnings.filters), sorted(os.environ)]

before = state()
import dynmoe_tutel
found = {"same": before == state(), "handlers": len(logging.getLogger("dynmoe_tutel").handlers)}
"""
    )
    assert found == {"same": True, "handlers": 0}


def test_the_command_line_starts(python: Callable[[str], dict]) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    assert python("from dynmoe_tutel.cli import main\nfound = {'callable': callable(main)}") == {"callable": True}
