"""`Routing`: the ragged token-to-expert assignment of one batch, in both CSR directions.

Every gate returns one; dispatch, experts, combine and records use it.

T tokens, D model dim, E expert slots, A = sum of k_t assignments; a row is one assignment, in expert-major order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from . import kernels
from .validation import describe

Capacity = str | float
COMBINE_GRADIENTS = ("mean", "normalized")


def check_capacity(capacity: Capacity) -> None:
    """ValueError unless `capacity` is "exact", "full" or a positive finite factor of T."""
    if isinstance(capacity, str) and capacity in ("exact", "full"):
        return
    if isinstance(capacity, bool | str) or not isinstance(capacity, Real) or not 0 < capacity < math.inf:
        raise ValueError(f'capacity = {capacity!r}: give "exact", "full", or a positive factor of the number of tokens')


def is_active(experts_mask: Tensor) -> Tensor:
    """bool, as `experts_mask`: active where it is above one half. An average of masks may lie between 0 and 1."""
    return experts_mask > 0.5


@dataclass(frozen=True)
class Router:
    """The tensors that a top-any gate compared; the experts' operation needs them for the scores' gradient."""

    vectors: Tensor  # [D, E], w
    thresholds: Tensor  # [E], G
    scale: Tensor | None  # [], tau; None: 1
    inv_norm: Tensor  # [T], 1 / ||x_t||
    unit: tuple[Tensor, ...] = ()  # unit vectors [E, D] and their inverse norms [E], if they were computed
    version: int | None = None  # of `thresholds` when they were compared

    @classmethod
    def of(
        cls, vectors: Tensor, thresholds: Tensor, scale: Tensor | None, inv_norm: Tensor, unit: Sequence[Tensor]
    ) -> Router:
        """With the thresholds' version, where they have one."""
        unversioned = torch.compiler.is_compiling() or thresholds.is_inference()
        version = None if unversioned else thresholds._version
        return cls(vectors, thresholds, scale, inv_norm, tuple(unit), version)

    def theta(self, thresholds: Tensor | None = None) -> Tensor:
        """sigmoid(tau G), [E] in the scores' dtype; of the router's thresholds or those given."""
        G_E = (self.thresholds if thresholds is None else thresholds).to(self.inv_norm.dtype)
        return torch.sigmoid(G_E if self.scale is None else self.scale * G_E)


@dataclass
class Routing:
    """The ragged assignment of T tokens to E expert slots; index tensors are int32.

    With a bounded or full capacity the two row tensors have that static length, padded with -1 after A entries.
    """

    bits: Tensor  # [T, ceil(E / 64)] int64: bit e % 64 of word e // 64 set where the token activates expert e
    scores: Tensor  # [T, E] fp32 (fp64 for fp64 tokens)
    expert_offsets: Tensor  # [E+1]: rows of expert e are expert_offsets[e]:expert_offsets[e+1]
    token_offsets: Tensor  # [T+1]
    token_of_row: Tensor  # [A], token order inside an expert
    row_of_assignment: Tensor  # [A], token-major, expert order inside a token
    unrouted: Tensor  # [T] bool: passed no threshold; in eval such a token gets its best expert
    theta: Tensor | None = None  # [E] in (0, 1), `thresholds` where they were computed with the routing
    weights: Tensor | None = None  # [T, E] combine weights of a fixed-k gate; None: mean over the token's experts
    shift: Tensor | None = None  # [1]: by which a budget with a target raised the thresholds, in cosine units
    dropped: Tensor | None = None  # [] int64: assignments dropped by a bounded capacity
    token_mask: Tensor | None = None  # [T] bool, False for padding (no expert, not unrouted); None: no padding
    router: Router | None = None  # top-any gates only
    room: int | None = None  # C: rows an expert has in Tutel's padded layout, if chosen for this batch
    aux: dict[str, Tensor] = field(default_factory=dict)  # unweighted auxiliary loss terms by name

    @classmethod
    def from_bits(
        cls,
        bits_TW: Tensor,
        scores: Tensor,
        *,
        unrouted: Tensor | None = None,
        thresholds: Tensor | None = None,
        shift: Tensor | None = None,
        weights: Tensor | None = None,
        capacity: Capacity = "exact",
        token_mask: Tensor | None = None,
        block_counts: Tensor | None = None,
        max_k: int | None = None,
        router: Router | None = None,
    ) -> Routing:
        """Index an assignment given as a bitmask [T, ceil(E / 64)] int64 (bit e % 64 of word e // 64).

        `block_counts` come with the bits from `kernels.threshold_gate`; `max_k` experts a token are the most there. A
        top-any gate gives its `router`, from which `thresholds` follow.
        """
        T, E = scores.shape
        dropped, rows = None, -1
        if capacity == "full":
            rows = T * E
        elif not isinstance(capacity, str):
            rows = math.ceil(min(capacity, E) * T)  # no more than T * E exist
            if max_k is None or rows < max_k * T:
                if thresholds is None and router is not None:
                    thresholds = router.theta()
                margin_TE = dropping_margins(bits_TW, scores, thresholds, unrouted, shift)
                bits_TW, dropped = kernels.bound_assignments(bits_TW, margin_TE, rows)
                block_counts = None
        index = kernels.ragged_index(bits_TW, E, rows, block_counts)
        expert_offsets, token_offsets, token_of_row, row_of_assignment = index
        if unrouted is None:
            unrouted = token_offsets.diff() == 0
            if token_mask is not None:
                unrouted &= token_mask
        return cls(
            bits_TW,
            scores,
            expert_offsets,
            token_offsets,
            token_of_row,
            row_of_assignment,
            unrouted,
            thresholds,
            weights,
            shift,
            dropped,
            token_mask,
            router,
        )

    @classmethod
    def from_assignments(
        cls,
        assigned: Tensor,
        scores: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        capacity: Capacity = "exact",
    ) -> Routing:
        """Index any boolean map [T, E], for custom gates. `weights` [T, E] are combine weights; None: the mean."""
        if not isinstance(assigned, Tensor) or assigned.dtype != torch.bool or assigned.dim() != 2:
            raise ValueError(f"assigned must be bool [T, E], got {describe(assigned)}")
        for name, tensor in (("scores", scores), ("weights", weights)):
            if tensor is not None and not (
                isinstance(tensor, Tensor)
                and tensor.shape == assigned.shape
                and tensor.is_floating_point()
                and tensor.device == assigned.device
            ):
                raise ValueError(
                    f"{name} must be floating point {list(assigned.shape)} on {assigned.device}, got {describe(tensor)}"
                )
        check_capacity(capacity)
        if scores is None:
            scores = assigned.float() if weights is None else weights
        return cls.from_bits(kernels.pack_bits(assigned), scores, weights=weights, capacity=capacity)

    @property
    def thresholds(self) -> Tensor | None:
        """sigmoid(tau G), [E] in (0, 1), of a top-any gate.

        Raises RuntimeError if they were not computed before the gate's thresholds changed.
        """
        if self.theta is not None or self.router is None:
            return self.theta
        router = self.router
        if router.version is not None and router.version != router.thresholds._version:
            raise RuntimeError(
                "the gate's thresholds were changed in place after this forward: read routing.thresholds before the "
                "optimizer's step, or take the Routing of layer.route(x), which keeps them"
            )
        return router.theta()

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.scores.shape[0]

    @property
    def real_tokens(self) -> int | Tensor:
        """Number of tokens without padding: T, or [] int64."""
        return self.num_tokens if self.token_mask is None else self.token_mask.sum()

    @property
    def num_experts(self) -> int:
        """E, slots."""
        return self.scores.shape[1]

    @property
    def k_histogram(self) -> Tensor:
        """[E+1] int64: tokens by the number of experts that passed their thresholds; padding is in no bin."""
        k_T = self.k_per_token.masked_fill(self.unrouted, 0)  # in eval unrouted tokens get their best expert
        if self.token_mask is not None:
            k_T = k_T.masked_fill(~self.token_mask, self.num_experts + 1)
        bins = torch.zeros(self.num_experts + 2, dtype=torch.int64, device=k_T.device)
        return bins.index_add_(0, k_T, bins.new_ones(k_T.shape))[:-1]  # bincount synchronises

    @property
    def k_per_token(self) -> Tensor:
        """Assignments of each token, [T] int32."""
        return self.token_offsets.diff()

    @property
    def counts(self) -> Tensor:
        """Assignments of each expert slot, [E] int32."""
        return self.expert_offsets.diff()

    @property
    def num_assignments(self) -> Tensor:
        """A, [] int32 on the device."""
        return self.expert_offsets[-1]

    @property
    def expert_of_row(self) -> Tensor:
        """The expert of each of the A rows, [A] int64. Waits for the device."""
        A = int(self.num_assignments)
        return torch.arange(self.num_experts, device=self.counts.device).repeat_interleave(self.counts, output_size=A)

    @property
    def assigned(self) -> Tensor:
        """The assignment as a dense map, [T, E] bool."""
        return kernels.unpack_bits(self.bits, self.num_experts)

    def straight_through(self) -> Tensor:
        """The 0/1 assignment [T, E] of a top-any gate with the straight-through gradient to scores and thresholds."""
        if self.thresholds is None:
            raise ValueError("straight_through is for top-any gates: a fixed-k gate learns through its weights")
        passed = self.assigned & ~self.unrouted.unsqueeze(1)
        # no product: the score of an inactive slot, or of a token that is not finite, may be NaN
        margin = (self.scores - self.thresholds).masked_fill(~passed, 0)
        return passed.to(self.scores.dtype) + (margin - margin.detach())

    @property
    def index(self) -> kernels.Index:
        """The four index arrays."""
        return kernels.Index(self.expert_offsets, self.token_offsets, self.token_of_row, self.row_of_assignment)

    def row_gates(self, combine_gradient: str = "mean") -> Tensor:
        """The gate value of each row, [rows], through which the router learns; see `kernels.row_gates`."""
        if combine_gradient not in COMBINE_GRADIENTS:
            raise ValueError(f"combine_gradient = {combine_gradient!r}: allowed are 'mean' and 'normalized'")
        if self.weights is not None:
            return kernels.row_gates(self.weights, None, self.unrouted, self.index, False)
        centred = combine_gradient == "normalized"
        thresholds = self.thresholds
        if thresholds is None:  # a custom gate with uniform weights: no router gradient
            scores, thresholds = self.scores.detach(), self.scores.new_zeros(self.num_experts)
            return kernels.row_gates(scores, thresholds, self.unrouted, self.index, centred)
        return kernels.row_gates(self.scores, thresholds, self.unrouted, self.index, centred)

    def dispatch(self, x_TD: Tensor) -> Tensor:
        """Token rows to expert rows, [T, D] to [rows, D]."""
        self._expect_here("x_TD", x_TD)
        return kernels.dispatch(x_TD, self.token_offsets, self.token_of_row, self.row_of_assignment)

    def sum(self, rows_AD: Tensor) -> Tensor:
        """Expert rows back to tokens, [rows, D] to [T, D]: the plain sum, without weights."""
        self._expect_here("rows_AD", rows_AD)
        return kernels.combine(rows_AD, self.token_offsets, self.token_of_row, self.row_of_assignment, False)

    def combine(self, rows_AD: Tensor) -> Tensor:
        """Expert rows back to tokens, [rows, D] to [T, D]: the mean, or the sum if `weights` (in the rows already)."""
        self._expect_here("rows_AD", rows_AD)
        return kernels.combine(
            rows_AD, self.token_offsets, self.token_of_row, self.row_of_assignment, self.weights is None
        )

    def _expect_here(self, name: str, tensor: Tensor) -> None:
        device = self.token_offsets.device
        if not isinstance(tensor, Tensor) or tensor.device != device:
            raise ValueError(f"{name} must be a tensor on {device}, as the routing, got {describe(tensor)}")


def dropping_margins(
    bits_TW: Tensor, scores: Tensor, thresholds: Tensor | None, unrouted: Tensor | None, shift: Tensor | None
) -> Tensor:
    """What a bounded capacity drops by, the smallest first, [T, E] without gradient: the margin score - threshold.

    Eval's fallback assignments go last. Where a budget raises the thresholds, every token's best assignment, which no
    shift takes from it, goes after all others: by its margin alone, one that is below the raised threshold would go
    first, and the token would lose its only expert before others lose their second.
    """
    margin_TE = (scores if thresholds is None else scores - thresholds).detach()
    if shift is not None:
        assigned_TE = kernels.unpack_bits(bits_TW, scores.shape[1])
        best_T1 = margin_TE.masked_fill(~assigned_TE, -math.inf).amax(dim=1, keepdim=True)
        is_best_TE = (margin_TE == best_T1) & (shift > 0)
        margin_TE = margin_TE + 2 * is_best_TE.to(margin_TE.dtype)  # margins lie between -1 and 1
    if unrouted is not None:
        margin_TE = margin_TE.masked_fill(unrouted.unsqueeze(1), math.inf)
    return margin_TE


class PaddedRows:
    """The positions of a routing's rows in [E, C, ...]; C is `capacity`, by default the largest load (at least 1).

    Waits for the device. Raises ValueError if an expert has more rows than `capacity`.
    """

    def __init__(self, routing: Routing, capacity: int | None = None) -> None:
        self.num_experts = routing.num_experts
        load = int(routing.counts.max()) if routing.num_experts else 0
        self.capacity = max(load, 1) if capacity is None else capacity
        if load > self.capacity:
            raise ValueError(f"capacity = {capacity} rows, but an expert has {load}: drop the surplus first")
        expert_A = routing.expert_of_row
        self.num_rows = expert_A.shape[0]
        self.behind = routing.token_of_row.shape[0] - self.num_rows
        own_A = torch.arange(self.num_rows, device=expert_A.device) - routing.expert_offsets[expert_A]
        self.place_A = expert_A * self.capacity + own_A

    def pad(self, rows: Tensor) -> Tensor:
        """[rows, D] to [E, C, D]; rows after the A-th are left out."""
        padded = rows.new_zeros((self.num_experts * self.capacity, rows.shape[1]))
        padded = padded.index_copy(0, self.place_A, rows[: self.num_rows])
        return padded.view(self.num_experts, self.capacity, rows.shape[1])

    def unpad(self, padded: Tensor) -> Tensor:
        """[E, C, D] to [rows, D]; rows after the A-th (spare capacity) are zeros."""
        if padded.dim() != 3 or padded.shape[:2] != (self.num_experts, self.capacity):
            raise ValueError(f"padded rows must be [{self.num_experts}, {self.capacity}, D], got {describe(padded)}")
        rows = padded.flatten(0, 1).index_select(0, self.place_A)
        return rows if self.behind == 0 else torch.cat([rows, rows.new_zeros((self.behind, rows.shape[1]))])
