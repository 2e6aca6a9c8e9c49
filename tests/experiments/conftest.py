"""Modules beside these tests are imported by name, in the folders below too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
