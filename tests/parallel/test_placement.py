"""Placement of experts: plans against a search over all placements, and their laws on random loads."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmoe_tutel.parallel.placement import (
    Placement,
    imbalance,
    plan_swaps,
    rank_loads,
    slot_order,
    slot_to_grow,
    spread_swaps,
)


def after(load: list[int], swaps: list[tuple[int, int]]) -> list[int]:
    return [load[slot] for slot in slot_order(swaps, len(load))]


def test_loads_of_ranks() -> None:
    assert rank_loads([1, 2, 3, 4, 5, 6], 1) == [21]
    assert rank_loads([1, 2, 3, 4, 5, 6], 2) == [6, 15]
    assert rank_loads([1, 2, 3, 4, 5, 6], 3) == [3, 7, 11]
    assert imbalance([1, 2, 3, 4, 5, 6], 3) == pytest.approx(11 / 7)
    assert imbalance([0] * 6, 3) == imbalance([7, 0], 1) == 1.0


@pytest.mark.parametrize(
    ("free", "load", "ranks", "slot"),
    [
        ([2, 5], [9, 9, 0, 0, 0, 0], 1, 2),  # one rank: the lowest, whatever the load
        ([2, 5], [9, 9, 0, 1, 1, 0], 2, 5),
        ([2, 5], [1, 1, 0, 9, 9, 0], 2, 2),
        ([1, 2, 4, 5], [9, 0, 0, 9, 0, 0], 2, 1),  # a tie: the lowest rank, and there the lowest slot
        ([0, 1], [0, 0, 9, 9, 0, 1], 3, 0),
        ([1], [9, 0, 0, 1], 2, 1),  # the less loaded rank is full
        ([], [1, 1], 2, None),
    ],
)
def test_a_grown_expert_goes_to_the_least_loaded_rank(
    free: list[int], load: list[int], ranks: int, slot: int | None
) -> None:
    assert slot_to_grow(free, load, ranks) == slot


@pytest.mark.parametrize(
    ("load", "ranks", "threshold", "swaps"),
    [
        ([90, 80, 10, 0], 2, 1.2, [(0, 2)]),  # 170 to 10 becomes 90 to 90
        ([50, 50, 50, 50], 2, 1.0, []),
        ([100, 0, 0, 0], 2, 1.0, []),  # one expert has it all: wherever it is, the ratio is 2
        ([9, 9, 9, 0, 0, 0], 1, 1.0, []),
        ([0] * 8, 4, 1.0, []),
        ([60, 40, 50, 50, 30, 30], 3, 1.3, []),  # 100, 100, 60: below the threshold
        ([30, 20, 10, 0], 2, 1.0, [(0, 2)]),  # 50 to 10 becomes 30 to 30: one swap, not two
        ([10, 10, 0, 0, 10, 10], 3, 1.0, []),  # four equal experts on three ranks: one always has two
    ],
)
def test_plans(load: list[int], ranks: int, threshold: float, swaps: list[tuple[int, int]]) -> None:
    assert plan_swaps(load, ranks, threshold) == swaps


loads = st.integers(1, 4).flatmap(
    lambda ranks: st.tuples(
        st.just(ranks),
        st.integers(1, 4).flatmap(
            lambda local: st.lists(st.integers(0, 50), min_size=ranks * local, max_size=ranks * local)
        ),
    )
)


@settings(deadline=None, max_examples=200)
@given(loads, st.sampled_from([1.0, 1.2, 2.0]))
def test_laws(case: tuple[int, list[int]], threshold: float) -> None:
    """Every swap crosses ranks; a plan gains or is empty; below the threshold it makes no swap."""
    ranks, load = case
    local, before = len(load) // ranks, imbalance(load, ranks)
    swaps = plan_swaps(load, ranks, threshold)
    ratios = [imbalance(after(load, swaps[:n]), ranks) for n in range(len(swaps) + 1)]
    assert all(a // local != b // local for a, b in swaps)
    assert sorted(slot_order(swaps, len(load))) == list(range(len(load)))
    if before <= threshold or ranks == 1:
        assert swaps == []
    if swaps:
        assert ratios[-1] < before
        assert ratios[-1] == min(ratios)
        assert all(ratio > threshold for ratio in ratios[:-1])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=6, max_size=6), st.sampled_from([2, 3]))
def test_greedy_is_near_the_best_placement(load: list[int], ranks: int) -> None:
    """Against every placement of six experts. A swap is local search: it may miss the best, by less than one expert."""
    found = imbalance(after(load, plan_swaps(load, ranks, 1.0)), ranks)
    best = min(imbalance(p, ranks) for p in permutations(load))
    assert best <= found
    if sum(load):
        assert (found - best) * sum(load) / ranks <= max(load)


@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 4), st.data())
def test_active_experts_are_spread_evenly(ranks: int, local: int, data: st.DataObject) -> None:
    active = data.draw(st.lists(st.booleans(), min_size=ranks * local, max_size=ranks * local))
    order = slot_order(spread_swaps(active, ranks), len(active))
    held = rank_loads([int(active[slot]) for slot in order], ranks)
    assert max(held) - min(held) <= 1
    assert sorted(order) == list(range(len(active)))
    if max(rank_loads([int(a) for a in active], ranks)) - min(rank_loads([int(a) for a in active], ranks)) <= 1:
        assert order == list(range(len(active)))


@pytest.mark.parametrize(
    ("slots", "ranks", "local", "shards", "owners"),
    [(8, 1, 8, 1, [[0]] * 8), (4, 2, 2, 1, [[0], [0], [1], [1]]), (2, 4, 1, 2, [[0, 1], [2, 3]])],
)
def test_who_holds_what(slots: int, ranks: int, local: int, shards: int, owners: list[list[int]]) -> None:
    for rank in range(ranks):
        place = Placement(slots, None, rank, ranks)
        assert (place.local, place.shards) == (local, shards)
        assert [place.owners(slot) for slot in range(slots)] == owners
        assert all(rank in owners[slot] for slot in range(place.first, place.first + local))
        assert place.blocks == (ranks if shards == 1 else 1)


def test_active_at_start_are_the_first_of_every_block() -> None:
    assert Placement(8, None, 0, 2).at_start(4) == [True, True, False, False] * 2
    assert Placement(8).at_start(3) == [True] * 3 + [False] * 5
    with pytest.raises(ValueError, match="6 slots cannot be divided over the 4 ranks of group: give a multiple"):
        Placement(6, None, 0, 4)
