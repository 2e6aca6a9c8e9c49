"""One thread a test process: `make test` runs two processes, and OpenMP threads spin."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that tests start
