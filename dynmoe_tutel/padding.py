"""Attention masks of a host model reach its MoE layers: padding is no token there.

A hook on the host keeps the mask of the forward under way, and a hook on each layer hands it on as `token_mask`. It
stays until the host's next forward, so that recomputes of gradient checkpointing see it: run the backward before the
next forward, as training loops do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .layer import MoELayer


class _Mask:
    """The mask of the host's last forward, [B, L] bool, or None."""

    def __init__(self) -> None:
        self.tokens_BL: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"tokens_BL": None}


class _Keep:
    """Forward pre-hook of the host."""

    def __init__(self, mask: _Mask) -> None:
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("attention_mask")
        if given is None and len(args) > 1:
            given = args[1]  # transformers' second argument
        self.mask.tokens_BL = given != 0 if isinstance(given, Tensor) and given.dim() == 2 else None


class _HandOn:
    """Forward pre-hook of a layer: `token_mask` where the mask is one of its tokens."""

    def __init__(self, mask: _Mask) -> None:
        self.mask = mask

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask_BL = self.mask.tokens_BL
        x = args[0] if args else kwargs.get("input")
        if mask_BL is None or kwargs.get("token_mask") is not None or not isinstance(x, Tensor) or x.dim() != 3:
            return None
        B, L = x.shape[:2]
        if mask_BL.shape[0] != B or mask_BL.shape[1] < L:
            return None
        mask_BL = mask_BL[:, mask_BL.shape[1] - L :].to(x.device)  # with a cache, the mask is of the past too
        return args, {**kwargs, "token_mask": mask_BL}


def mask_padding_of(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Hand the host's `attention_mask` [B, L] (0: padding) to `layers`; with none, take the host's hook away."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Keep) and not layers:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    if not layers:
        return
    kept = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Keep)), None)
    if kept is None:
        kept = _Keep(_Mask())
        model.register_forward_pre_hook(kept, with_kwargs=True)
    for layer in layers:
        layer.register_forward_pre_hook(_HandOn(kept.mask), with_kwargs=True)
