"""Passes the attention mask of a host model to its MoE layers as `token_mask`, so that they skip padding.

A hook keeps the mask on the nearest module above a layer that takes `attention_mask` beside `input_ids` or
`inputs_embeds` (in T5, the decoder's own mask, not the encoder's); a hook on the layer passes it on. `host_forwards`
says which forward a call of the layer belongs to: a recompute of gradient checkpointing gets the mask of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import MoELayer
from .host_forwards import HostForwards

_MASK, _INPUTS = "attention_mask", ("input_ids", "inputs_embeds")


class _Keep:
    """Forward pre-hook of the module that takes the mask: keeps it."""

    def __init__(self, forwards: HostForwards) -> None:
        self.forwards = forwards

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forwards.begin(_mask_of(module, args, kwargs))


def _mask_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask in a call of the module as [B, L] bool, None without one that fits its tokens."""
    names = _parameters(module)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get(_MASK)
    inputs = (given.get(name) for name in (*_INPUTS, *names[:1]))
    shape = next((x.shape[:2] for x in inputs if isinstance(x, Tensor)), None)
    if shape is None or not isinstance(mask, Tensor) or mask.dim() != 2 or len(shape) != 2:
        return None
    B, L = shape
    if mask.shape[0] not in (1, B) or mask.shape[1] < L:
        return None
    real = _real(mask)[:, mask.shape[1] - L :]  # with a cache, the mask covers past tokens too
    return real.expand(B, L)


def _real(mask: Tensor) -> Tensor:
    """bool, True at tokens: where the mask is not 0, or, for additive masks (no positive value), where it is 0."""
    if not mask.is_floating_point() or mask.numel() == 0:
        return mask != 0
    return (mask == 0) == (mask.max() <= 0)  # without waiting for the device


class _Over:
    """Forward hook of the module that takes the mask, called after exceptions too."""

    def __init__(self, forwards: HostForwards) -> None:
        self.forwards = forwards

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.forwards.end(output)


class _HandOn:
    """Forward pre-hook of a layer: passes the mask as `token_mask` if its shape fits the tokens."""

    def __init__(self, forwards: HostForwards) -> None:
        self.forwards = forwards

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self.forwards.of_this_call()
        x = args[0] if args else kwargs.get("input")
        if forward is None or not isinstance(x, Tensor):
            return None
        if not torch.compiler.is_compiling():
            forward.live_with(x)
        mask_BL = forward.mask_BL
        if mask_BL is None or kwargs.get("token_mask") is not None:
            return None
        if x.shape[:-1] not in (mask_BL.shape, (mask_BL.numel(),)):
            return None
        return args, {**kwargs, "token_mask": mask_BL.reshape(x.shape[:-1]).to(x.device)}


def mask_padding_of(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Pass the host's `attention_mask` [B, L] (0: padding) to those `layers` that have a module above taking one."""
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        host = _host(model, names[id(layer)])
        if host is None:
            continue
        forwards = next((hook.forwards for hook in host._forward_pre_hooks.values() if isinstance(hook, _Keep)), None)
        if forwards is None:
            forwards = HostForwards()
            host.register_forward_pre_hook(_Keep(forwards), with_kwargs=True)
            host.register_forward_hook(_Over(forwards), always_call=True)
        layer.register_forward_pre_hook(_HandOn(forwards), with_kwargs=True)


def forget_padding_of(model: nn.Module) -> None:
    """Remove the hooks of `mask_padding_of` from all modules but the layers."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Keep):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, after in list(module._forward_hooks.items()):
            if isinstance(after, _Over):
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _host(model: nn.Module, name: str) -> nn.Module | None:
    """The nearest module above `name` whose forward takes a mask and tokens; else the outermost that takes a mask."""
    outermost = None
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        taken = _parameters(module)
        if _MASK not in taken:
            continue
        if any(each in taken for each in _INPUTS):
            return module
        outermost = module
    return outermost


def _parameters(module: nn.Module) -> list[str]:
    """The argument names of the module's forward, in order."""
    return list(inspect.signature(module.forward).parameters)
