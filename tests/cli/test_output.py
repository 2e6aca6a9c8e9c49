"""A finished job's results never fail on their printing, whatever stdout is."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE
from rich.console import Console

from dynmoe_tutel.cli.output import lasting

JOB = [sys.executable, "-m", "dynmoe_tutel", "train", "--quick", "--steps", "2", "--rows", "dense", "--seeds", "2"]
RESULTS = {"table.md", "table.json", "accuracy.png"}


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "utf-8", "utf-16", "koi8-r"])
def test_every_character_can_be_printed(encoding: str) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    Console(file=lasting(stream), width=80).print(
        "50 \N{PLUS-MINUS SIGN} 2 % in lauf-\N{LATIN SMALL LETTER U WITH DIAERESIS} \udcfc"
    )
    stream.flush()
    text = written.getvalue().decode(encoding)
    known = encoding in ("cp437", "utf-8", "utf-16")
    assert text.startswith("50 \N{PLUS-MINUS SIGN} 2 %" if known else "50 +- 2 %"), text
    assert text.rstrip().endswith("\\udcfc")


@pytest.mark.parametrize("out", ["run", "lauf-\N{LATIN SMALL LETTER U WITH DIAERESIS}"])
@pytest.mark.parametrize(
    "extra", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_a_job_ends_well_where_stdout_is_ascii(out: str, extra: dict[str, str], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("LANG", "PYTHONUTF8", "PYTHONIOENCODING")}
    folder = tmp_path / out
    done = subprocess.run([*JOB, "--out", folder], capture_output=True, env={**environment, **extra}, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert b" +- " in done.stdout
    assert {path.name for path in folder.iterdir()} >= RESULTS


def test_a_job_ends_well_when_nobody_reads_it(tmp_path: Path) -> None:
    """As in `dynmoe-tutel train | head -0`, and after the end of a terminal."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*JOB, "--out", tmp_path / "run"], stdout=writer, stderr=subprocess.PIPE, timeout=PATIENCE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert {path.name for path in (tmp_path / "run").iterdir()} >= RESULTS
