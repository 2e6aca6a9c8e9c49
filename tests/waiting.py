"""What waits for the device on a GPU, found on a CPU: operations that read a value or a size, and reads of a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynmoe_tutel.kernels import norms

aten = torch.ops.aten
# on a GPU each waits for a value or a size, or copies from host memory
WAITING = (
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.bincount,
    aten.lift_fresh,
)


def refuse_waiting(func: Any, args: tuple) -> None:
    """AssertionError if the operation waits for the device."""
    if func.overloadpacket in WAITING or _selects_by_mask(func, args):
        raise AssertionError(f"{func} waits for the device")


def _selects_by_mask(func: Any, args: tuple) -> bool:
    if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return False
    return any(i is not None and i.dtype == torch.bool for i in args[1])


def refuse_reads(patch: pytest.MonkeyPatch, unless: Callable[[], bool] = lambda: False) -> None:
    """Refuse what reads a tensor's value in Python, which is no operation on a CPU; not where `unless()` holds."""
    for name in ("__int__", "__index__", "__float__", "__bool__", "tolist", "numpy"):
        read = getattr(Tensor, name)

        def refuse(tensor: Tensor, *args: Any, read: Any = read, **options: Any) -> Any:
            if unless():
                return read(tensor, *args, **options)
            raise AssertionError("reading a value waits for the device")

        patch.setattr(Tensor, name, refuse)


def look_at_no_value(patch: pytest.MonkeyPatch) -> None:
    """Let norms take the way that they take on a GPU, where Python must not branch on values."""
    patch.setattr(norms, "_may_look", lambda values: False)


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for the device; what the package's own operations do inside is not looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> NoWaiting:
        look_at_no_value(self.patch)
        refuse_reads(self.patch, lambda: self.inside)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        refuse_waiting(func, args)
        before, self.inside = self.inside, self.inside or func.namespace == "dynmoe_tutel"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = before
