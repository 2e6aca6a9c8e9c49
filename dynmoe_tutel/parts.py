"""Parts of a layer that tools replace, wrap or parametrise: how they are called, found and written.

Quantisers and adapters put another module in the place of a child, so a child is called, never read. A parametrised
tensor (torch.nn.utils.parametrize) is a property of its module: it is read through the attribute, once a forward, and
has no entries to write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

K = TypeVar("K")


def compute_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype in which `module` computes: of its first floating-point parameter, else buffer; else that of `x`."""
    tensors = (t for found in (module.parameters(), module.buffers()) for t in found)
    return next((t.dtype for t in tensors if t.is_floating_point()), x.dtype)


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) in the dtype of `x` [..., in], which is fp32 or fp64.

    An nn.Linear computes in that dtype whatever its weights have, and keeps them. A module that a tool put in its place
    is called in its own dtype.
    """
    if type(module) is not nn.Linear:
        result = module(x.to(compute_dtype(module, x)))
        if not isinstance(result, Tensor):
            raise ValueError(f"{type(module).__name__}, a linear map of the gate, returned {type(result).__name__}")
        return result.to(x.dtype)
    cast = {name: p.to(x.dtype) for name, p in module.named_parameters() if p.dtype != x.dtype}
    called: Tensor = torch.func.functional_call(module, cast, (x,)) if cast else module(x)
    return called


def unwrapped(module: nn.Module, kind: type[K]) -> K:
    """The `kind` in whose place `module` is called: itself, or the one that a tool wrapped.

    A wrapper that holds several copies (PEFT's modules_to_save) passes the attribute `itself` on to the one that it
    calls; another has one. A module without any is taken as it is: stock Tutel's layers have experts of Tutel's.
    """
    if isinstance(module, kind):
        return module
    called = getattr(module, "itself", None)
    if isinstance(called, kind):
        return called
    return next((inner for inner in module.modules() if isinstance(inner, kind)), module)  # type: ignore[return-value]


def foreign_parameters(module: nn.Module, inner: object) -> list[tuple[str, nn.Parameter]]:
    """Named parameters that a wrapper `module` has beside those of `inner`, which it wraps."""
    own = {id(p) for p in inner.parameters()} if isinstance(inner, nn.Module) else set()
    return [(name, p) for name, p in module.named_parameters() if id(p) not in own]


def writable(owner: str, module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name` of `module`, to write; ValueError if a write would be lost.

    A parametrised or pruned tensor is computed from others, and a packed or sharded one has no entries of its own.
    """
    tensor = {**module._buffers, **module._parameters}.get(name)
    if tensor is None:
        raise ValueError(
            f"{owner}.{name} is computed from other tensors ({_computed_by(module, name)}), so a slot of it cannot be "
            "set: experts cannot grow, move or be reset. Make it a parameter again before "
            "(torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm and the like)"
        )
    if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
        raise ValueError(
            f"{owner}.{name} is {tensor.dtype} {list(tensor.shape)} (quantised or packed), so a slot of it cannot be "
            "set: experts cannot grow, move or be reset"
        )
    return tensor


def _computed_by(module: nn.Module, name: str) -> str:
    if name in parametrised_names(module):
        each: Any = module.get_submodule(f"parametrizations.{name}")
        return "parametrised by " + ", ".join(type(parametrization).__name__ for parametrization in each)
    beside = [key for key in (*module._parameters, *module._buffers) if key.startswith(f"{name}_")]
    return ", ".join(beside) or f"{type(module).__name__} has no such parameter"


def parametrised_names(module: nn.Module) -> list[str]:
    """The names of the tensors of `module` itself that are parametrised."""
    parametrizations = module._modules.get("parametrizations")
    return list(parametrizations) if isinstance(parametrizations, nn.ModuleDict) else []


def own_tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(owner, name, tensor) of all parameters and then buffers of `module`, parametrised ones by their value."""
    owners = list(_without_parametrizations(module))
    for owner in owners:
        yield from ((owner, name, p) for name, p in owner.named_parameters(recurse=False))
        yield from ((owner, name, getattr(owner, name)) for name in parametrised_names(owner))
    for owner in owners:
        yield from ((owner, name, b) for name, b in owner.named_buffers(recurse=False))


def _without_parametrizations(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for name, child in module.named_children():
        if not (name == "parametrizations" and parametrised_names(module)):
            yield from _without_parametrizations(child)
