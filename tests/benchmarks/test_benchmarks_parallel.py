"""The cost model of exchanges: against counting by hand, enumeration, sampling, and the bytes of real processes."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import parallel
from benchmarks.common.shapes import Shape
from benchmarks.exchange import report
from benchmarks.exchange.cost_model import (
    EXCHANGES,
    Format,
    collectives,
    demand,
    expected_demand,
    expected_largest,
    traffic,
)
from benchmarks.exchange.token_choices import Choice, fixed, skewed_loads, successes, tokens_of

FORMAT = Format(12, 2)


def by_hand(exchange: str, assigned: list[Tensor], backward: bool) -> Tensor:
    """Bytes of the forward or the backward from rank to rank, message by message, in loops over tokens and experts."""
    R, E = len(assigned), assigned[0].shape[1]
    local, row = E // R, 12 * 2
    sent = torch.zeros(R, R, dtype=torch.int64)
    capacity = max(1, *[int(a[:, e].sum()) for a in assigned for e in range(E)])
    for s, d in itertools.permutations(range(R), 2):
        if not backward:
            sent[s, d] += 8 * local if exchange == "per expert" else 8
        if exchange == "padded":
            for _ in range(local * capacity):
                sent[s, d] += row
                sent[d, s] += row
        for token in assigned[s].tolist():
            chosen = [e for e in range(d * local, (d + 1) * local) if token[e]]
            if exchange == "per expert":
                for _ in chosen:
                    sent[s, d] += row
                    sent[d, s] += row
            elif exchange == "once per rank" and chosen:
                sent[s, d] += row if backward else row + 8 * math.ceil(local / 64)
                sent[d, s] += row + (4 * len(chosen) if backward else 0)
    return sent


def routings() -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def drawn(T: int, E: int, p: float) -> Tensor:
        return torch.rand(T, E, generator=generator) < p

    return {
        "unequal numbers of tokens": [drawn(T, 12, 0.3) for T in (5, 0, 9)],
        "nobody routed": [drawn(4, 6, 0.0) for _ in range(2)],
        "everybody everywhere": [drawn(3, 8, 1.1) for _ in range(4)],
        "two words of bits": [drawn(7, 2 * 65, 0.05) for _ in range(2)],
        "one rank": [drawn(6, 5, 0.5)],
    }


@pytest.mark.parametrize("assigned", routings().values(), ids=routings().keys())
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bytes_are_those_counted_by_hand(exchange: str, assigned: list[Tensor]) -> None:
    forward, backward = (by_hand(exchange, assigned, b) for b in (False, True))
    d = demand(assigned)
    assert torch.equal(traffic(exchange, d, FORMAT, False), forward)
    assert torch.equal(traffic(exchange, d, FORMAT, True), forward + backward)


def test_what_the_model_refuses() -> None:
    with pytest.raises(ValueError, match="7 slots over 2 ranks: give a multiple"):
        demand([torch.ones(3, 7, dtype=torch.bool)] * 2)
    with pytest.raises(ValueError, match="exchange = 'bulk': allowed are once per rank"):
        collectives("bulk", demand([torch.ones(3, 4, dtype=torch.bool)] * 2), FORMAT, False)
    with pytest.raises(ValueError, match=r"skew = 20\.0 with mean k 6"):
        skewed_loads(64, 6, 20.0)
    with pytest.raises(ValueError, match="k_pmf has the mean 2, load_E the sum 3"):
        Choice.of_loads(torch.full((6,), 0.5).double(), fixed(2))
    with pytest.raises(ValueError, match="5 experts and D = 4"):
        tokens_of(torch.ones(2, 5, dtype=torch.bool), torch.eye(4, 5), torch.Generator())


def laws() -> dict[str, Choice]:
    pmf = torch.tensor([0.1, 0.2, 0.0, 0.7], dtype=torch.float64)
    return {
        "independent": Choice.of_loads(skewed_loads(6, 2.0, 2.0)),
        "fixed k": Choice.of_loads(skewed_loads(6, 2.0, 1.5), fixed(2)),
        "any k": Choice.of_loads(skewed_loads(6, 2.3, 1.7), pmf),
    }


def subsets(choice: Choice) -> dict[tuple[int, ...], float]:
    """P(S) of every set, by definition."""
    sets = [s for k in range(7) for s in itertools.combinations(range(6), k)]
    weight = {s: math.prod(choice.odds[list(s)].tolist()) for s in sets}
    k_pmf = [*choice.k_pmf.tolist(), *[0.0] * 7][:7]
    return {s: k_pmf[len(s)] * weight[s] / sum(weight[o] for o in sets if len(o) == len(s)) for s in sets}


@pytest.mark.parametrize("choice", laws().values(), ids=laws().keys())
class TestChoice:
    def test_expectations_are_those_of_all_sets(self, choice: Choice) -> None:
        p = subsets(choice)
        assert sum(p.values()) == pytest.approx(1, abs=1e-12)
        for e, load in enumerate(choice.loads().tolist()):
            assert load == pytest.approx(sum(q for s, q in p.items() if e in s), abs=1e-12)
        for ranks in (1, 2, 3, 6):
            local = 6 // ranks
            for r, touched in enumerate(choice.touched(ranks).tolist()):
                hit = sum(q for s, q in p.items() if any(e // local == r for e in s))
                assert touched == pytest.approx(hit, abs=1e-12)

    def test_samples_follow_the_law(self, choice: Choice) -> None:
        n = 20000
        drawn = choice.sample(n, torch.Generator().manual_seed(3))
        codes = (drawn.long() * 2 ** torch.arange(6)).sum(dim=1).bincount(minlength=64) / n
        for s, q in subsets(choice).items():
            assert abs(float(codes[sum(2**e for e in s)]) - q) <= 5 * math.sqrt(q * (1 - q) / n) + 1e-12

    def test_an_empty_sample(self, choice: Choice) -> None:
        assert choice.sample(0, torch.Generator()).shape == (0, 6)


def test_loads_have_the_mean_and_the_skew_that_were_asked_for() -> None:
    for skew in (1.0, 1.3, 2.0, 4.0):
        load_E = skewed_loads(64, 6, skew)
        assert float(load_E.sum()) == pytest.approx(6)
        assert float(load_E.max() / load_E.mean()) == pytest.approx(skew, rel=1e-6)
        assert float(load_E.view(8, 8).sum(1).max()) < 6 / 8 * max(1.01, skew)
    assert torch.allclose(Choice.of_loads(skewed_loads(64, 6, 2.0)).loads(), skewed_loads(64, 6, 2.0), rtol=1e-12)
    choice = Choice.of_loads(skewed_loads(16, 3, 2.0), fixed(3))
    assert torch.allclose(choice.loads(), skewed_loads(16, 3, 2.0), rtol=1e-9)


def test_the_number_of_successes() -> None:
    p = torch.full((20,), 0.25, dtype=torch.float64)
    expected = [math.comb(20, k) * 0.25**k * 0.75 ** (20 - k) for k in range(21)]
    assert successes(p).tolist() == pytest.approx(expected, abs=1e-14)


def test_the_largest_load_is_that_of_enumeration() -> None:
    load = torch.tensor([0.3, 0.6], dtype=torch.float64)

    def binomial(n: int, p: float) -> float:
        return math.comb(3, n) * p**n * (1 - p) ** (3 - n)

    expected = 0.0
    for counts in itertools.product(range(4), repeat=4):  # two experts on each of two ranks
        q = math.prod(binomial(n, p) for n, p in zip(counts, (0.3, 0.3, 0.6, 0.6), strict=True))
        expected += q * max(1, *counts)
    found = expected_largest(load, 3, 2)
    nobody = (0.7 * 0.4) ** 6  # if all counts are 0, C is 1 and the maximum is 0
    assert found == pytest.approx(expected - nobody, abs=1e-12)


@pytest.mark.parametrize("law", [parallel.Law(3, 1.0), parallel.Law(2, 2.0), parallel.Law(2, 1.0, True)])
def test_expected_bytes_are_the_mean_of_routings(law: parallel.Law) -> None:
    choice, generator, draws = law.choice(16), torch.Generator().manual_seed(1), 60
    bytes_ = {exchange: [] for exchange in EXCHANGES}
    for _ in range(draws):
        d = demand([choice.sample(40, generator) for _ in range(4)])
        for exchange in EXCHANGES:
            bytes_[exchange].append(float(traffic(exchange, d, FORMAT, True).sum()))
    for exchange, values in bytes_.items():
        mean = float(traffic(exchange, expected_demand(choice, 40, 4), FORMAT, True).sum())
        drawn = torch.tensor(values)
        assert abs(float(drawn.mean()) - mean) < 4 * float(drawn.std()) / math.sqrt(draws), exchange


def test_what_the_two_limits_are_made_of() -> None:
    """8 ranks, 64 experts, mean k 6: a token touches a rank with 1 - (1 - 6/64)^8; with k exactly 6, 4.53 of 8."""
    choice = Choice.of_loads(skewed_loads(64, 6, 1.0))
    assert choice.touched(8).tolist() == pytest.approx([1 - (1 - 6 / 64) ** 8] * 8)
    exactly = Choice.of_loads(skewed_loads(64, 6, 1.0), fixed(6))
    assert exactly.touched(8).tolist() == pytest.approx([1 - math.comb(56, 6) / math.comb(64, 6)] * 8)
    assert all(x["holds"] for x in report.limits([], parallel.SHAPE))
    narrow = [x for x in report.limits([], replace(parallel.SHAPE, D=16)) if "D 16" in x["what"]]
    assert {x["over"] for x in narrow if not x["holds"]} == {"per expert"}  # bitmasks cost much beside rows of 64 bytes
    assert 8 * float(exactly.touched(8)[0]) / 6 > 0.75  # if every token took six, the limit would not hold


def test_real_processes_send_what_the_model_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, from the command line to the files; `parallel.Case` raises if bytes or results differ."""
    few = partial(report.extrapolate, layouts=((8, 64), (64, 64)))
    monkeypatch.setattr(report, "extrapolate", few)
    laws = [parallel.Law(2, 2.0), parallel.Law(2, 1.0, True)]
    out = tmp_path / "a" / "x.json"
    argv = ["--processes", "2", "--count", "--repeats", "1", "--out", str(out)]
    assert parallel.main(argv, Shape(24, 64, 8, 64, 2), laws) == 0
    found = json.loads(out.read_text())
    assert [r["fixed_k"] for r in found["results"]] == [False, True]
    for r in found["results"]:
        assert r["worst_relative_error"] < 1e-5
        for bytes_ in r["bytes"].values():
            assert bytes_["once per rank"] > 0
        assert r["ours_over"]["forward"]["padded"]["median"] > 0
    assert out.with_suffix(".md").read_text().strip() == capsys.readouterr().out.strip()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--processes 3", "came 3 processes, allowed: a divisor of the 64 experts"),
        ("--repeats 0", "argument --repeats: came '0'"),
    ],
)
def test_options_are_checked_before_a_process_starts(
    argv: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parallel, "on_processes", lambda *_: pytest.fail("measured before the options were checked"))
    with pytest.raises(SystemExit, match=r"^2$"):
        parallel.main(argv.split())
    assert message in capsys.readouterr().err
