"""`RoutingRecord`: one gate's statistics of one record window, from which experts are grown and pruned.

They are detached, and int64 or fp32 for tokens of any dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import keep_strided, thinned
from ..kernels.norms import scaled
from ..parallel.collectives import sum_over_ranks
from ..routing import Routing
from ..validation import describe

_SUMS = ("counts", "unrouted_tokens", "tokens", "k_histogram")  # int64
_FLOATS = ("unrouted_sum", "unrouted_norm")  # fp32


def _limit(most: object) -> int:
    if type(most) is not int or most < 0:
        raise ValueError(f"keep_tokens = {most!r}: give an integer of at least 0")
    return most


def _merged_sample(samples: Sequence[Tensor], strides: Sequence[int], most: int) -> tuple[Tensor, int]:
    """Concatenate samples of several strides (powers of two) at the largest stride, thinned to `most`."""
    stride = max(strides)
    rows_ND = torch.cat([rows[:: stride // own] for rows, own in zip(samples, strides, strict=True)])
    return thinned(rows_ND, stride, most)


class RoutingRecord:
    """Sums over the tokens of a window.

    counts [E] int64, assignments per slot (R_E); unrouted_sum [D] fp32, sum of x over unrouted tokens (R_S);
    unrouted_norm [] fp32, sum of ||x|| over them; unrouted_tokens, tokens [] int64; k_histogram [E+1] int64, tokens by
    the number of thresholds that they passed. A token that is not finite counts in all of them but the unrouted ones.

    With `keep_tokens` > 0, `unrouted_sample` [n <= keep_tokens, D] keeps every s-th unrouted token for clustering.
    When it overflows, s doubles and every other kept token is dropped.
    """

    counts: Tensor
    unrouted_sum: Tensor
    unrouted_norm: Tensor
    unrouted_tokens: Tensor
    tokens: Tensor
    k_histogram: Tensor
    _sample: Tensor
    _sample_state: Tensor
    _least_tokens = 0  # in records that were pickled without

    def __init__(self, num_experts: int, model_dim: int, keep_tokens: int = 0) -> None:
        self.num_experts, self.model_dim = num_experts, model_dim
        self._keep_tokens = self._least_tokens = _limit(keep_tokens)
        self.device = torch.device("cpu")
        self.reset()

    @torch.inference_mode(False)
    def reset(self, device: torch.device | None = None) -> None:
        """Start an empty window, on `device` if given. On the same device in place: a CUDA graph may write to it."""
        device = device or self.device
        if hasattr(self, "_sample_state") and device == self.counts.device:
            for name in (*_SUMS, *_FLOATS):
                getattr(self, name).zero_()
            self._set_sample(self._sample[:0], 1, 0)
            return
        self.device = device

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.counts = zeros(torch.int64, self.num_experts)
        self.k_histogram = zeros(torch.int64, self.num_experts + 1)
        self.tokens, self.unrouted_tokens = zeros(torch.int64), zeros(torch.int64)
        self.unrouted_sum, self.unrouted_norm = zeros(torch.float32, self.model_dim), zeros(torch.float32)
        self._set_sample(zeros(torch.float32, 0, self.model_dim), 1, 0)

    def move(self, device: torch.device) -> None:
        """Follow the layer to `device` with sums and sample; to or from the meta device, start empty."""
        if device == self.device:
            return
        if "meta" in (device.type, self.device.type):
            self.reset(device)
            return
        self.device = device
        for name in (*_SUMS, *_FLOATS, "_sample", "_sample_state"):
            setattr(self, name, getattr(self, name).to(device))

    @property
    def keep_tokens(self) -> int:
        """The largest number of unrouted tokens to keep; set it before the window opens."""
        return self._keep_tokens

    @keep_tokens.setter
    def keep_tokens(self, most: int) -> None:
        self._least_tokens = _limit(most)
        self.keep_at_least(0)

    def keep_at_least(self, most: int) -> None:
        """Keep `most` unrouted tokens, or `keep_tokens` as it was set if that is more; replaces an earlier call."""
        self._keep_tokens = most = max(self._least_tokens, _limit(most))
        sample, stride = thinned(self.unrouted_sample, self._stride, most)
        self._set_sample(sample, stride, self._seen)

    @property
    def unrouted_sample(self) -> Tensor:
        """Unrouted tokens at an even stride, [n <= keep_tokens, D] fp32."""
        return self._sample[: int(self._sample_state[0])]

    @property
    def _stride(self) -> int:
        return int(self._sample_state[1])

    @property
    def _seen(self) -> int:
        return int(self._sample_state[2])

    def _set_sample(self, rows_ND: Tensor, stride: int, seen: int) -> None:
        rows = max(self.keep_tokens, len(rows_ND)) + 1  # one scratch row
        state = torch.tensor([len(rows_ND), stride, seen], device=self.device)
        if hasattr(self, "_sample_state") and (self._sample.shape[0], self._sample.device) == (rows, self.device):
            self._sample[: len(rows_ND)] = rows_ND.clone()
            self._sample_state.copy_(state)
            return
        self._sample = torch.zeros((rows, self.model_dim), device=self.device)
        self._sample[: len(rows_ND)] = rows_ND
        self._sample_state = state

    @torch.no_grad()
    def add(self, x_TD: Tensor, routing: Routing) -> None:
        """Add one batch: tokens [T, D] and their routing.

        A token that is not finite (in fp32) is a token, but no unrouted one: it would end growth. Sums that leave the
        range of fp32 stay at its ends.
        """
        x = x_TD.detach().float()
        length = scaled(x, 1)
        unrouted_T = routing.unrouted & length.norm.isfinite()
        lost_TD = torch.where(unrouted_T.unsqueeze(1), x, 0)  # no product: 0 * inf is NaN
        self.counts += routing.counts
        self.k_histogram += routing.k_histogram
        self.tokens += routing.real_tokens
        self.unrouted_tokens += unrouted_T.sum()
        self.unrouted_sum.add_(lost_TD.sum(dim=0)).nan_to_num_()
        self.unrouted_norm.add_(torch.where(unrouted_T, length.own_norm(), 0).sum()).nan_to_num_()
        if self.keep_tokens > 0:
            keep_strided(self._sample, self._sample_state, x, unrouted_T)

    def tensors(self) -> list[Tensor]:
        """What `add` writes in place."""
        sample = ("_sample", "_sample_state") if self.keep_tokens else ()
        return [getattr(self, name) for name in (*_SUMS, *_FLOATS, *sample)]

    def all_reduce(self, group: Any = None) -> None:
        """Sum over the ranks of `group`, equally on all; does nothing if torch.distributed is not initialised.

        Every rank must call it, even one that saw no token. Kept tokens are gathered in rank order.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return
        for names in (_SUMS, _FLOATS):
            sum_over_ranks([getattr(self, name) for name in names], group)
        if self.keep_tokens > 0:
            self._gather_sample(group)

    def _gather_sample(self, group: Any) -> None:
        """Gather the samples of all ranks, in rank order, at one stride, thinned to `keep_tokens`."""
        world = dist.get_world_size(group)
        size = torch.tensor([self.unrouted_sample.shape[0], self._stride], device=self.device)
        sizes = [torch.zeros_like(size) for _ in range(world)]
        dist.all_gather(sizes, size, group=group)
        counts, strides = zip(*(pair.tolist() for pair in sizes), strict=True)
        padded = self.unrouted_sample.new_zeros(max(counts), self.model_dim)
        padded[: self.unrouted_sample.shape[0]] = self.unrouted_sample
        samples = [torch.zeros_like(padded) for _ in range(world)]
        dist.all_gather(samples, padded, group=group)
        rows = [sample[:n] for sample, n in zip(samples, counts, strict=True)]
        self._set_sample(*_merged_sample(rows, strides, self.keep_tokens), self._seen)

    def permute_slots(self, order: Sequence[int]) -> None:
        """Slot i takes the counts of slot order[i]."""
        self.counts.copy_(self.counts[torch.tensor(order, device=self.counts.device)])

    @property
    def mean_k(self) -> float:
        """Mean number of thresholds that a token passed; 0.0 for an empty window."""
        k = torch.arange(self.num_experts + 1, device=self.device)
        return float((self.k_histogram * k).sum()) / max(int(self.tokens), 1)

    def merged(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Merge the record states of several ranks as `all_reduce` does; no states give an empty record."""
        tensors = {name: torch.zeros_like(getattr(self, name)) for name in (*_SUMS, *_FLOATS)}
        for name, total in tensors.items():
            for state in states:
                total += state[name].to(total)
        samples = [self._sample[:0], *(state["unrouted_sample"].to(self._sample) for state in states)]
        sample, stride = _merged_sample(samples, [1, *(state["stride"] for state in states)], self.keep_tokens)
        seen = stride * len(sample)  # the next kept token follows these
        return {**tensors, "unrouted_sample": sample, "stride": stride, "seen": seen}

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and the position in the sample."""
        tensors = {name: getattr(self, name).clone() for name in (*_SUMS, *_FLOATS, "unrouted_sample")}
        return {**tensors, "stride": self._stride, "seen": self._seen}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if `load_state_dict` would; change nothing."""
        for name in (*_SUMS, *_FLOATS, "unrouted_sample"):
            value, own = state.get(name), getattr(self, name)
            if not isinstance(value, Tensor):
                raise ValueError(f"the record to load has no tensor {name!r}, but {describe(value)}")
            fits = value.shape[1:] == own.shape[1:] and value.dim() == own.dim()
            if not fits or (name != "unrouted_sample" and value.shape != own.shape):
                raise ValueError(
                    f"the record to load has {name} of shape {list(value.shape)}, this layer {list(own.shape)}"
                )
        for name in ("stride", "seen"):
            if not isinstance(state.get(name), int):
                raise ValueError(f"the record to load has no integer {name!r}, but {describe(state.get(name))}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the window of a `state_dict()`. Raises ValueError, and changes nothing, if it does not fit."""
        self.check_state(state)
        for name in (*_SUMS, *_FLOATS):
            getattr(self, name).copy_(state[name])
        self._set_sample(state["unrouted_sample"].to(self.unrouted_sample), state["stride"], state["seen"])
