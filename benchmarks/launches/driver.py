"""A stand-in for Triton's driver, where there is no GPU."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget


class StubDriver:
    """The part of a driver that compiling and launching need: a device of the architecture."""

    def __init__(self, architecture: str) -> None:
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target
