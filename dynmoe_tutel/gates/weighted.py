"""`WeightedGate`, the base of gates that choose any number of experts a token and weight each by its score."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..forwards import without_autocast
from ..kernels import gate_dtype, pack_bits
from ..routing import Capacity, Routing
from ..validation import positive_int, warn_once
from .linear import LinearLogits


class WeightedGate(LinearLogits):
    """A linear router, `choose` of a subclass, and state that moves after each optimizer step.

    The output is sum_e weight[t, e] expert_e(x_t), 0 for a token without an expert (`unrouted`). `max_k`: the largest
    number of experts a token; of more, those of largest score stay. None: no limit.

    State that is no parameter (`hold`) is fp32 and moves after each optimizer step, by counts of the training forwards
    before it that are summed over the ranks (`adaptive.Budgets`).
    """

    takes_max_k = True
    bounded: ClassVar[bool] = False  # whether `choose` keeps to `limit_of_call` by itself
    falls_back: ClassVar[bool] = False  # whether in eval an unrouted token takes its best expert, weighted by its score
    num_counts: int = 0  # of `counted`; 0: nothing moves

    def __init__(self, *, max_k: int | None = None, **common: Any) -> None:
        super().__init__(**common)
        if self.gate_noise:
            warn_once(f"gate_type['gate_noise'] = {self.gate_noise} is ignored by a {type(self).__name__}")
        self.max_k = None if max_k is None else positive_int("gate_type['max_k']", max_k)
        self._at_start: dict[str, float] = {}
        self._counts: Tensor | None = None  # [num_counts] int64; no buffer: DDP would overwrite it with another rank's

    @property
    def most(self) -> int:
        """The largest number of experts that a token may have."""
        return min(self.slots, self.limit_of_call(None) or self.slots)

    def hold(self, name: str, size: int, value: float, learnt: bool = False) -> None:
        """Add the buffer `name` [size] fp32, filled with `value` at start; `learnt`: a parameter."""
        self._at_start[name] = value
        if learnt:
            self.register_parameter(name, nn.Parameter(torch.full((size,), value)))
        else:
            self.register_buffer(name, torch.full((size,), value))
            self.exact_buffers += (name,)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Router and state as at construction."""
        super().reset_parameters()
        for name, value in self._at_start.items():
            getattr(self, name).fill_(value)
        self._counts = None

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From `logits`: assignments bool, combine weights and scores, each [T, E]; `max_k` is applied later."""
        raise NotImplementedError

    def aux_term(self, name: str, logits_TE: Tensor, routing: Routing) -> Tensor:
        """One unweighted auxiliary loss, over the tokens that are not padding."""
        raise NotImplementedError

    def forward(
        self,
        x_TD: Tensor,
        capacity: Capacity = "exact",
        top_k: int | None = None,
        token_mask: Tensor | None = None,
        max_k: int | None = None,
    ) -> Routing:
        """Route the tokens [T, D] where `token_mask` [T] is not False; `top_k` is ignored.

        `max_k` limits the experts of a token in this call, beside the gate's own.
        """
        if top_k is not None:
            warn_once(f"top_k is ignored by a {type(self).__name__}")
        most = self.limit_of_call(max_k)
        logits_TE = self.logits(x_TD.to(gate_dtype(x_TD)))
        assigned_TE, weight_TE, score_TE = self.choose(logits_TE)
        if most is not None and most < self.slots and not self.bounded:
            assigned_TE = assigned_TE & largest(score_TE.detach().masked_fill(~assigned_TE, -torch.inf), most)
        unrouted_T = ~assigned_TE.any(dim=1)
        if self.falls_back and not self.training:
            assigned_TE = assigned_TE | (largest(score_TE.detach(), 1) & unrouted_T.unsqueeze(1))
        if token_mask is not None:
            assigned_TE, unrouted_T = assigned_TE & token_mask.unsqueeze(1), unrouted_T & token_mask
        routing = Routing.from_bits(
            pack_bits(assigned_TE),
            score_TE,
            unrouted=unrouted_T,
            weights=weight_TE,
            token_mask=token_mask,
            capacity=capacity,
            max_k=most,
        )
        routing.aux = {name: self.aux_term(name, logits_TE, routing) for name in self.aux_names}
        return routing

    def counted(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """What a training forward adds to the counts, [num_counts] int64; here `assignments_and_tokens`."""
        return assignments_and_tokens(routing)

    @torch.no_grad()
    def keep_sample(self, x_TD: Tensor, routing: Routing) -> None:
        """Count a training forward, where the gate has state to move."""
        if self.num_counts:
            with without_autocast(x_TD):
                counts = self.counted(x_TD, routing)
            if self._counts is None or self._counts.device != counts.device:
                self._counts = torch.zeros_like(counts)
            self._counts += counts

    def step_counts(self) -> Tensor | None:
        """The counts since the last step, [num_counts] int64; None: nothing moves."""
        if self._counts is None and self.num_counts:
            state: Tensor = getattr(self, self.exact_buffers[0])
            self._counts = torch.zeros(self.num_counts, dtype=torch.int64, device=state.device)
        return self._counts

    def held_values(self) -> dict[str, float]:
        """`target_k`, if there is one, and what is held; of an entry an expert the smallest and the largest."""
        values = {} if self.target_k is None else {"target_k": self.target_k}
        for name in self.exact_buffers:
            held = self.get_buffer(name).tolist()
            values |= {name: held[0]} if len(held) == 1 else {f"{name}_min": min(held), f"{name}_max": max(held)}
        return values

    def after_step(self, counts: Tensor) -> None:
        """Move the state by the counts of all ranks, and count anew."""
        self.move(counts)
        if self._counts is not None:
            self._counts.zero_()  # not a new tensor: a captured graph of forwards adds to this one

    def move(self, counts: Tensor) -> None:
        """Move the state by the counts; if these are of no token, leave it as it is."""
        raise NotImplementedError


class FixedSlotsGate(WeightedGate):
    """Base of gates where a token has k places, for `choices` candidates (default: the experts)."""

    bounded = True

    def __init__(self, *, k: int, choices: int | None = None, **common: Any) -> None:
        self.k = positive_int("gate_type['k']", k)
        super().__init__(**common)
        choices = self.slots if choices is None else choices
        if k > choices:
            raise ValueError(f"gate_type['k'] = {k} is more than there are to choose from: give at most {choices}")

    def limit_of_call(self, max_k: int | None) -> int | None:
        """k, which a call does not change."""
        if max_k is not None:
            raise ValueError(f"max_k = {max_k} does not change the k = {self.k} of a {type(self).__name__}: set 'k'")
        return self.k

    def weights(self, score_TE: Tensor, assigned_TE: Tensor) -> Tensor:
        """Scores of the experts chosen, with `normalize_gate` and k > 1 as shares of their sum."""
        chosen_TE = score_TE.masked_fill(~assigned_TE, 0)
        if self.k == 1 or not self.normalize_gate:
            return chosen_TE
        return chosen_TE / chosen_TE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(chosen_TE.dtype).tiny)


def largest(score_TE: Tensor, k: int) -> Tensor:
    """The k largest of each row, as a bool map [T, E]; of equal ones those of lower slots."""
    best_TK = score_TE.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, best_TK, True)


def tokens_of(routing: Routing) -> int | Tensor:
    """Tokens that are not padding, at least 1."""
    real = routing.real_tokens
    return real.clamp(min=1) if isinstance(real, Tensor) else max(real, 1)


def mean_of_tokens(routing: Routing, value_T: Tensor) -> Tensor:
    """The mean over the tokens that are not padding, []; of a map [T, E] over T, [E]."""
    if routing.token_mask is not None:
        value_T = value_T.masked_fill(~routing.token_mask.view(-1, *[1] * (value_T.dim() - 1)), 0)
    return value_T.sum(dim=0) / tokens_of(routing)


def shares(routing: Routing, assigned_TE: Tensor, score_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens that are not padding: the share assigned to each expert, and the mean score of each; [E]."""
    return mean_of_tokens(routing, assigned_TE.to(score_TE.dtype)), mean_of_tokens(routing, score_TE)


def assignments_and_tokens(routing: Routing) -> Tensor:
    """[assignments, tokens without padding], [2] int64."""
    k_T = routing.k_per_token
    tokens = k_T.new_full((), routing.num_tokens) if routing.token_mask is None else routing.token_mask.sum()
    return torch.stack([k_T.sum(), tokens.long()])


def mean_k(counts: Tensor, without: float) -> Tensor:
    """The mean number of experts, [] fp32, from `assignments_and_tokens`; `without` any token the given one."""
    return torch.where(counts[1] == 0, without, counts[0] / counts[1].clamp(min=1))
