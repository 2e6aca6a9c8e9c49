"""The claims of a table: intervals computed by hand, and what tables that lack something leave unsaid."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dynmoe_tutel.experiments.report import claims, table
from dynmoe_tutel.experiments.report.claims import Interval
from dynmoe_tutel.experiments.report.table import RowSummary, RunNumbers, Spread

FOUR = [(0, "a"), (0, "b"), (1, "a"), (1, "b")]  # two seeds, each leaving out two parts
T3 = 3.182446  # Student's t of three degrees of freedom, 97.5 %


def row(
    name: str, out: list[float], inside: float = 0.9, parameters: float = 1e5, ms: float = 10.0, runs: Any = FOUR
) -> RowSummary:
    """A row whose runs have these accuracies out of domain."""
    by_run = tuple(
        RunNumbers(seed, test, inside, value, parameters) for (seed, test), value in zip(runs, out, strict=True)
    )
    seeds = tuple(sorted({seed for seed, _ in runs}))
    spread = Spread(sum(out) / len(out), 0.01)
    return RowSummary(
        name, seeds, Spread(inside, 0.0), spread, None, [], [], parameters, parameters, Spread(ms, None), by_run=by_run
    )


TOP_1 = row("top-1-of-8", [0.70, 0.72, 0.74, 0.76], inside=0.95, parameters=200e3, ms=20.0)
TOP_2 = row("top-2-of-8", [0.72, 0.72, 0.78, 0.78], inside=0.94, parameters=300e3, ms=30.0)


def test_an_interval_is_students_of_the_differences() -> None:
    """1, 2, 3 and 6: mean 3, squares 4 + 1 + 0 + 9 = 14, deviation sqrt(14/3)."""
    interval = Interval.of(dict(zip(FOUR, [1.0, 2.0, 3.0, 6.0], strict=True)))
    assert (interval.mean, interval.pairs, interval.seeds) == (3, 4, 2)
    assert interval.half == pytest.approx(T3 * math.sqrt(14 / 3) / 2, rel=1e-6)


def test_three_claims_of_a_dynmoe_row_by_hand() -> None:
    """Against the mean 71 72 76 77 the differences are 1 2 2 3: mean 2, half of the interval t sqrt(2/3)/2 = 1.3. Best
    in domain is top-1: 2 2 4 4, mean 3 and t sqrt(4/3)/2 = 1.84. Its seeds have 71 and 75: spread 2.8."""
    dynmoe = row("dynmoe", [0.72, 0.74, 0.78, 0.80], parameters=250e3, ms=25.0)
    above, near, fewer = claims.claims([TOP_1, TOP_2, dynmoe])
    assert (above.state, near.state, fewer.state) == ("holds", "holds", "does not hold")
    assert above.interval.mean == pytest.approx(0.02)
    assert above.interval.half == pytest.approx(T3 * math.sqrt(2 / 3) / 2 / 100, rel=1e-6)
    assert above.sentence == (
        "dynmoe, (a) above the mean of the 2 fixed-k rows: holds, +2.0 points (+0.7 to +3.3, 4 pairs)."
    )
    assert near.sentence == (
        "dynmoe, (b) within the spread of the best fixed k in domain, top-1-of-8 with ± 2.8: holds, +3.0 points "
        "(+1.2 to +4.8, 4 pairs). To find that k took 8 runs against 4: 2 times the steps and 2.0 times the time."
    )
    assert fewer.sentence == (
        "dynmoe, (c) fewer activated parameters than top-1-of-8: does not hold, +50k (+50k to +50k, 4 pairs)."
    )


@pytest.mark.parametrize(
    ("out", "parameters", "states"),
    [
        ([0.60, 0.62, 0.64, 0.66], 150e3, ["does not hold", "does not hold", "holds"]),  # 10 points below top-1
        ([0.69, 0.71, 0.73, 0.75], 200e3, ["does not hold", "holds", "does not hold"]),  # 1 below, spread 2.8
        ([0.60, 0.80, 0.65, 0.90], 200e3, ["not decided", "not decided", "does not hold"]),
    ],
)
def test_a_claim_is_decided_by_where_its_interval_lies(out: list[float], parameters: float, states: list[str]) -> None:
    found = claims.claims([TOP_1, TOP_2, row("dynmoe-k1.5", out, parameters=parameters)])
    assert [claim.state for claim in found] == states
    assert all(f": {claim.state}, " in claim.sentence for claim in found)


def test_the_best_fixed_k_is_chosen_in_domain_and_not_by_the_numbers_that_are_compared() -> None:
    """top-2 is two points better out of domain."""
    found = claims.claims([TOP_2, TOP_1, row("dynmoe", [0.7, 0.7, 0.7, 0.7])])
    assert "top-1-of-8 with" in found[1].sentence
    equal = claims.claims([TOP_2, row("top-1-of-8", [0.9] * 4, inside=0.94), row("dynmoe", [0.7] * 4)])
    assert "top-2-of-8 with" in equal[1].sentence, "of equal ones the first"


def test_equal_numbers_are_near_the_best_and_not_above_the_mean() -> None:
    same = [0.71, 0.71, 0.71, 0.71]
    rows = [row(name, same) for name in ("top-1-of-8", "top-2-of-8", "dynmoe")]
    assert [claim.state for claim in claims.claims(rows)] == ["does not hold", "holds", "does not hold"]
    said = claims.sentences(rows)
    assert "+0.0 points (+0.0 to +0.0, 4 pairs)" in said[0]
    assert said[-1] == "The widest of these intervals is ± 0.0 points with 2 seeds, no more than ± 1."


def test_only_runs_that_all_rows_have_are_compared() -> None:
    """top-2 lacks (1, b), DynMoE (0, a): what is left are (0, b) and (1, a)."""
    top_2 = row("top-2-of-8", [0.72, 0.72, 0.78], inside=0.94, runs=FOUR[:3])
    dynmoe = row("dynmoe", [0.73, 0.78, 0.10], runs=FOUR[1:])
    above = claims.claims([TOP_1, top_2, dynmoe])[0]
    assert (above.interval.pairs, above.interval.seeds) == (2, 2)
    assert above.interval.mean == pytest.approx((0.73 - 0.72 + 0.78 - 0.76) / 2)


def test_where_rows_or_seeds_are_missing_nothing_is_claimed() -> None:
    one_seed = [row(name, [0.7, 0.8], runs=FOUR[:2]) for name in ("top-1-of-8", "top-2-of-8", "dynmoe", "relu-k2")]
    other_seed = row("dynmoe", [0.7, 0.8], runs=FOUR[2:])
    for rows in (
        [row("dense", [0.7] * 4)],
        [TOP_1, TOP_2],
        [row("dynmoe", [0.7] * 4)],
        [TOP_1, row("dynmoe", [0.7] * 4)],  # of one row there is neither a mean nor a search
        [TOP_1, TOP_2, row("relu-k2", [0.7] * 4), row("quantile-top-2-of-8", [0.7] * 4)],
        one_seed,
        [TOP_1, *one_seed[1:3]],
        [TOP_1, one_seed[1], other_seed],
    ):
        assert claims.claims(rows) == []
        assert claims.sentences(rows) == []


def test_routers_are_compared_with_dynmoe_at_the_same_k() -> None:
    """And are no fixed-k rows."""
    rows = [
        row("dynmoe", [0.9] * 4),
        row("dynmoe-k2", [0.70, 0.70, 0.74, 0.74]),
        row("dynmoe-k1.5", [0.9] * 4),
        row("relu-k2", [0.69, 0.70, 0.72, 0.73]),
        row("top-p-k2.0", [0.70, 0.70, 0.74, 0.74]),
        row("null-experts-k1", [0.9] * 4),
        row("quantile-top-2-of-8", [0.9] * 4),
        row("quantile-top-1-of-8", [0.9] * 4),
    ]
    found = [claim for claim in claims.claims(rows) if claim.claim == claims.ABOVE_ROUTER]
    assert [(claim.row, claim.state) for claim in found] == [
        ("dynmoe-k2", "not decided"),
        ("dynmoe-k2", "does not hold"),
        ("dynmoe-k2", "does not hold"),
    ]
    assert "(d) above quantile-top-2-of-8: does not hold, -18.0 points" in found[2].sentence
    assert found[0].sentence == "dynmoe-k2, (d) above relu-k2: not decided, +1.0 points (-0.3 to +2.3, 4 pairs)."


@pytest.mark.parametrize(
    ("out", "state"),
    [([0.69, 0.71, 0.73, 0.75], "holds"), ([0.60] * 4, "does not hold"), ([0.60, 0.72, 0.74, 0.76], "not decided")],
)
def test_a_budget_is_compared_with_none(out: list[float], state: str) -> None:
    """Near is the spread of the row without: its seeds have 0.71 and 0.75."""
    (found,) = claims.claims([row("dynmoe", [0.70, 0.72, 0.74, 0.76]), row("dynmoe-k2", out)])
    assert (found.row, found.claim, found.state) == ("dynmoe-k2", claims.NO_LOSS, state)
    assert found.sentence.startswith(f"dynmoe-k2, (e) within the spread of dynmoe, ± 2.8: {state}, ")


def test_the_seeds_that_would_do_are_counted() -> None:
    """A deviation of 1 point, two pairs a seed: t(15) sqrt(1/16) = 0.533 and t(17) sqrt(1/18) = 0.497, so half a point
    takes 9 seeds."""
    interval = Interval(0.0, T3 * 0.01 / 2, pairs=4, seeds=2)
    assert interval.seeds_for(0.005) == 9
    assert interval.seeds_for(1.0) == 2
    wide = claims.sentences([TOP_1, TOP_2, row("dynmoe", [0.72, 0.74, 0.78, 0.80])])[-1]
    assert (
        wide
        == "The widest of these intervals is ± 1.8 points with 2 seeds: about 4 seeds, 2 more, would bring it to ± 1."
    )


def test_millions_of_parameters_are_shown_as_such() -> None:
    fixed = [row(name, [0.7] * 4, parameters=25.3e6) for name in ("top-1-of-8", "top-2-of-8")]
    fewer = claims.claims([*fixed, row("dynmoe", [0.7] * 4, parameters=23.1e6)])[2]
    assert fewer.sentence.endswith("holds, -2.2M (-2.2M to -2.2M, 4 pairs).")


def test_a_table_ends_with_its_claims() -> None:
    rows = [TOP_1, TOP_2, row("dynmoe", [0.72, 0.74, 0.78, 0.80])]
    said = claims.sentences(rows)
    assert len(said) == 4
    text = table.markdown(rows, 8, "last")
    assert "\n\n" + "\n".join(f"* {sentence}" for sentence in said) + "\n\nBy part" in text
    content = table.as_json(rows, 8, "last")
    assert content["sentences"] == said
    assert [claim["sentence"] for claim in content["claims"]] == said[:3]
    assert [claim["state"] for claim in content["claims"]] == ["holds", "holds", "holds"]
