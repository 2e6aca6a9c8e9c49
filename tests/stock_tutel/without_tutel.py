"""The command line where Tutel cannot be found: `python without_tutel.py run SCRIPT ARGS...`."""

from __future__ import annotations

import importlib.machinery
import sys
from typing import Any


class _Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, *arguments: Any) -> Any:
        return None if fullname.partition(".")[0] == "tutel" else super().find_spec(fullname, *arguments)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = _Finder

from dynmoe_tutel.cli import main  # noqa: E402
from dynmoe_tutel.tutel_stand_in import tutel_is_importable  # noqa: E402

assert not tutel_is_importable()
main()
