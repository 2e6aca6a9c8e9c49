"""A pytest plugin: a test that loses the GPU ends its process, and xdist starts another one for the tests after it.

After an illegal access every call in the process fails, so each of them would, with a reason that is not its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
import torch

from .results import DEVICE_LOST, usable


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    """Look at the device after a failure in one of xdist's processes."""
    report = yield
    of_xdist = hasattr(item.config, "workerinput")
    if report.failed and of_xdist and torch.cuda.is_initialized() and not usable(torch.device("cuda")):
        print(f"FAILED {item.nodeid} lost the device\n{report.longreprtext}", file=sys.__stderr__, flush=True)
        os._exit(DEVICE_LOST)
    return report
