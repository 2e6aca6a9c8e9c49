"""A training step of a layer without a GPU: its launches by name, and the host's time on a stub of the driver.

The layer runs on small CPU tensors, with each operation's host function for a GPU. A Triton launch passes through all
of Triton's own Python code down to the compiled kernel, which is replaced by one that does nothing. So arrays hold no
meaningful values, and the number of assignments is set. Under a GPU's driver each launch takes some 2 to 3 us more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dynmoe_tutel import MoELayer
from dynmoe_tutel.kernels.gpu import ragged_index, tiles
from dynmoe_tutel.kernels.gpu.launch import Kernel
from dynmoe_tutel.kernels.operation import LIBRARY, OPERATIONS, _not_compiled
from dynmoe_tutel.routing import Capacity

from ..common.shapes import Shape
from .driver import StubDriver

CHIP = "sm_90"
SMALL = Shape(600, 64, 64, 8, 2)  # torch operations on it take little time beside their calls
_ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "scalar_tensor")


@dataclass(frozen=True)
class Mode:
    """What changes the launches of a step, beside shapes."""

    capacity: Capacity = "exact"
    gated: bool = False
    autocast: bool = False  # fp32 weights and tokens under autocast; else all are bf16
    temperature: bool = False
    training: bool = True


MODES = {
    "exact": Mode(),
    "exact, temperature": Mode(temperature=True),
    "exact, GLU": Mode(gated=True),
    "exact, autocast, fp32 weights": Mode(autocast=True),
    "exact, forward in eval": Mode(training=False),
    "bounded": Mode(1.5),
    "full": Mode("full"),
}


class Step:
    """A layer with its tokens; `forward` and `whole` run it."""

    def __init__(self, mode: Mode, shape: Shape = SMALL) -> None:
        self.mode, self.shape = mode, shape
        gate = {"type": "top_any", "max_expert_num": shape.E} | ({"init_t": 0.5} if mode.temperature else {})
        experts: dict[str, Any] = {"num_experts_per_device": shape.E, "hidden_size_per_expert": shape.H}
        experts |= {"type": "llama_ffn"} if mode.gated else {"type": "ffn", "activation_fn": F.gelu}
        dtype = torch.float32 if mode.autocast else torch.bfloat16
        layer: Any = MoELayer(gate, shape.D, experts, capacity=mode.capacity)
        self.layer = layer.to(dtype).train(mode.training)
        # a GPU copies these counts to the host and reads them at later steps, where a CPU looks at once
        layer._count_dropped = layer.dropped_assignments.add_
        layer._silence.see = lambda routing: None
        self.x = torch.randn(shape.T, shape.D).to(dtype).requires_grad_()
        self.d_y, self.d_aux = torch.randn_like(self.x), torch.ones(())
        self.wanted = [self.x, *layer.parameters()]

    def forward(self) -> Tensor:
        """Output, with the auxiliary loss."""
        cast: AbstractContextManager[Any] = nullcontext()
        if self.mode.autocast:
            cast = torch.autocast("cpu", torch.bfloat16)
        with cast, nullcontext() if self.mode.training else torch.no_grad():
            y: Tensor = self.layer(self.x)
        return y

    def whole(self) -> None:
        """Forward and, in training, backward."""
        y = self.forward()
        if self.mode.training:
            torch.autograd.grad((y, y.l_aux), self.wanted, (self.d_y, self.d_aux))  # type: ignore[attr-defined]


class _Clock:
    """The host's idle time of the device: from each wait for the count to the next launch of `up`."""

    arrived: float | None = None
    idle: list[float]

    def launch_up(self, *_: Any) -> None:
        if self.arrived is not None:
            self.idle.append(time.process_time() - self.arrived)
        self.arrived = None


_clock = _Clock()


def _compiled(self: Any, key: str, *args: Any) -> Any:
    """In place of `JITFunction._do_compile`: a kernel whose launch does nothing."""
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.name, kernel.src, kernel.module, kernel.function, kernel.packed_metadata = self.fn.__name__, None, 0, 0, ()
    kernel._run = _clock.launch_up if self.fn.__name__ == "up_kernel" else lambda *_: None
    self.device_caches[0][0][key] = kernel
    return kernel


@lru_cache
def _operations_as_on_a_gpu() -> None:
    for declared in OPERATIONS.values():
        if "triton" in declared.engines:
            LIBRARY.impl(declared.name, _not_compiled(declared.run_on_gpu), "CPU")


@contextmanager
def without_gpu(rows: int) -> Iterator[list[float]]:
    """Operations on CPU tensors run as on a GPU, launches do nothing, and the index counts `rows` assignments.

    Yields a growing list: the host's seconds from each wait for the count to the next launch of `up`.
    """
    _operations_as_on_a_gpu()
    _clock.idle = []

    def total(counts: Tensor, most: int) -> int:
        _clock.arrived = time.process_time()
        return rows

    with (
        tiles.assume(CHIP),
        mock.patch.object(driver, "_active", StubDriver(CHIP)),
        mock.patch.object(JITFunction, "_do_compile", _compiled),
        mock.patch.object(ragged_index, "_total", total),
    ):
        yield _clock.idle


class _Launches(TorchDispatchMode):
    """Collects the names of launches: Triton's kernels, and torch's operations that are neither views nor empty."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "dynmoe_tutel":
            declared = OPERATIONS[func.name().split("::")[1]]
            with self:
                return (declared.run_on_gpu if "triton" in declared.engines else declared.run)(*args)
        made = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if (isinstance(made, Tensor) and not _is_view(made, args) and name not in _ALLOCATE) or func._schema.is_mutable:
            self.names.append(f"aten.{name}")
        return made


def _is_view(made: Tensor, args: tuple[Any, ...]) -> bool:
    storage = made.untyped_storage().data_ptr()
    return any(isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() == storage for arg in args)


def launches(mode: Mode, shape: Shape = SMALL) -> tuple[list[str], list[str]]:
    """The launches of forward and backward by name, torch's with the prefix "aten."."""
    step, found = Step(mode, shape), _Launches()
    run = Kernel.run

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.names.append(self.fn.__name__.removesuffix("_kernel"))
        return run(self, *args, **kwargs)

    with without_gpu(shape.rows), mock.patch.object(Kernel, "run", record), found:
        y = step.forward()
        forward = len(found.names)
        if mode.training:
            torch.autograd.grad((y, y.l_aux), step.wanted, (step.d_y, step.d_aux))  # type: ignore[attr-defined]
    return found.names[:forward], found.names[forward:]


def microseconds(mode: Mode, repeats: int = 30, steps: int = 20) -> dict[str, float]:
    """The host's processor time of a forward, of a step, and from the count's arrival to the launch of `up`.

    Each is the least of `repeats` means over `steps`, taken in turn: what other processes disturb is longer.
    """
    step = Step(mode)
    calls: dict[str, Callable[[], Any]] = {"forward": step.forward, "step": step.whole}
    times: dict[str, list[float]] = {name: [] for name in calls}
    with without_gpu(step.shape.rows) as idle:
        for _ in range(repeats + 1):
            for name, call in calls.items():
                start = time.process_time()
                for _ in range(steps):
                    call()
                times[name].append((time.process_time() - start) / steps)
    found = {name: 1e6 * min(values[1:]) for name, values in times.items()}
    return found | {"after the wait": 1e6 * statistics.median(idle or [0.0])}
