"""The tokens of a forward: what the caller gave, checked, as rows [T, D] with padding cleared. Depends on routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .routing import describe

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def real_tokens(layer: Any, x: Tensor, reserve_dims: int, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x as [T, D], zeros for padding, whatever it held: as a factor of 0, a NaN would still reach the gradients."""
    x_TD = _rows(layer, x, reserve_dims)
    mask_T = _mask_of_rows(token_mask, x.shape[: x.dim() - reserve_dims], x.device)
    if mask_T is not None:
        x_TD = x_TD.masked_fill(~mask_T.unsqueeze(1), 0)
    if layer.check_finite and not (finite_T := x_TD.isfinite().all(dim=1)).all():
        raise ValueError(
            f"input has {int((~finite_T).sum())} of {x_TD.shape[0]} tokens with a non-finite value (the first is "
            f"token {int(finite_T.logical_not().nonzero()[0])}): a lower learning rate may help"
        )
    return x_TD, mask_T


def _rows(layer: Any, x: Tensor, reserve_dims: int) -> Tensor:
    """x as [T, D], checked."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"input must be a tensor [..., {layer.model_dim}] of at least two dimensions, got {got}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"input has dtype {x.dtype}: give float32, float64, bfloat16 or float16")
    if type(reserve_dims) is not int or not 1 <= reserve_dims < x.dim():
        raise ValueError(f"reserve_dims = {reserve_dims!r}: give an integer from 1 to {x.dim() - 1} for this input")
    if x.shape[-reserve_dims:].numel() != layer.model_dim:
        raise ValueError(
            f"input has shape {list(x.shape)}: its last {reserve_dims} dimension(s) must "
            f"be model_dim = {layer.model_dim}"
        )
    device = layer._num_global_experts.device
    if x.device != device:
        raise ValueError(f"input is on {x.device}, the layer on {device}: move one with .to()")
    return x.reshape(-1, layer.model_dim)


def _mask_of_rows(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    """The mask as [T], checked."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or (mask.dtype, mask.shape, mask.device) != (torch.bool, shape, device):
        raise ValueError(
            f"token_mask must be bool {list(shape)} on {device}, True for real tokens, got {describe(mask)}"
        )
    return mask.reshape(-1)
