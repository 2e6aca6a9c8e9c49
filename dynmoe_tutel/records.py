"""`RoutingRecord`: the statistics of one record window of one gate, from which experts are grown and pruned.

Detached, int64 and fp32 whatever the dtype of the tokens. Depends on routing only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .routing import Routing

_SUMS = ("counts", "unrouted_tokens", "tokens", "k_histogram")  # int64
_FLOATS = ("unrouted_sum", "unrouted_norm")  # fp32


class RoutingRecord:
    """Sums over the tokens of a window.

    counts [E] int64, assignments per slot (R_E); unrouted_sum [D] fp32, sum of x over unrouted tokens (R_S);
    unrouted_norm [] fp32, sum of ||x|| over them; unrouted_tokens, tokens [] int64; k_histogram [E+1] int64, tokens by
    the number of experts that passed their thresholds.

    With `keep_tokens` > 0, `unrouted_sample` [n <= keep_tokens, D] holds unrouted tokens at an even stride, for
    clustering: every s-th one, s doubled (and every other kept one dropped) whenever they become too many.
    """

    counts: Tensor
    unrouted_sum: Tensor
    unrouted_norm: Tensor
    unrouted_tokens: Tensor
    tokens: Tensor
    k_histogram: Tensor
    unrouted_sample: Tensor

    def __init__(self, num_experts: int, model_dim: int, keep_tokens: int = 0) -> None:
        self.num_experts, self.model_dim, self.keep_tokens = num_experts, model_dim, keep_tokens
        self.device = torch.device("cpu")
        self.reset()

    def reset(self, device: torch.device | None = None) -> None:
        """Start an empty window, on `device` if given."""
        self.device = device or self.device
        counts = {"dtype": torch.int64, "device": self.device}
        sums = {"dtype": torch.float32, "device": self.device}
        self.counts = torch.zeros(self.num_experts, **counts)  # type: ignore[call-overload]
        self.k_histogram = torch.zeros(self.num_experts + 1, **counts)  # type: ignore[call-overload]
        self.tokens = torch.zeros((), **counts)  # type: ignore[call-overload]
        self.unrouted_tokens = torch.zeros((), **counts)  # type: ignore[call-overload]
        self.unrouted_sum = torch.zeros(self.model_dim, **sums)  # type: ignore[call-overload]
        self.unrouted_norm = torch.zeros((), **sums)  # type: ignore[call-overload]
        self.unrouted_sample = torch.zeros((0, self.model_dim), **sums)  # type: ignore[call-overload]
        self._stride, self._seen = 1, 0

    @torch.no_grad()
    def add(self, x_TD: Tensor, routing: Routing) -> None:
        """Add one batch: tokens [T, D] and how they were routed. Waits for the device only if tokens are kept."""
        unrouted_T = routing.unrouted
        k_T = routing.k_per_token.masked_fill(unrouted_T, 0)  # in eval an unrouted token has its best expert
        x = x_TD.detach().float()
        lost_TD = torch.where(unrouted_T.unsqueeze(1), x, 0)  # not a product: a routed token may hold inf
        self.counts += routing.counts
        self.k_histogram += torch.bincount(k_T, minlength=self.num_experts + 1)
        self.tokens += x.shape[0]
        self.unrouted_tokens += unrouted_T.sum()
        self.unrouted_sum += lost_TD.sum(dim=0)
        self.unrouted_norm += torch.linalg.vector_norm(lost_TD, dim=1).sum()
        if self.keep_tokens > 0:
            self._keep(x[unrouted_T])

    def _keep(self, lost_ND: Tensor) -> None:
        place = torch.arange(lost_ND.shape[0], device=lost_ND.device) + self._seen
        self._seen += lost_ND.shape[0]
        self.unrouted_sample = torch.cat([self.unrouted_sample, lost_ND[place % self._stride == 0]])
        self._thin()

    def _thin(self) -> None:
        while self.unrouted_sample.shape[0] > self.keep_tokens:
            self.unrouted_sample = self.unrouted_sample[::2].clone()
            self._stride *= 2

    def all_reduce(self, group: Any = None) -> None:
        """Sum over the ranks of `group`, on every rank the same; nothing without an initialised torch.distributed.

        Every rank must call it, also one that saw no token. Kept tokens are gathered in the order of the ranks.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return
        for names in (_SUMS, _FLOATS):
            flat = torch.cat([getattr(self, name).reshape(-1) for name in names])
            dist.all_reduce(flat, group=group)
            for name, part in zip(names, flat.split([getattr(self, n).numel() for n in names]), strict=True):
                setattr(self, name, part.reshape(getattr(self, name).shape).clone())
        if self.keep_tokens > 0:
            self._gather_sample(group)

    def _gather_sample(self, group: Any) -> None:
        """The samples of all ranks at one stride, in the order of the ranks, thinned to `keep_tokens`."""
        world = dist.get_world_size(group)
        size = torch.tensor([self.unrouted_sample.shape[0], self._stride], device=self.device)
        sizes = [torch.zeros_like(size) for _ in range(world)]
        dist.all_gather(sizes, size, group=group)
        counts, strides = zip(*(pair.tolist() for pair in sizes), strict=True)
        padded = self.unrouted_sample.new_zeros(max(counts), self.model_dim)
        padded[: self.unrouted_sample.shape[0]] = self.unrouted_sample
        samples = [torch.zeros_like(padded) for _ in range(world)]
        dist.all_gather(samples, padded, group=group)
        self._stride = max(strides)
        parts = [s[: n : self._stride // stride] for s, n, stride in zip(samples, counts, strides, strict=True)]
        self.unrouted_sample = torch.cat(parts)
        self._thin()

    @property
    def mean_k(self) -> float:
        """Mean number of experts a token activated by threshold; 0.0 for an empty window."""
        k = torch.arange(self.num_experts + 1, device=self.device)
        return float((self.k_histogram * k).sum()) / max(int(self.tokens), 1)

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and the place in the sample."""
        tensors = {name: getattr(self, name).clone() for name in (*_SUMS, *_FLOATS, "unrouted_sample")}
        return {**tensors, "stride": self._stride, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The window of `state_dict()`; ValueError where it does not fit."""
        for name in (*_SUMS, *_FLOATS, "unrouted_sample"):
            if name not in state:
                raise ValueError(f"the record to load has no {name!r}")
            if name != "unrouted_sample" and state[name].shape != getattr(self, name).shape:
                raise ValueError(
                    f"the record to load has {name} of shape {list(state[name].shape)}, "
                    f"this layer {list(getattr(self, name).shape)}"
                )
        for name in (*_SUMS, *_FLOATS, "unrouted_sample"):
            setattr(self, name, state[name].to(getattr(self, name)).clone())
        self._stride, self._seen = int(state["stride"]), int(state["seen"])
