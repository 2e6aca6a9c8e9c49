"""Which forward is running: one of training, one that no backward follows, or the recompute of an earlier one; and
whether under autocast.

Knows torch alone.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction


def in_backward() -> bool:
    """Whether this forward runs inside a backward, as gradient checkpointing's recompute does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_training(module: nn.Module) -> bool:
    """Whether this forward is one of training: `module` is in train mode, and a backward can follow.

    None follows a forward without grad mode (SWA's `update_bn`, an EMA's forward), unless an autograd function runs it:
    reentrant checkpointing runs its region without grad mode first, and in the backward with.
    """
    return module.training and (torch.is_grad_enabled() or _in_autograd_function())


def _in_autograd_function() -> bool:
    """Whether the forward of an autograd function that will get a backward is on the stack.

    Torch has no other sign of it. Inside a compiled graph there is no stack to read, and the recompute counts.
    """
    if torch.compiler.is_compiling():
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, BackwardCFunction) and ctx.next_functions:
                return True
        frame = frame.f_back
    return False


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context with autocast off on the device of `x`; the meta device has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
