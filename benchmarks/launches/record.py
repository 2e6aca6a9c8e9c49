"""Records every Triton launch of the operations without a GPU: kernel, types and configuration.

The host functions of `dynmoe_tutel.kernels.gpu` run on meta tensors while recording replaces launching. Specialisation
follows Triton's rules: integers that are 1 become constants; pointers and integers divisible by 16 are marked so.
Imports Triton, and must not run under its interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it")

import triton
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "waves_per_eu", "matrix_instr_nonkdim", "kpack")
_DIVISIBLE = ("tt.divisibility", 16)
_SMALL_POINTER = ("tt.pointer_range", 32)  # offsets fit in 32 bits: AMD's buffer instructions

Attributes = tuple[tuple[int, tuple[tuple[str, int], ...]], ...]


@dataclass(frozen=True)
class Launch:
    """One compiled form of a kernel: equal launches compile to the same code."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]  # parameter, type; "constexpr" for constants
    constants: tuple[tuple[int, Any], ...]  # position, value
    attributes: Attributes  # position, known property of the value
    options: tuple[tuple[str, int], ...]

    @property
    def function(self) -> Any:
        """The kernel."""
        return getattr(import_module(self.module), self.kernel)

    @property
    def configuration(self) -> str:
        """The tile, warps and stages in short form."""
        names = [name for name, _ in self.signature]
        blocks = [f"{names[i].removeprefix('BLOCK_')}{v}" for i, v in self.constants if names[i].startswith("BLOCK_")]
        flags = [
            names[i].lower() if v is True else f"{v}"
            for i, v in self.constants
            if names[i].isupper() and (v is True or (isinstance(v, str) and v))
        ]
        short = {"num_warps": "warps", "num_stages": "stages", "maxnreg": "max registers"}
        options = [f"{value} {short.get(name, name)}" for name, value in self.options]
        return ", ".join([" ".join(blocks), *options, " ".join(flags)]).strip(", ")

    def types(self) -> str:
        """The floating-point types of its tensors."""
        found = {t[1:] for _, t in self.signature if t.startswith("*")} & {"fp16", "bf16", "fp32", "fp64"}
        return "/".join(sorted(found))

    def compile(self, target: Any) -> Any:
        """Triton's compiled kernel for a `GPUTarget`, from the disk cache if present."""
        source = triton.compiler.ASTSource(
            self.function,
            dict(self.signature),
            {(i,): value for i, value in self.constants},
            {(i,): [list(pair) for pair in pairs] for i, pairs in self.attributes},
        )
        return triton.compile(source, target=target, options=dict(self.options))


def _divisible_tensor(tensor: Tensor) -> bool:
    """Whether the pointer is a multiple of 16: allocations are; views with an offset may not be."""
    return tensor.storage_offset() * tensor.element_size() % 16 == 0


def _specialise(parameter: Any, value: Any, hip: bool) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Triton type of an argument ("constexpr" for a constant), and the known properties of its value."""
    if parameter.is_constexpr or value is None:
        return "constexpr", ()
    known: list[tuple[str, int]] = []
    aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    if isinstance(value, Tensor):
        if aligned and _divisible_tensor(value):
            known.append(_DIVISIBLE)
        if hip and value.untyped_storage().nbytes() < 2**31:
            known.append(_SMALL_POINTER)
        return "*" + _TYPES[value.dtype], tuple(known)
    if isinstance(value, bool):
        return "i1", ()
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return "constexpr", ()
        if aligned and value % 16 == 0:
            known.append(_DIVISIBLE)
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), tuple(known)
    if isinstance(value, float):
        return "fp32", ()
    raise TypeError(f"{parameter.name} is a {type(value).__name__}: no rule to specialise it by")


def launch_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], hip: bool) -> Launch:
    """The launch `function[grid](*args, **kwargs)`."""
    options = {name: kwargs.pop(name) for name in list(kwargs) if name in _OPTIONS}
    bound = function.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    signature, constants, attributes = [], [], []
    for i, (parameter, value) in enumerate(zip(function.params, bound.arguments.values(), strict=True)):
        kind, known = _specialise(parameter, value, hip)
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append((i, value))
        if known:
            attributes.append((i, known))
    return Launch(
        function.fn.__module__,
        function.fn.__name__,
        tuple(signature),
        tuple(constants),
        tuple(attributes),
        tuple(sorted((name, value) for name, value in options.items() if value is not None)),
    )


@contextmanager
def recording(hip: bool = False) -> Iterator[list[Launch]]:
    """Record Triton launches instead of making them: each form once, in order."""
    found: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = launch_of(self, args, kwargs, hip)
        size = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs) if callable(grid) else grid
        if any(not isinstance(n, int) or n < 1 for n in size):
            raise ValueError(f"{launch.kernel}: the grid {size} has no program, or a size that is no integer")
        if launch not in found:
            found.append(launch)

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = run
