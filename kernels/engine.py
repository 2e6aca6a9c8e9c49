"""Which implementation of an operation runs: torch's dispatcher chooses by device, `engine` may overrule it.

The Triton kernels of an operation are in the module of the same name in `gpu`. They are imported when first a tensor on
a GPU comes, so that a machine without Triton keeps everything else.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# of the expert networks: the device's own kernels, Triton's, torch.nn.functional.grouped_mm, a loop over the experts
ENGINES = ("auto", "triton", "grouped_mm", "torch")


@lru_cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported; says once, in the log, what its absence means."""
    if find_spec("triton") is not None:
        return True
    logging.getLogger("dynmoe_tutel").warning(
        "Triton is not installed: operations on a GPU run as torch operations, which is slower. pip install triton"
    )
    return False


def _for_triton(args: tuple[Any, ...]) -> bool:
    """fp64 and the engines of torch run as torch operations, on every device."""
    return not any(
        arg in ("grouped_mm", "torch")
        if isinstance(arg, str)
        else isinstance(arg, Tensor) and arg.dtype == torch.float64
        for arg in args
    )


def on_gpu(operation: Any, module: str, device: str = "cuda") -> None:
    """Register `gpu.<module>.<name of the operation>` as the operation's kernel for CUDA and ROCm devices.

    Triton launches on the current device, which need not be that of the tensors: they make theirs the current one.
    """
    name = operation._opoverload._schema.name.split("::")[1]
    check = getattr(operation._init_fn, "check", None)

    def run(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if _for_triton(values) and triton_is_installed():
            if check is not None:
                check(*args, **kwargs)
            with torch.cuda.device_of(args[0]):
                return getattr(import_module(f".gpu.{module}", __package__), name)(*args, **kwargs)
        return operation._init_fn(*args, **kwargs)

    operation.register_kernel(device)(run)


def engine_for(engine: str, x: Tensor) -> str:
    """ "triton", "grouped_mm" or "torch": what runs an operation on `x` where no kernel of its device takes it.

    "auto" is the loop over the experts, which asks a GPU for the rows of each. Only where torch's grouped product has
    kernels of its own (bf16 on sm_90 and sm_100) it asks nothing and is taken instead. fp64 always takes the loop.
    ValueError where "triton" cannot run.
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
    if x.dtype == torch.float64:
        if engine in ("triton", "grouped_mm"):
            _warn_of_float64(engine)
        return "torch"
    if engine == "auto":
        return "grouped_mm" if x.dtype == torch.bfloat16 and _multiplies_groups(x.device) else "torch"
    return engine


@lru_cache
def _warn_of_float64(engine: str) -> None:
    logging.getLogger("dynmoe_tutel").warning("engine = %r has no float64: such tensors take engine 'torch'", engine)


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@lru_cache
def _multiplies_groups(device: torch.device) -> bool:
    """Whether torch.nn.functional.grouped_mm has a kernel for bf16: elsewhere it loops and waits for the device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


def with_engines(module: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes of a loop over the experts an operation that runs on the engine its argument `engine` names.

    The other engines have a function of the same name and arguments in `grouped_mm` and in `gpu.<module>`.
    """

    def decorate(loop: Callable[P, R]) -> Callable[P, R]:
        position = list(inspect.signature(loop).parameters).index("engine")

        @wraps(loop)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            engine = args[position] if len(args) > position else kwargs.get("engine", "auto")
            first = args[0]
            assert isinstance(engine, str)
            assert isinstance(first, Tensor)
            chosen = engine_for(engine, first)
            if chosen == "torch":
                return loop(*args, **kwargs)
            where = ".grouped_mm" if chosen == "grouped_mm" else f".gpu.{module}"
            return getattr(import_module(where, __package__), loop.__name__)(*args, **kwargs)

        return run

    return decorate
