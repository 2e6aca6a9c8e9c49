"""The package imports without the libraries, and an error names the missing one and its extra."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "accelerate", "lightning"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Block())
import dynmoe_tutel, dynmoe_tutel.integrations
for module, extra in (("transformers", "hf"), ("lightning", "lightning")):
    try:
        __import__(f"dynmoe_tutel.integrations.{module}")
    except ImportError as error:
        assert f"needs {module}" in str(error) and f"pip install 'dynmoe_tutel[{extra}]'" in str(error), error
    else:
        raise AssertionError(module)
"""


def test_a_missing_library_is_named_with_its_extra() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
