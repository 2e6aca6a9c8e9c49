"""Every Python block of the README runs, and every command it shows exists."""

from __future__ import annotations

import re
import socket
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:  # what torchrun sets for one process
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_there_is_a_block_that_grows_or_prunes(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert re.search(r"grown|pruned", capsys.readouterr().out)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^dynmoe-tutel (\w+)", README, re.MULTILINE))))
def test_command_exists(command: str) -> None:
    from typer.testing import CliRunner

    from dynmoe_tutel.cli import app

    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def commands() -> list[str]:
    """Every command of this package that the README shows, in blocks and in sentences, without its comment."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({*lines, *re.findall(r"`((?:dynmoe-tutel|python -m) [^`]+)`", README)} - {""})


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("dynmoe-tutel ")])
def test_options_exist(command: str) -> None:
    from typer.main import get_command

    from dynmoe_tutel.cli import app

    words = re.findall(r"[^\s\[\]|]+", command)[1:]
    found: Any = get_command(app)
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    if found.name == "run":  # what follows is the script's
        return
    known = {name for parameter in found.params for name in parameter.opts}
    assert [word for word in words if word.startswith("--") and word not in known] == []


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("python -m benchmarks.")])
def test_modules_exist(command: str) -> None:
    module = command.split()[2]
    assert (Path(__file__).parent.parent / f"{module.replace('.', '/')}.py").is_file()


def test_extras_exist() -> None:
    setup = ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    named = {extra for names in re.findall(r"dynmoe_tutel\[([a-z,]+)\]", README) for extra in names.split(",")}
    assert named
    assert named <= {*setup["options.extras_require"]}


def test_it_shows_two_plots() -> None:
    assert len(re.findall(r"!\[[^\]]+\]\([^)]+\.png\)", README)) >= 2


@pytest.mark.parametrize("path", sorted(set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README))))
def test_pictures_are_there(path: str) -> None:
    assert (Path(__file__).parent.parent / path).stat().st_size > 1000
