"""Without DeepSpeed, `dynmoe_tutel.deepspeed` says how to install it; with it, `dynmoe_tutel` does not import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HIDE = """
import sys
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_says_what_to_install() -> None:
    said = run(f"{HIDE}\ntry:\n    import dynmoe_tutel.deepspeed\nexcept ImportError as error:\n    print(error)")
    assert "pip install 'dynmoe_tutel[deepspeed]'" in said


def test_a_script_that_does_not_import_it_runs_without(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('deepspeed' in sys.modules)")
    said = run(f"{HIDE}\nfrom dynmoe_tutel.cli.run_script import run\nraise SystemExit(run([{str(script)!r}]))")
    assert said.split() == ["False"]
