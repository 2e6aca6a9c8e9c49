"""Which implementation of an operation runs: torch's dispatcher chooses by device, `engine` may overrule it.

The Triton kernels of an operation are in the module of the same name in `gpu`. They are imported when first a tensor on a
GPU comes, so that a machine without Triton keeps everything else.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

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
        arg in ("grouped_mm", "torch") if isinstance(arg, str) else isinstance(arg, Tensor) and arg.dtype == torch.float64
        for arg in args
    )


def on_gpu(operation: Any, module: str, device: str = "cuda") -> None:
    """Register `gpu.<module>.<name of the operation>` as the operation's kernel for CUDA and ROCm devices."""
    name = operation._opoverload._schema.name.split("::")[1]

    def run(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if _for_triton(values) and triton_is_installed():
            return getattr(import_module(f".gpu.{module}", __package__), name)(*args, **kwargs)
        return operation._init_fn(*args, **kwargs)

    operation.register_kernel(device)(run)
