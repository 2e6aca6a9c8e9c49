"""Rules of imports: they point down, kernels know only tensors, and importing the package needs only torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (  # from the ground up; a room is a module or a package of dynmoe_tutel, or `benchmarks`
    ("kernels",),
    (
        "forwards",
        "layer_state",
        "losses",
        "old_paths",
        "refusals",
        "routing",
        "temporary_hooks",
        "validation",
        "version",
    ),
    ("capacity", "initialization", "parts", "silence"),
    ("experts", "gates", "parallel"),
    ("adaptive", "layer_config"),
    ("checkpoint", "layer"),
    ("convert", "metrics", "moe", "overflow", "tutel_stand_in"),
    ("",),  # what `import dynmoe_tutel` names
    ("deepspeed", "experiments", "integrations", "tutel_backend", "zoo"),
    ("__main__", "benchmarks", "cli"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
GUESTS = {"tutel": "tutel_backend", "deepspeed": "deepspeed"}  # only this module may import it, even in a function


@cache
def modules() -> dict[str, Path]:
    """Every module of the package and of the benchmarks, by name."""
    found = {}
    for folder, prefix in (("dynmoe_tutel", ""), ("kernels", "dynmoe_tutel."), ("benchmarks", "")):
        for path in (ROOT / folder).rglob("*.py"):
            if (ROOT / "dynmoe_tutel/kernels") not in path.parents:
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[prefix + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> list[tuple[str, bool]]:
    """The modules that a module imports, and whether importing the module itself imports them."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node, at_once in walk(ast.parse(path.read_text()), True):
        if isinstance(node, ast.Import):
            found += [(alias.name, at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.append((name if name in modules() else base, at_once))
    return found


def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below, and whether they run on import: not those in functions or only for type checkers."""
    for child in ast.iter_child_nodes(node):
        types_alone = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        later = isinstance(child, ast.FunctionDef | ast.Lambda) or types_alone
        yield child, at_once and not later
        yield from walk(child, at_once and not later)


def room(module: str) -> str:
    first, _, rest = module.partition(".")
    return first if first == "benchmarks" else rest.partition(".")[0]


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    own = room(module)
    assert own in FLOOR, f"{module} has no floor: say in FLOORS on which it stands"
    above = [name for name, _ in imports(module) if name in modules() and FLOOR[room(name)] > FLOOR[own]]
    assert not above, f"{module} imports from above: {above}"


def test_there_is_no_circle() -> None:
    """Neither among rooms (imports in functions count) nor among modules."""
    rooms: dict[str, set[str]] = {}
    for module in modules():
        rooms.setdefault(room(module), set()).update(room(n) for n, _ in imports(module) if n in modules())
    TopologicalSorter({own: others - {own} for own, others in rooms.items()}).prepare()
    TopologicalSorter({m: {n for n, at_once in imports(m) if n in modules() and at_once} for m in modules()}).prepare()


@pytest.mark.parametrize("guest", GUESTS)
def test_one_room_imports_it(guest: str) -> None:
    found = {room(m) for m in modules() for name, _ in imports(m) if name.partition(".")[0] == guest}
    assert found <= {GUESTS[guest], "benchmarks"}


def test_kernels_know_tensors_only() -> None:
    kernels = [module for module in modules() if room(module) == "kernels"]
    names = {name.partition(".")[0] for module in kernels for name, _ in imports(module) if room(name) != "kernels"}
    assert names - set(sys.stdlib_module_names) <= {"torch", "triton", "numba", "llvmlite", "numpy"}


def test_importing_needs_torch_alone() -> None:
    """Everything that `import dynmoe_tutel` reaches, including parent packages."""
    reached, left, others = set(), ["dynmoe_tutel"], set()
    while left:
        module = left.pop()
        if module in reached:
            continue
        reached.add(module)
        others |= {name.partition(".")[0] for name, at_once in imports(module) if at_once and name not in modules()}
        below = [name for name, at_once in imports(module) if at_once and name in modules()]
        left += [".".join(n.split(".")[:i]) for n in below for i in range(1, n.count(".") + 2)]
    assert {"dynmoe_tutel.layer", "dynmoe_tutel.kernels.operation"} <= reached
    assert others - set(sys.stdlib_module_names) == {"torch"}
