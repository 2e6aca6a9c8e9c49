"""The policy's decisions on hand-made records."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from dynmoe_tutel.adaptive.policy import Decision, DynMoEPolicy, checked_decision, make_policy

D = 8


@dataclass
class Record:
    """The fields of a RoutingRecord that a policy reads."""

    counts: Tensor
    tokens: Tensor
    unrouted_sum: Tensor = field(default_factory=lambda: torch.zeros(D))
    unrouted_norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    unrouted_tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    keep_tokens: int = 0
    unrouted_sample: Tensor = field(default_factory=lambda: torch.zeros(0, D))


def record_of(counts: list[int], tokens: int, unrouted: Tensor | None = None, keep: int = 0) -> Record:
    """A record of `tokens` tokens, of which those in `unrouted` [n, D] have no expert."""
    record = Record(torch.tensor(counts), torch.tensor(tokens), keep_tokens=keep)
    if unrouted is not None:
        record.unrouted_sum = unrouted.float().sum(0)
        record.unrouted_norm = unrouted.float().norm(dim=1).sum()
        record.unrouted_tokens = torch.tensor(len(unrouted))
        record.unrouted_sample = unrouted.float()[:keep]
    return record


def decide(policy: DynMoEPolicy, record: Record, active: list[int], silent: list[int] | None = None) -> Decision:
    if silent is None:
        silent = [int(bool(a) and c == 0) for a, c in zip(active, record.counts.tolist(), strict=True)]
    return policy(record, torch.tensor(active).bool(), len(active) - sum(active), silent)  # type: ignore[arg-type]


def clusters(directions: Tensor, each: int | list[int], noise: float = 0.1, seed: int = 0) -> Tensor:
    """Shuffled tokens of different lengths, scattered around each of `directions` [C, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [each] * len(directions) if isinstance(each, int) else each
    centres = directions.repeat_interleave(torch.tensor(sizes), 0)
    length = 0.5 + torch.rand(len(centres), 1, generator=generator)
    tokens = length * (centres + noise * torch.randn(centres.shape, generator=generator))
    return tokens[torch.randperm(len(tokens), generator=generator)]


class TestPrune:
    def test_every_active_slot_without_an_assignment(self) -> None:
        decision = decide(DynMoEPolicy(), record_of([5, 0, 7, 0, 0], 12), [1, 1, 1, 0, 1])
        assert decision.prune == [
            (1, "no assignment in 12 tokens of the window"),
            (4, "no assignment in 12 tokens of the window"),
        ]
        assert decision.grow == []

    def test_an_empty_window_decides_nothing(self) -> None:
        """Regression for upstream's defect D3: an update without a forward in its window pruned every expert."""
        assert decide(DynMoEPolicy(), record_of([0, 0, 0], 0), [1, 1, 1], [9, 9, 9]) == Decision()

    def test_when_all_are_silent_the_lowest_slot_stays(self) -> None:
        """Regression for upstream's defect D3, with tokens in the window."""
        decision = decide(DynMoEPolicy(), record_of([0, 0, 0, 0], 12), [0, 1, 1, 1])
        assert [slot for slot, _ in decision.prune] == [2, 3]

    @pytest.mark.parametrize(("least", "pruned"), [(1, [0, 2, 4]), (2, [2, 4]), (3, [4]), (4, []), (5, [])])
    def test_min_experts_keeps_the_lowest_silent_slots(self, least: int, pruned: list[int]) -> None:
        decision = decide(DynMoEPolicy(min_experts=least), record_of([0, 5, 0, 0, 0], 12), [1, 1, 1, 0, 1])
        assert [slot for slot, _ in decision.prune] == pruned

    def test_patience_waits_for_consecutive_silent_windows(self) -> None:
        record = record_of([0, 0, 5, 0], 12)
        decision = decide(DynMoEPolicy(patience=3), record, [1, 1, 1, 1], [2, 3, 0, 4])
        assert decision.prune == [
            (1, "no assignment in 12 tokens of the window, nor in the 2 before"),
            (3, "no assignment in 12 tokens of the window, nor in the 3 before"),
        ]


class TestGrow:
    def test_one_expert_points_along_the_sum_of_unrouted_tokens(self) -> None:
        unrouted = torch.randn(37, D, generator=torch.Generator().manual_seed(0)) + 1
        decision = decide(DynMoEPolicy(), record_of([5, 5, 0], 512, unrouted), [1, 1, 0])
        [(direction, reason)] = decision.grow
        total = unrouted.double().sum(0)
        torch.testing.assert_close(direction.double(), total / total.norm(), rtol=0, atol=1e-6)
        assert direction.dtype == torch.float32
        assert reason == "37 of 512 tokens unrouted (7.2%)"
        assert decision.prune == []

    def test_no_unrouted_token_or_no_free_slot_grows_nothing(self) -> None:
        assert decide(DynMoEPolicy(), record_of([5, 5, 0], 9), [1, 1, 0]).grow == []
        assert decide(DynMoEPolicy(), record_of([5, 5, 1], 9, torch.ones(2, D)), [1, 1, 1]).grow == []

    def test_a_slot_pruned_by_this_decision_is_free(self) -> None:
        decision = decide(DynMoEPolicy(), record_of([5, 5, 0], 9, torch.ones(2, D)), [1, 1, 1])
        assert len(decision.prune) == len(decision.grow) == 1

    def test_opposite_tokens_that_cancel_grow_nothing(self) -> None:
        """Regression for upstream's defect D13: dividing a zero sum by its norm gave a NaN column."""
        x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
        record = record_of([5, 0], 200, torch.cat([x, -x]))
        record.unrouted_sum += 1e-5 * torch.ones(D)  # the rounding error of fp32 sums in another order
        assert decide(DynMoEPolicy(), record, [1, 0]).grow == []

    def test_nearly_opposite_tokens_still_have_a_direction(self) -> None:
        x = torch.eye(D)[:1]
        [(direction, _)] = decide(DynMoEPolicy(), record_of([5, 0], 200, torch.cat([x, -0.999 * x])), [1, 0]).grow
        torch.testing.assert_close(direction, x[0])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_tokens_that_are_not_finite_grow_nothing(self, value: float) -> None:
        unrouted = torch.ones(3, D)
        unrouted[1, 2] = value
        assert decide(DynMoEPolicy(), record_of([5, 0], 9, unrouted), [1, 0]).grow == []
        several = decide(DynMoEPolicy(max_new_experts=2), record_of([5, 0, 0], 9, unrouted, 64), [1, 0, 0])
        [(direction, _)] = several.grow  # the finite tokens among them still count
        torch.testing.assert_close(direction, torch.full((D,), D**-0.5))


class TestSeveral:
    def test_each_expert_lands_on_a_cluster_of_its_own_largest_first(self) -> None:
        centres = torch.eye(D)[:3]
        unrouted = clusters(centres, [30, 80, 50])
        decision = decide(
            DynMoEPolicy(max_new_experts=3), record_of([9] + [0] * 4, 400, unrouted, 512), [1, 0, 0, 0, 0]
        )
        grown = torch.stack([direction for direction, _ in decision.grow])
        assert ((grown @ centres.T) > 0.97).int().tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
        torch.testing.assert_close(grown.norm(dim=1), torch.ones(3))
        assert decision.grow[0][1] == "160 of 400 tokens unrouted (40.0%), cluster of 80 in a sample of 160"

    def test_a_direction_is_the_spherical_centroid_of_its_cluster(self) -> None:
        a, b = clusters(torch.eye(D)[:1], 20, seed=1), clusters(torch.eye(D)[4:5], 30, seed=2)
        decision = decide(DynMoEPolicy(max_new_experts=2), record_of([9, 0, 0], 99, torch.cat([a, b]), 64), [1, 0, 0])
        for (direction, _), tokens in zip(decision.grow, (b, a), strict=True):
            centroid = torch.nn.functional.normalize(tokens, dim=1).sum(0)
            torch.testing.assert_close(direction, centroid / centroid.norm())

    def test_one_cluster_gives_one_expert(self) -> None:
        unrouted = clusters(torch.ones(1, D), 200, noise=0.2)
        decision = decide(DynMoEPolicy(max_new_experts=4), record_of([9] + [0] * 7, 400, unrouted, 512), [1] + [0] * 7)
        assert len(decision.grow) == 1

    def test_opposite_clusters_give_two_experts(self) -> None:
        """Their sum cancels, but both clusters still get an expert."""
        x = clusters(torch.eye(D)[:1], 40)
        decision = decide(DynMoEPolicy(max_new_experts=2), record_of([9, 0, 0], 99, torch.cat([x, -x]), 128), [1, 0, 0])
        (first, _), (second, _) = decision.grow
        assert torch.dot(first, second) < -0.99

    def test_an_outlier_neither_takes_a_seed_nor_turns_a_centroid(self) -> None:
        centres = torch.eye(D)[:2]
        unrouted = torch.cat([clusters(centres, 60), torch.eye(D)[7:] * 1000])
        decision = decide(DynMoEPolicy(max_new_experts=2), record_of([9, 0, 0], 200, unrouted, 256), [1, 0, 0])
        grown = torch.stack([direction for direction, _ in decision.grow])
        assert ((grown @ centres.T).amax(0) > 0.97).all()

    @pytest.mark.parametrize(("free", "grown"), [(1, 1), (2, 2), (3, 3), (6, 4)])
    def test_never_more_than_allowed_or_free(self, free: int, grown: int) -> None:
        unrouted = clusters(torch.eye(D)[:6], 20)
        decision = decide(
            DynMoEPolicy(max_new_experts=4),
            record_of([9] + [0] * free, 400, unrouted, 512),
            [1] + [0] * free,
        )
        assert len(decision.grow) == grown

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_fewer_tokens_than_experts_asked_for(self, count: int) -> None:
        decision = decide(
            DynMoEPolicy(max_new_experts=4),
            record_of([9] + [0] * 5, 9, torch.eye(D)[:count], 64),
            [1] + [0] * 5,
        )
        assert len(decision.grow) == count

    def test_zero_tokens_have_no_direction(self) -> None:
        decision = decide(
            DynMoEPolicy(max_new_experts=3), record_of([9, 0, 0, 0], 9, torch.zeros(5, D), 64), [1, 0, 0, 0]
        )
        assert decision.grow == []

    def test_two_calls_are_bitwise_equal_and_leave_the_global_seed_alone(self) -> None:
        record = record_of([9, 0, 0, 0], 999, torch.randn(300, D), 512)
        state = torch.get_rng_state()
        first, second = (decide(DynMoEPolicy(max_new_experts=3), record, [1, 0, 0, 0]).grow for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))

    def test_a_record_without_tokens_to_cluster_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"max_new_experts=2 .*record.keep_tokens is 0"):
            decide(DynMoEPolicy(max_new_experts=2), record_of([9, 0, 0], 9, torch.ones(2, D)), [1, 0, 0])


class TestArguments:
    @pytest.mark.parametrize("name", ["max_new_experts", "min_experts", "patience"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
    def test_counts_must_be_positive_integers(self, name: str, value: object) -> None:
        with pytest.raises(ValueError, match=rf"{name} must be an integer of at least 1, got {value!r}"):
            DynMoEPolicy(**{name: value})  # type: ignore[arg-type]

    def test_lengths_must_fit_the_record(self) -> None:
        with pytest.raises(ValueError, match=r"one entry a slot \(3\), got 2 and 3"):
            decide(DynMoEPolicy(), record_of([1, 1, 1], 9), [1, 1], [0, 0, 0])

    def test_make_policy(self) -> None:
        assert make_policy("dynmoe") == DynMoEPolicy()
        own = DynMoEPolicy(patience=2)
        assert make_policy(own) is own
        for wrong in ("paper", 3, None):
            with pytest.raises(
                ValueError, match=rf"policy must be one of 'dynmoe', a dict .* callable .* got {wrong!r}"
            ):
                make_policy(wrong)  # type: ignore[arg-type]


class TestCheckedDecision:
    def check(self, decision: Decision) -> Decision:
        return checked_decision(decision, [True, True, False], torch.zeros(D), "mlp.gates.0")

    def test_directions_become_unit_vectors_and_unit_vectors_stay_bitwise(self) -> None:
        checked = self.check(Decision([(1, "a")], [(torch.eye(D)[0], "b"), (torch.full((D,), 3.0).double(), "c")]))
        assert checked.prune == [(1, "a")]
        for seed in range(20):
            unit = torch.randn(D, generator=torch.Generator().manual_seed(seed))
            unit /= unit.norm()
            assert torch.equal(self.check(Decision([], [(unit, "b")])).grow[0][0], unit)
        torch.testing.assert_close(checked.grow[1][0], torch.full((D,), D**-0.5))

    @pytest.mark.parametrize(
        ("decision", "message"),
        [
            (None, "must be a Decision, got NoneType"),
            (Decision([(3, "")]), "prunes slot 3, allowed are 0 to 2"),
            (Decision([(-1, "")]), "prunes slot -1, allowed are 0 to 2"),
            (Decision([(2, "")]), "prunes slot 2, which is not active"),
            (Decision([(0, ""), (0, "")]), "prunes slot 0, which is named twice"),
            (Decision([], [(torch.ones(D), "")] * 2), "grows 2 experts, free slots are 1"),
            (Decision([], [(torch.ones(D + 1), "")]), r"direction of shape \[9\], must be \[8\]"),
            (Decision([], [([1.0] * D, "")]), "direction of shape list"),  # type: ignore[list-item]
            (Decision([], [(torch.zeros(D), "")]), "norm 0.0, must be finite and above zero"),
            (Decision([], [(torch.full((D,), math.nan), "")]), "norm nan"),
            (Decision([], [(torch.full((D,), math.inf), "")]), "norm inf"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, decision: Decision, message: str) -> None:
        with pytest.raises(ValueError, match=f"policy: the decision for mlp.gates.0 .*{message}"):
            self.check(decision)
