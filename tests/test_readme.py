"""Every Python block of the README runs, and every command it shows exists."""

from __future__ import annotations

import re
import socket
from pathlib import Path

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


def test_it_shows_two_plots() -> None:
    assert len(re.findall(r"!\[[^\]]+\]\([^)]+\.png\)", README)) >= 2


@pytest.mark.parametrize("path", sorted(set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README))))
def test_pictures_are_there(path: str) -> None:
    assert (Path(__file__).parent.parent / path).stat().st_size > 1000
