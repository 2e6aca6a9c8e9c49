"""The rows of the experiments: their names, and the MoE layer that each puts in the place of a dense FFN.

`dense`; `top-K-of-E`, GMoE's cosine router with K of E experts, or `top-K` of as many as DynMoE starts with; `dynmoe`,
the top-any gate with adaptive experts; `dynmoe-kX`, the same with a budget of X experts a token, such as dynmoe-k1.5.
Routers of the field with as many experts as DynMoE starts with: `relu-kX`, `top-p-kX`, `expert-threshold-kX` and
`null-experts-kX` hold X experts a token, `quantile-top-K-of-E` has the names of the fixed-k rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

FIXED = re.compile(r"(quantile-)?top-([1-9]\d*)(?:-of-([1-9]\d*))?")
HELD = re.compile(r"([a-z-]+)-k([1-9]\d*(?:\.\d+)?)")
ROWS = (
    "dense",
    *[f"top-{k}-of-{experts}" for experts in (8, 16) for k in (1, 2, 4)],
    "dynmoe",
    "dynmoe-k2",
)
# Gates that hold a mean number of experts a token, by the name of their row, in the order of a table.
HOLDING: dict[str, Callable[[float], dict[str, Any]]] = {
    # The published start of 1e-8 and rate of 0.2 are for many thousand steps: in a few hundred, mean k falls too far.
    "relu": lambda k: {"type": "relu", "target_k": k, "coefficient": 0.1, "rate": 0.05},
    "top-p": lambda k: {"type": "top_p", "target_k": k},
    # The published decay of 0.99 is an average over 100 steps, behind scores that move in a short training.
    "expert-threshold": lambda k: {"type": "expert_threshold", "target_k": k, "decay": 0.9},
    # With as many null experts as others, the loss wants half of the places empty.
    "null-experts": lambda k: {"type": "null_experts", "k": math.ceil(2 * k), "target_k": k},
}
NAMES = "dense, dynmoe, dynmoe-kX, " + ", ".join(f"{name}-kX" for name in HOLDING)


def is_fixed(row: str) -> bool:
    """Whether this is a row of GMoE's router, with a k that somebody chose."""
    found = FIXED.fullmatch(row)
    return found is not None and not found[1]


def held(row: str) -> tuple[str, float] | None:
    """The router of a row -kX, "dynmoe" among them, and the mean number X of experts a token that it holds."""
    found = HELD.fullmatch(row)
    return (found[1], float(found[2])) if found is not None and found[1] in ("dynmoe", *HOLDING) else None


def routed(row: str) -> tuple[str, float] | None:
    """The router of a row with a known mean number of experts a token, and this number: `held`, and quantile rows."""
    fixed = FIXED.fullmatch(row)
    return (row, float(fixed[2])) if fixed is not None and fixed[1] else held(row)


def check_rows(rows: tuple[str, ...]) -> None:
    """ValueError for names that do not fully describe a row, for duplicates, and if there is none."""
    for row in rows:
        fixed = FIXED.fullmatch(row)
        if row in ("dense", "dynmoe") or held(row) is not None:
            continue
        if fixed is None or int(fixed[2]) > int(fixed[3] or 0):
            raise ValueError(
                f"rows must be {NAMES} with a mean number X of experts a token, or top-K-of-E and quantile-top-K-of-E "
                f"with K at most E, such as top-2-of-8, got {row!r}"
            )
    if not rows or len(set(rows)) < len(rows):
        raise ValueError(f"rows must be different ones, at least one, got {', '.join(rows) or 'none'}")


def check_targets(rows: tuple[str, ...], experts: int) -> None:
    """ValueError for rows -kX that layers of so many experts (at start) cannot hold, and for one twice."""
    holding = [(row, *found) for row in rows if (found := held(row)) is not None]
    for row, router, k in holding:
        if k > experts:
            raise ValueError(f"rows: {row} of {experts} experts: give {router}-kX with X at most {experts}")
        if router == "relu" and k >= experts / 2:
            raise ValueError(
                f"rows: {row} of {experts} experts starts with about {experts / 2:g} a token, and its loss only "
                f"lowers that: give relu-kX with X below {experts / 2:g}"
            )
    if len({each[1:] for each in holding}) < len(holding):  # dynmoe-k2.0 is dynmoe-k2
        raise ValueError(f"rows must be different ones, got {', '.join(rows)}")


def row_order(rows: Iterable[str]) -> tuple[str, ...]:
    """These rows as a table has them: dense, fixed k by experts and k, DynMoE, DynMoE by falling budget, other
    routers, each by falling target."""

    def place(row: str) -> tuple[int, float, float]:
        if fixed := FIXED.fullmatch(row):
            return 4 + len(HOLDING) if fixed[1] else 1, int(fixed[3] or 0), int(fixed[2])
        if (found := held(row)) is not None:
            return 3 + ("dynmoe", *HOLDING).index(found[0]), -found[1], 0
        return 0 if row == "dense" else 2, 0, 0

    return tuple(sorted(rows, key=place))


def moe_options(row: str, experts: int, slots: int) -> dict[str, Any]:
    """`gate_type` and `num_experts` (active at start) of a MoE row. `slots` applies to DynMoE, `experts` to all rows
    whose name has no number of experts."""
    if fixed := FIXED.fullmatch(row):
        gate: dict[str, Any] = {"type": "quantile_top_k" if fixed[1] else "cosine_top", "k": int(fixed[2])}
        experts = int(fixed[3] or experts)
    else:
        router, k = held(row) or (row, 0.0)
        if router == "dynmoe":
            gate = {"type": "top_any", "max_expert_num": slots} | ({"budget": {"target_k": k}} if k else {})
        else:
            gate = HOLDING[router](k)
    return {"gate_type": {**gate, "fp32_gate": True}, "num_experts": experts}
