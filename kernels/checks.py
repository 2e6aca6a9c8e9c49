"""What the operations refuse, by shapes, dtypes and devices: no value is looked at, so that nothing waits for one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .activations import ACTIVATIONS

P = ParamSpec("P")
R = TypeVar("R")
INDEX = ("expert_offsets", "token_offsets", "token_of_row", "row_of_assignment")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checked(check: Callable[P, None]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """An implementation that first calls `check` with its arguments, whose tensors must be on one device.

    `engine.on_gpu` does the same for the implementation of a GPU.
    """

    def decorate(implementation: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(implementation).parameters)

        def check_all(*args: P.args, **kwargs: P.kwargs) -> None:
            expect_one_device((*zip(names, args, strict=False), *kwargs.items()))
            check(*args, **kwargs)

        @wraps(implementation)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            check_all(*args, **kwargs)
            return implementation(*args, **kwargs)

        run.check = check_all  # type: ignore[attr-defined]
        return run

    return decorate


def expect_one_device(arguments: Iterable[tuple[str, object]]) -> None:
    """ValueError unless all tensors among the named arguments are where the first of them is."""
    tensors = [(name, value) for name, value in arguments if isinstance(value, Tensor)]
    first, device = tensors[0][0], tensors[0][1].device
    for name, tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {device}: move one with .to()")


def expect(
    name: str, tensor: Tensor | None, shape: Sequence[int], meaning: str, dtype: torch.dtype | None = None
) -> None:
    """ValueError unless `tensor` (None passes) has the shape, and the dtype if one is given; `meaning`: "[E]"."""
    if tensor is not None and (tensor.shape != shape or (dtype is not None and tensor.dtype != dtype)):
        kind = "" if dtype is None else f"{str(dtype).removeprefix('torch.')} "
        raise ValueError(f"{name} must be {kind}{meaning} = {list(shape)}, got {_about(tensor)}")


def expect_matrix(name: str, tensor: Tensor, meaning: str, dims: int = 2) -> None:
    """ValueError unless `tensor` is of one of FLOATS and of so many dimensions."""
    if tensor.dim() != dims or tensor.dtype not in FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ValueError(f"{name} must be {meaning} of a floating type ({allowed}), got {_about(tensor)}")


def expect_index(T: int, E: int | None, index: Sequence[Tensor | None]) -> int:
    """Checks expert_offsets (or None), token_offsets, token_of_row and row_of_assignment; the length of row arrays.

    Kernels walk them by address: they must be contiguous.
    """
    expert_offsets, token_offsets, token_of_row, row_of_assignment = index
    assert token_of_row is not None
    if E is not None:
        expect("expert_offsets", expert_offsets, (E + 1,), "[E + 1]", torch.int32)
    expect("token_offsets", token_offsets, (T + 1,), "[T + 1]", torch.int32)
    rows = token_of_row.numel()
    expect("token_of_row", token_of_row, (rows,), "[rows]", torch.int32)
    expect("row_of_assignment", row_of_assignment, (rows,), "[rows], as token_of_row,", torch.int32)
    for name, tensor in zip(INDEX, index, strict=True):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}: call .contiguous()")
    return rows


def expect_experts(x_TD: Tensor, params: Sequence[Tensor | None], activation: str) -> int:
    """Checks w1, b1, w3, b3, w2, b2 and the activation; E."""
    w1, b1, w3, b3, w2, b2 = params
    assert w1 is not None
    assert w2 is not None
    expect_matrix("x_TD", x_TD, "[T, D]")
    expect_matrix("w1_EDH", w1, "[E, D, H]", 3)
    expect_matrix("w2_EHO", w2, "[E, H, O]", 3)
    E, _, H = w1.shape
    expect("w1_EDH", w1, (E, x_TD.shape[1], H), "[E, D, H]")
    expect("b1_EH", b1, (E, H), "[E, H]")
    expect("w3_EDH", w3, w1.shape, "[E, D, H], as w1_EDH,")
    expect("b3_EH", b3, (E, H), "[E, H]")
    expect("w2_EHO", w2, (E, H, w2.shape[2]), "[E, H, O]")
    expect("b2_EO", b2, (E, w2.shape[2]), "[E, O]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: allowed are {', '.join(ACTIVATIONS)}")
    return E


def _about(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
