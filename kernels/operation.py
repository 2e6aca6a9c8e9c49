"""Declares an operation: its input checks, its engines, its shapes for torch.compile, and its gradient.

Each is a `torch.library` custom operation of the namespace `dynmoe_tutel`. torch's dispatcher chooses by device: a GPU
runs the operation's Triton kernels, every other device its torch operations, on a CPU with the loops that numba
compiles, where it is installed. The argument `engine` of the expert networks may overrule that. An engine's module is
imported when it first runs, so everything else works without Triton and numba.

Checks read shapes, dtypes and devices, never values, so they do not wait for the device.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import islice, zip_longest
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# engines of the expert networks: by device, Triton, torch.nn.functional.grouped_mm, a loop over the experts with passes
# that numba compiled, the same with torch's operations
ENGINES = ("auto", "triton", "grouped_mm", "numba", "torch")

OPERATIONS: dict[str, Operation] = {}  # by name, filled by `operation`
LIBRARY = torch.library.Library("dynmoe_tutel", "FRAGMENT")


def operation(
    *,
    fake: Callable[..., Any],
    check: Callable[..., Any] | None = None,
    engines: dict[str, str] | None = None,
    autocast: bool = True,
    context: Callable[..., None] | None = None,
    backward: Callable[..., tuple[Any, ...] | None] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of torch operations as the custom operation of the same name.

    * `fake`: results without values, for `torch.compile`. `check`: raises ValueError on inputs the kernels cannot take.
    * `engines`: maps an engine to the module in this package that has a function of the same name and arguments.
    * `autocast`: False where the operation chooses the types of its products, which autocast would change.
    * `context(ctx, inputs, output)` saves for `backward(ctx, *gradients)`, which returns a gradient for each argument;
      it may omit trailing arguments that have none. `ctx.wanted` tells by name which gradients are needed.

    An argument may be a group (a NamedTuple of tensors and None, see `operands`); in torch's schema it is a list.
    """

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        declared = Operation(function, check, engines or {}, autocast)
        name, schema = declared.name, torch.library.infer_schema(declared.prototype(), mutates_args=mutates)
        LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, _not_compiled(declared.run), "CompositeExplicitAutograd")
        if "triton" in declared.engines:
            LIBRARY.impl(name, _not_compiled(declared.run_on_gpu), "CUDA")
        torch.library.register_fake(f"dynmoe_tutel::{name}", lambda *args: fake(*declared.grouped(args)), lib=LIBRARY)
        overload = getattr(torch.ops.dynmoe_tutel, name).default
        kernel = _autograd_kernel(declared, overload, context, backward)
        LIBRARY.impl(name, _not_compiled(kernel), "Autograd")
        OPERATIONS[name] = declared
        return overload

    return declare


class Operation:
    """One operation's implementation per engine; all take groups as NamedTuples."""

    def __init__(
        self,
        function: Callable[..., Any],
        check: Callable[..., Any] | None,
        modules: dict[str, str],
        autocast: bool = True,
    ) -> None:
        self.name, self.check, self.autocast = function.__name__, check, autocast
        self.engines = {"torch": function} | {e: _imported(module, self.name) for e, module in modules.items()}
        self.signature, self.hints = inspect.signature(function), get_type_hints(function)
        self.parameters = tuple(self.signature.parameters)
        kinds = [self.hints[name] for name in self.parameters]
        self.groups = [(i, k._make) for i, k in enumerate(kinds) if hasattr(k, "_make")]  # NamedTuples
        self.defaults = tuple(p.default for p in self.signature.parameters.values())
        self._engine = self.parameters.index("engine") if "engine" in self.parameters else None

    def prototype(self) -> Callable[..., Any]:
        """A function whose signature gives torch the schema."""

        def prototype() -> None: ...

        of_groups = {self.parameters[i]: Sequence[Tensor | None] for i, _ in self.groups}
        parameters = [
            p.replace(annotation=of_groups.get(name, self.hints[name])) for name, p in self.signature.parameters.items()
        ]
        returns = self.signature.return_annotation if self.hints["return"] is type(None) else self.hints["return"]
        prototype.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
        return prototype

    def grouped(self, args: Sequence[Any]) -> Sequence[Any]:
        """The schema's arguments, with each list turned back into its group."""
        if not self.groups:
            return args
        values = list(args)
        for i, make in self.groups:
            values[i] = make(values[i])
        return values

    def run(self, *args: Any) -> Any:
        """Run on any device: torch operations, or the engine that the argument `engine` names."""
        values = self.grouped(args)
        self._check(values)
        implementation = self._implementation(values)
        if self.autocast:
            return implementation(*values)
        with torch.autocast(values[0].device.type, enabled=False):
            return implementation(*values)

    def _implementation(self, values: Sequence[Any]) -> Callable[..., Any]:
        """The function for the engine that the caller names, or for "auto"."""
        engine = "torch"
        if self._engine is not None:
            named = values[self._engine] if len(values) > self._engine else "auto"
            engine = engine_for(named, values[0])
            if named == "auto" and engine == "torch" and "numba" in self.engines and takes_numba(values[0]):
                engine = "numba"
        return self.engines.get(engine, self.engines["torch"])

    def run_on_gpu(self, *args: Any) -> Any:
        """Run on a GPU: Triton's kernels if they take the types and the caller names no other engine.

        Triton launches on the current device, so the tensors' device is made current first.
        """
        if not (takes_triton(args) and triton_is_installed()):
            return self.run(*args)
        values = self.grouped(args)
        self._check(values)
        with torch.cuda.device_of(values[0]):
            return self.engines["triton"](*values)

    def _check(self, values: Sequence[Any]) -> None:
        """Raise ValueError unless all tensors are on one device and the operation's own check passes."""
        if self.check is None:
            return
        device = values[0].device
        if any(isinstance(t, Tensor) and t.device != device for t in _flat(values)):
            self._refuse_devices(values, device)
        self.check(*values)

    def _refuse_devices(self, values: Sequence[Any], device: torch.device) -> None:
        """Raise ValueError that names the first tensor that is not on `device`."""
        for i, value in enumerate(values):
            for j, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(tensor, Tensor) and tensor.device != device:
                    name = value._fields[j] if isinstance(value, tuple) else self.parameters[i]  # type: ignore[attr-defined]
                    raise ValueError(
                        f"{name} is on {tensor.device}, {self.parameters[0]} on {device}: move one with .to()"
                    )


def _autograd_kernel(
    declared: Operation,
    overload: Callable[..., Any],
    context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """The operation's kernel for the dispatch key Autograd; its autograd function takes the tensors of groups flat.

    `torch.library.register_autograd` would do, but it is slow: quadratic in the number of single arguments, or it
    flattens lists as pytrees. With lists it also has three constraints: a differentiated list may hold no None,
    gradients must mirror exactly the arguments that were passed (those equal to their defaults are not), and
    `ctx.needs_input_grad` is nested in the same way.
    """

    def below(args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, args: tuple[Any, ...], *flat: Any) -> Any:
            output, values = below(args), declared.grouped(args)
            # per argument: None, or for a group, which of its tensors are not None
            ctx.there = [[t is not None for t in value] if isinstance(value, tuple) else None for value in values]
            if context is not None:
                context(ctx, values, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            if backward is None:
                raise NotImplementedError(
                    f"{declared.name} has no gradient, for there are first derivatives only: take a second one "
                    "(create_graph=True, a gradient penalty) by differences of first ones, or not through the layer"
                )
            needs = iter(ctx.needs_input_grad[1:])
            ctx.wanted = {
                name: next(needs) if there is None else any(tuple(islice(needs, len(there))))
                for name, there in zip(declared.parameters, ctx.there, strict=True)
            }
            flat: list[Any] = [None]
            for there, found in zip_longest(ctx.there, backward(ctx, *gradients) or ()):
                if there is None:
                    flat.append(found)
                else:
                    of_group = zip_longest(there, found or ())
                    flat += [gradient if is_there else None for is_there, gradient in of_group]
            return tuple(flat)

    def kernel(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(declared.name, _flat(args))
        if torch.is_grad_enabled():
            args += declared.defaults[len(args) :]
            flat = _flat(args)
            if any(isinstance(t, Tensor) and t.requires_grad for t in flat):
                if torch._C._are_functorch_transforms_active():
                    raise NotImplementedError(f"{declared.name} has no rule for torch.func.grad: use the backward")
                return Differentiated.apply(args, *flat)
        return below(args)

    return kernel


def _flat(args: Sequence[Any]) -> list[Any]:
    """The arguments, with the tensors of groups in their places."""
    return [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,))]


def _refuse_tangents(name: str, values: Sequence[Any]) -> None:
    """NotImplementedError if one of the values is a dual tensor: torch would take the result's tangent for zero."""
    if any(isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (jvp, jacfwd, dual tensors): use the backward"
        )


def _not_compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, hidden from torch.compile, which must not trace into it after a graph break."""
    return torch._disable_dynamo(lambda *args: kernel(*args))


def keep(ctx: Any, *values: Any) -> None:
    """Save tensors, groups and None for the backward."""
    ctx.kinds = [type(value) if isinstance(value, tuple) else None for value in values]
    ctx.save_for_backward(*(t for value in values for t in (value if isinstance(value, tuple) else (value,))))


def kept(ctx: Any) -> list[Any]:
    """The values that `keep` saved. Call it once per backward: checkpointing unpacks a tensor only once."""
    saved = iter(ctx.saved_tensors)
    return [next(saved) if kind is None else kind(*islice(saved, len(kind._fields))) for kind in ctx.kinds]


def _imported(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a module in this package, imported at the first call."""
    imported = lru_cache(lambda: import_module(f".{module}", __package__))
    return lambda *args: getattr(imported(), name)(*args)


@lru_cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported; if not, warns once."""
    if find_spec("triton") is not None:
        return True
    logging.getLogger("dynmoe_tutel").warning(
        "Triton is not installed: operations on a GPU run as torch operations, which is slower. pip install triton"
    )
    return False


@lru_cache
def numba_is_installed() -> bool:
    """Whether numba can be imported and compiles, and DYNMOE_TUTEL_NUMBA is not 0."""
    if os.environ.get("DYNMOE_TUTEL_NUMBA", "1") == "0" or find_spec("numba") is None:
        return False
    try:
        import_module(".cpu.threshold_gate", __package__)  # imports every loop
    except Exception as error:  # of any kind: a build may not fit numpy, llvmlite's library or Python
        logging.getLogger("dynmoe_tutel").warning("numba is installed, but cannot be used: %r", error)
        return False
    return not import_module("numba").config.DISABLE_JIT  # the loops have instructions that Python has not


def takes_numba(x: Tensor) -> bool:
    """Whether the loops that numba compiles take such tokens: fp32 or bf16 on a CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and numba_is_installed()


def takes_triton(args: Sequence[Any]) -> bool:
    """Whether Triton's kernels take the arguments: not fp64, and not an engine of torch named by the caller."""
    return not any(
        value.dtype is torch.float64 if isinstance(value, Tensor) else value in ("grouped_mm", "numba", "torch")
        for value in _flat(args)
    )


def engine_for(engine: str, x: Tensor) -> str:
    """The engine ("triton", "grouped_mm", "numba", "torch") that runs an operation on `x`, if not the device's kernels.

    "auto" takes the loop over the experts, which makes a GPU synchronize to read their row counts. It takes torch's
    grouped product only where that has its own kernels (bf16 on sm_90 and sm_100) and does not synchronize. fp64 always
    takes the loop. Raises ValueError if "triton" or "numba" cannot run.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine = {engine!r}: allowed are {', '.join(ENGINES)}")
    if engine == "triton":
        if x.device.type == "cpu" and not _interprets():
            raise ValueError(
                "engine = 'triton' needs tensors on a GPU, these are on the CPU: move layer and tokens to a GPU, or "
                "take engine = 'auto' (to try the kernels without a GPU, set TRITON_INTERPRET=1 before Python starts)"
            )
        if find_spec("triton") is None:
            raise ValueError("engine = 'triton', but Triton is not installed: pip install triton, or engine = 'auto'")
    if engine == "numba":
        if x.device.type != "cpu":
            raise ValueError(f"engine = 'numba' needs tensors on the CPU, these are on {x.device}: engine = 'auto'")
        if not numba_is_installed():
            raise ValueError("engine = 'numba', but numba is not installed: pip install numba, or engine = 'auto'")
    if x.dtype == torch.float64 or (engine == "numba" and x.dtype == torch.float16):
        if engine not in ("auto", "torch"):
            _warn_of_dtype(engine, x.dtype)
        return "torch"
    if engine == "auto":
        return "grouped_mm" if x.dtype == torch.bfloat16 and _multiplies_groups(x.device) else "torch"
    return engine


@lru_cache
def _warn_of_dtype(engine: str, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    logging.getLogger("dynmoe_tutel").warning("engine = %r has no %s: such tensors take engine 'torch'", engine, name)


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@lru_cache
def _multiplies_groups(device: torch.device) -> bool:
    """Whether torch.nn.functional.grouped_mm has a bf16 kernel here; otherwise it loops and waits for the device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


def expect(
    name: str, tensor: Tensor | None, shape: Sequence[int], meaning: str, dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless `tensor` is None or has the shape, and the dtype if given; `meaning`, e.g. "[E]"."""
    if tensor is not None and (tensor.shape != shape or (dtype is not None and tensor.dtype != dtype)):
        kind = "" if dtype is None else f"{str(dtype).removeprefix('torch.')} "
        raise ValueError(f"{name} must be {kind}{meaning} = {list(shape)}, got {_about(tensor)}")


def expect_matrix(name: str, tensor: Tensor, meaning: str, dims: int = 2) -> None:
    """Raise ValueError unless `tensor` has a dtype in FLOATS and `dims` dimensions."""
    if tensor.dim() != dims or tensor.dtype not in FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ValueError(f"{name} must be {meaning} of a floating type ({allowed}), got {_about(tensor)}")


def _about(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
