"""`kernel`, a decorator like `triton.jit` whose launches take less time on the host to find what Triton compiled.

Triton chooses among the compiled forms of a kernel by the types of its arguments, and by which pointers and integers
are multiples of 16 and which integers are 1. For this it works out a text at every launch. Here a tuple of the same
properties is the key. A launch that is not found, and every launch that compiles, runs hooks before the kernel, or is
on an AMD GPU (whose forms also depend on the size of tensors), is Triton's own, as all are in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Kernel(JITFunction):
    """A kernel whose parameters are arguments by position and then constants by name, as all of this package are."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forms: dict[Any, tuple[CompiledKernel, list[Any]]] = {}  # compiled, and the constants in order

    def run(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        if warmup or self.pre_run_hooks or torch.version.hip is not None:
            return super().run(*args, grid=grid, warmup=warmup, **constants)
        if self._forms:  # else there may be no device
            found = self._forms.get(_key(args, constants))
            if found is not None:
                compiled, in_order = found
                compiled[grid + (1,) * (3 - len(grid))](*args, *in_order)
                return compiled
        compiled = super().run(*args, grid=grid, warmup=warmup, **constants)
        if isinstance(compiled, CompiledKernel):
            in_order = [constants[name] for name in self.arg_names[len(args) :]]
            self._forms[_key(args, constants)] = compiled, in_order
        return compiled


def _key(args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """Equal only for launches of the same compiled form."""
    properties = [
        # 1 is a constant of its own; from 2**31 on an integer has 64 bits
        (a == 1 or (a & 15 == 0) + 2 + (a >> 31 << 2))
        if a.__class__ is int
        else a
        if a is None
        else a.dtype
        if a.data_ptr() & 15 == 0
        else (a.dtype,)
        for a in args
    ]
    given = driver.active.get_current_device(), knobs.compilation.instrumentation_mode
    return (*given, *constants, *constants.values(), *properties)


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit` for a kernel that the host launches; its options are those of `triton.jit`."""

    def declare(function: Callable[..., Any]) -> Any:
        made = triton.jit(**options)(function)
        return Kernel(function, **options) if type(made) is JITFunction else made

    return declare if function is None else declare(function)
