"""A count on a GPU that the host reads late instead of waiting for it. Depends on torch only."""

from __future__ import annotations

import torch
from torch import Tensor


class LateCount:
    """Copies a count to the host while the device goes on, and reads the copy at a later call."""

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def above_zero(self, count: Tensor) -> bool:
        """Whether `count`, [] on a GPU, was above 0 at an earlier call; never waits, and says no inside a capture."""
        with torch.cuda.device(count.device):
            if torch.cuda.is_current_stream_capturing():
                return False
            if self._copied is not None:
                if not self._copied.query():
                    return False
                self._copied = None
                assert self._host is not None
                if int(self._host) > 0:
                    return True
            if self._host is None:
                self._host = torch.zeros((), dtype=count.dtype, pin_memory=True)
            self._host.copy_(count, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return False
