"""Policies: after a record window, which experts of a layer to prune and in which directions to grow new ones.

A policy is a function of numbers that are equal on every rank. It touches neither layer nor optimizer: the
layer applies a `Decision`, the controller schedules it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..kernels.norms import scaled
from ..validation import refuse_unknown

if TYPE_CHECKING:
    from .records import RoutingRecord

# A sum of tokens below this share of sum ||x|| is rounding error: its direction means nothing.
CANCELLED = 1e-6
# Two directions with a cosine above this would route the same tokens: the second is not worth a slot.
SAME_DIRECTION = 0.9
SAMPLED_TOKENS = 2048
KMEANS_TOKENS = 4096
KMEANS_ITERATIONS = 20


@dataclass(frozen=True)
class ExpertChange:
    """One slot that an update activated or deactivated: `action` is "grown" or "pruned"."""

    slot: int
    action: str
    reason: str


@dataclass
class Decision:
    """A policy's decision for one gate. Prunes come first: growth can take the slots that they free.

    `prune`: (slot, reason) of active slots. `grow`: (direction w [D] fp32 of unit length, reason); the layer chooses
    a free slot for each, in this order.
    """

    prune: list[tuple[int, str]] = field(default_factory=list)
    grow: list[tuple[Tensor, str]] = field(default_factory=list)


Policy = Callable[["RoutingRecord", Tensor, int, list[int]], Decision]


POLICIES: dict[str, Callable[..., Policy]] = {}
C = TypeVar("C", bound=Callable[..., Any])


def policy(name: str) -> Callable[[C], C]:
    """Register a factory of policies under `name` for the controller; it is called with the options of the dict."""

    def register(make: C) -> C:
        POLICIES[name] = make
        return make

    return register


@policy("dynmoe")
@dataclass
class DynMoEPolicy:
    """The adaptive process of DynMoE (arXiv 2405.14297), with guards.

    Prune: active slots that had no assignment (R_E = 0) in each of the last `patience` windows; at least
    `min_experts` stay active (the lowest slots are kept). Grow: if tokens were unrouted and a slot is free, one
    expert with w = R_S / ||R_S||, where R_S is the sum of the unrouted tokens; none if they cancel out.

    With `max_new_experts` > 1 and several free slots, the kept unrouted tokens are clustered by direction
    (spherical k-means), and every centroid becomes the w of an expert. A centroid gives no expert if its tokens
    cancel out or if it points like that of a larger cluster (cosine above 0.9).

    Raises ValueError if a count is not a positive integer.
    """

    max_new_experts: int = 1
    min_experts: int = 1
    patience: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_experts", "min_experts", "patience"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    @property
    def keeps_tokens(self) -> int:
        """How many unrouted tokens the records must keep for this policy."""
        return SAMPLED_TOKENS if self.max_new_experts > 1 else 0

    def __call__(self, record: RoutingRecord, active: Tensor, free_slots: int, silent_windows: list[int]) -> Decision:
        """The decision after one window; an empty window decides nothing.

        `active` is bool [E]; `free_slots` counts the inactive slots; `silent_windows[e]` counts the latest windows in
        a row, this one included, in which active slot e had no assignment. Raises ValueError if these do not fit the
        record, or if `max_new_experts` > 1 and the record keeps no tokens.
        """
        counts = record.counts.tolist()
        if len(active) != len(counts) or len(silent_windows) != len(counts):
            raise ValueError(
                f"active and silent_windows must have one entry a slot ({len(counts)}), "
                f"got {len(active)} and {len(silent_windows)}"
            )
        if self.max_new_experts > 1 and record.keep_tokens < 1:
            raise ValueError(
                f"max_new_experts={self.max_new_experts} clusters unrouted tokens, but record.keep_tokens is "
                f"{record.keep_tokens}: set it to some thousands before the window opens"
            )
        tokens = int(record.tokens)
        if tokens == 0:
            return Decision()
        prune = self._silent(counts, active.tolist(), silent_windows, tokens)
        unrouted = int(record.unrouted_tokens)
        room = min(self.max_new_experts, free_slots + len(prune))
        if unrouted == 0 or room < 1:
            return Decision(prune)
        reason = f"{unrouted} of {tokens} tokens unrouted ({unrouted / tokens:.1%})"
        if room > 1:
            return Decision(prune, _cluster_directions(record.unrouted_sample, room, reason))
        direction = _direction(record.unrouted_sum, record.unrouted_norm)
        return Decision(prune, [] if direction is None else [(direction, reason)])

    def _silent(
        self, counts: list[int], active: list[bool], silent_windows: list[int], tokens: int
    ) -> list[tuple[int, str]]:
        silent = [
            slot
            for slot, count in enumerate(counts)
            if active[slot] and count == 0 and silent_windows[slot] >= self.patience
        ]
        kept = max(0, self.min_experts - (sum(active) - len(silent)))
        reasons = []
        for slot in silent[kept:]:
            windows = silent_windows[slot]
            earlier = f", nor in the {windows - 1} before" if windows > 1 else ""
            reasons.append((slot, f"no assignment in {tokens} tokens of the window{earlier}"))
        return reasons


def make_policy(given: str | Mapping[str, Any] | Policy, **options: Any) -> Policy:
    """The policy for a name with `options`, for a dict {"type": name, ...}, or a callable `given` itself.

    Raises ValueError for an unknown name or option.
    """
    if callable(given):
        return given
    if isinstance(given, Mapping):
        options = {key: value for key, value in given.items() if key != "type"}
        given = given.get("type", "")
    if not isinstance(given, str) or given not in POLICIES:
        names = ", ".join(repr(name) for name in POLICIES)
        raise ValueError(
            f"policy must be one of {names}, a dict with its 'type' and options, or a callable (record, active, "
            f"free_slots, silent_windows) -> Decision, got {given!r}"
        )
    refuse_unknown(f"policy {given!r}", options, list(inspect.signature(POLICIES[given]).parameters))
    return POLICIES[given](**options)


def checked_decision(decision: Decision, active: Sequence[bool], like_D: Tensor, where: str) -> Decision:
    """`decision` with its directions as unit vectors [D] fp32 on the device of `like_D` [D].

    Raises ValueError, naming `where`, if the decision does not fit the gate's `active` slots: a slot out of range,
    inactive or named twice; more experts than free slots; a direction that has another shape, is zero or not finite.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"policy: the decision for {where} {what}")

    if not isinstance(decision, Decision):
        raise refuse(f"must be a Decision, got {type(decision).__name__}")
    slots = [slot for slot, _ in decision.prune]
    for slot in slots:
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot < len(active):
            raise refuse(f"prunes slot {slot!r}, allowed are 0 to {len(active) - 1}")
        if not active[slot] or slots.count(slot) > 1:
            raise refuse(f"prunes slot {slot}, which is {'named twice' if active[slot] else 'not active'}")
    free = len(active) - sum(active) + len(slots)
    if len(decision.grow) > free:
        raise refuse(f"grows {len(decision.grow)} experts, free slots are {free}")
    grow = [(unit_direction(direction, like_D, where), reason) for direction, reason in decision.grow]
    return Decision(list(decision.prune), grow)


def unit_direction(direction: Tensor, like_D: Tensor, where: str) -> Tensor:
    """`direction` as a unit vector [D] fp32 on the device of `like_D`; ValueError, naming `where`, if impossible."""
    if not isinstance(direction, Tensor) or direction.shape != like_D.shape:
        got = list(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise ValueError(
            f"policy: the decision for {where} grows in a direction of shape {got}, must be {list(like_D.shape)}"
        )
    in_range = scaled(direction.detach().to(like_D.device, torch.float32).unsqueeze(0), 1)
    direction_D, length = in_range.vectors[0], in_range.norm.item()
    if not 0 < length < float("inf"):
        raise ValueError(
            f"policy: the decision for {where} grows in a direction of norm {length}, must be finite and above zero"
        )
    return direction_D if abs(length - 1) < 1e-6 else direction_D / length  # a unit vector stays bitwise


def _direction(sum_D: Tensor, norm: Tensor) -> Tensor | None:
    """sum_D / ||sum_D|| in fp32; None if the tokens, whose norms sum to `norm`, cancel out or overflow."""
    length_of_sum = scaled(sum_D.float().unsqueeze(0), 1)
    length, total = length_of_sum.norm.item(), float(norm)
    if length_of_sum.factor is not None:
        total *= length_of_sum.factor.item()
    if not (length < float("inf") and total < float("inf")) or length <= CANCELLED * total:
        return None
    return length_of_sum.vectors[0] / length


def _cluster_directions(tokens_ND: Tensor, clusters: int, reason: str) -> list[tuple[Tensor, str]]:
    """At most `clusters` directions [D] of `tokens_ND`, largest cluster first, each with its reason."""
    # thin the samples of many ranks: the clustering takes n * n cosines
    tokens_ND = tokens_ND[:: -(-len(tokens_ND) // KMEANS_TOKENS) or 1].float()
    tokens_ND, norm_N, *_ = scaled(tokens_ND, 1)
    usable_N = norm_N.isfinite() & (norm_N > 0)
    unit_ND = tokens_ND[usable_N] / norm_N[usable_N, None]
    if len(unit_ND) == 0:
        return []
    label_N = _spherical_kmeans(unit_ND, clusters)
    members = torch.bincount(label_N, minlength=clusters)
    grown: list[tuple[Tensor, str]] = []
    for cluster in torch.argsort(members, descending=True, stable=True).tolist():
        direction = _direction(unit_ND[label_N == cluster].sum(0), members[cluster])
        if direction is None or any(torch.dot(direction, w).item() > SAME_DIRECTION for w, _ in grown):
            continue
        share = f"cluster of {int(members[cluster])} in a sample of {len(unit_ND)}"
        grown.append((direction, f"{reason}, {share}"))
    return grown


def _spherical_kmeans(unit_ND: Tensor, clusters: int) -> Tensor:
    """The cluster [N] int64 of each unit vector, by cosine; deterministic.

    Greedy seeds (facility location: Nemhauser, Wolsey and Fisher, 1978): each is the vector that raises the sum of
    best cosines most, so that no outlier becomes a seed. Lloyd steps on the sphere (Dhillon and Modha, 2001) follow
    until no vector changes its cluster.
    """
    cosine_NN = unit_ND @ unit_ND.T
    best_N = cosine_NN.new_full((len(unit_ND),), -1.0)
    seeds = []
    for _ in range(min(clusters, len(unit_ND))):
        seed = int((cosine_NN - best_N[:, None]).clamp_min_(0).sum(0).argmax())
        seeds.append(seed)
        best_N = torch.maximum(best_N, cosine_NN[:, seed])
    centre_KD = unit_ND[seeds]
    label_N = (unit_ND @ centre_KD.T).argmax(1)
    for _ in range(KMEANS_ITERATIONS):
        one_hot_NK = torch.nn.functional.one_hot(label_N, len(seeds)).to(unit_ND.dtype)
        sum_KD = one_hot_NK.T @ unit_ND
        length_K = torch.linalg.vector_norm(sum_KD, dim=1, keepdim=True)
        # an empty cluster, or one whose members cancel out, keeps its centre
        centre_KD = torch.where(length_K > CANCELLED, sum_KD / length_K.clamp_min(CANCELLED), centre_KD)
        moved_N = (unit_ND @ centre_KD.T).argmax(1)
        if torch.equal(moved_N, label_N):
            break
        label_N = moved_N
    return label_N
