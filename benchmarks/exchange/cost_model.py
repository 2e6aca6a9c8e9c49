"""The cost model of three exchanges between experts on R ranks: exact bytes of a routing, or expected bytes of a law.

R ranks, E slots in R contiguous blocks, T tokens a rank, D model dim. Matrices [R, R] hold bytes from row to column;
rows that stay on their rank cost nothing. A pass is a list of collectives in running order. Pure functions.

* once per rank: sends a row and its bitmask to every rank that holds one of its experts; one partial sum returns. The
  backward sends the gradient of the sum; the gradient of the row and one fp32 number per assignment return.
* per expert: a row for every assignment each way, in both passes, after the number of rows of each expert.
* padded: [E, C, D] each way, in both passes; the ranks first agree on C, the largest load of any expert on any rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .token_choices import Choice

EXCHANGES = ("once per rank", "per expert", "padded")
COUNT = 8  # bytes of an int64
WORD = 64  # experts per word of a bitmask
SCORE = 4  # bytes of the gradient of a score


@dataclass(frozen=True)
class Demand:
    """The traffic that a batch needs: int64 for a routing, float64 in expectation."""

    tokens: Tensor  # [R, R]: tokens of a rank with an expert on the other
    rows: Tensor  # [R, R]: assignments of a rank's tokens to experts of the other
    capacity: float  # C: the largest number of rows of an expert from one rank, at least 1
    slots: int  # E

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.tokens)


def demand(assigned: Sequence[Tensor]) -> Demand:
    """The demand of a routing; `assigned[r]` is bool [T_r, E] for the tokens of rank r."""
    R, E = len(assigned), assigned[0].shape[1]
    if E % R:
        raise ValueError(f"{E} slots over {R} ranks: give a multiple")
    blocks = [a.view(len(a), R, E // R) for a in assigned]
    return Demand(
        torch.stack([b.any(dim=2).sum(dim=0) for b in blocks]),
        torch.stack([b.sum(dim=(0, 2)) for b in blocks]),
        max(1, max(int(a.sum(dim=0).max()) for a in assigned)),
        E,
    )


def expected_demand(choice: Choice, tokens: int, ranks: int) -> Demand:
    """The expected demand of batches of `tokens` tokens per rank.

    C assumes that the loads of experts are independent. They are if the law chooses experts independently; with a fixed
    k they nearly are.
    """
    load_E = choice.loads()
    rows_R = tokens * load_E.view(ranks, -1).sum(dim=1)
    return Demand(
        (tokens * choice.touched(ranks)).expand(ranks, -1),
        rows_R.expand(ranks, -1),
        expected_largest(load_E, tokens, ranks),
        choice.num_experts,
    )


def expected_largest(load_E: Tensor, tokens: int, ranks: int) -> float:
    """E[max] of R independent binomial counts of `tokens` trials for every p in load_E."""
    n = torch.arange(tokens + 1, dtype=torch.float64)
    factorial = torch.lgamma(n + 1)
    ways = factorial[-1] - factorial - factorial.flip(0)
    log_below = torch.zeros(tokens + 1, dtype=torch.float64)
    for p in load_E.clamp(1e-300, 1 - 1e-15).unique():
        pmf = torch.exp(ways + n * torch.log(p) + (tokens - n) * torch.log1p(-p))
        times = ranks * int((load_E == p).sum())
        log_below += times * pmf.cumsum(0).clamp(max=1).log()
    below = log_below.exp()
    return max(1.0, float((1 - below).sum()))


@dataclass(frozen=True)
class Format:
    """The format of a row: D elements of `itemsize` bytes, the same in return."""

    D: int
    itemsize: int

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.D * self.itemsize


def _off_rank(bytes_RR: Tensor) -> Tensor:
    return bytes_RR * (1 - torch.eye(len(bytes_RR), dtype=bytes_RR.dtype))


def collectives(exchange: str, d: Demand, f: Format, backward: bool) -> dict[str, Tensor]:
    """Bytes [R, R] of each collective of the forward, or of the backward alone, keyed by what it carries."""
    one_RR = torch.ones_like(d.tokens)
    local = d.slots // d.ranks
    if exchange == "once per rank":
        row, words = d.tokens * f.row, -(-local // WORD)
        if backward:
            found = {"sum gradients": row, "row gradients": row.t(), "score gradients": d.rows.t() * SCORE}
        else:
            found = {"counts": one_RR * COUNT, "bitmasks": d.tokens * (8 * words), "rows": row, "partial sums": row.t()}
    elif exchange == "per expert":
        row = d.rows * f.row
        if backward:
            found = {"result gradients": row, "row gradients": row.t()}
        else:
            found = {"counts": one_RR * (COUNT * local), "rows": row, "results": row.t()}
    elif exchange == "padded":
        row = one_RR * (d.capacity * local * f.row)
        found = {"rows": row, "results": row} if not backward else {"result gradients": row, "row gradients": row}
        if not backward:
            found = {"capacity": one_RR * COUNT, **found}
    else:
        raise ValueError(f"exchange = {exchange!r}: allowed are {', '.join(EXCHANGES)}")
    return {name: _off_rank(bytes_RR) for name, bytes_RR in found.items()}


def traffic(exchange: str, d: Demand, f: Format, backward: bool) -> Tensor:
    """Bytes [R, R] of a forward, or of a forward and a backward."""
    passes = (False, True) if backward else (False,)
    return torch.stack([b for p in passes for b in collectives(exchange, d, f, p).values()]).sum(dim=0)
