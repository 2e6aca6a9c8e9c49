"""The rows of the experiments: their names, and the MoE layer that each puts in the place of a dense FFN.

`dense`; `top-K-of-E`, GMoE's cosine router with K of E experts, or `top-K` of as many as DynMoE starts with; `dynmoe`,
the top-any gate with adaptive experts; `dynmoe-kX`, the same with a budget of X experts a token, such as dynmoe-k1.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

FIXED = re.compile(r"top-([1-9]\d*)(?:-of-([1-9]\d*))?")
BUDGET = re.compile(r"dynmoe-k([1-9]\d*(?:\.\d+)?)")
ROWS = (
    "dense",
    *[f"top-{k}-of-{experts}" for experts in (8, 16) for k in (1, 2, 4)],
    "dynmoe",
)


def check_rows(rows: tuple[str, ...]) -> None:
    """ValueError for names that do not fully describe a row, for duplicates, and if there is none."""
    for row in rows:
        fixed = FIXED.fullmatch(row)
        if row in ("dense", "dynmoe") or BUDGET.fullmatch(row):
            continue
        if fixed is None or int(fixed[1]) > int(fixed[2] or 0):
            raise ValueError(
                "rows must be dense, dynmoe, dynmoe-kX with a mean number X of experts a token, or top-K-of-E with K "
                f"at most E, such as top-2-of-8, got {row!r}"
            )
    if not rows or len(set(rows)) < len(rows):
        raise ValueError(f"rows must be different ones, at least one, got {', '.join(rows) or 'none'}")


def row_order(rows: Iterable[str]) -> tuple[str, ...]:
    """These rows as a table has them: dense, fixed k by experts and k, DynMoE, DynMoE by falling budget."""

    def place(row: str) -> tuple[int, float, float]:
        if fixed := FIXED.fullmatch(row):
            return 1, int(fixed[2] or 0), int(fixed[1])
        if budget := BUDGET.fullmatch(row):
            return 3, -float(budget[1]), 0
        return 0 if row == "dense" else 2, 0, 0

    return tuple(sorted(rows, key=place))


def moe_options(row: str, experts: int, slots: int) -> dict[str, Any]:
    """`gate_type` and `num_experts` (active at start) of a MoE row. `slots` applies to DynMoE, `experts` to DynMoE
    and to rows whose name has no number of experts."""
    fixed = FIXED.fullmatch(row)
    if fixed is None:
        gate: dict[str, Any] = {"type": "top_any", "max_expert_num": slots, "fp32_gate": True}
        if budget := BUDGET.fullmatch(row):
            gate["budget"] = {"target_k": float(budget[1])}
        return {"gate_type": gate, "num_experts": experts}
    return {
        "gate_type": {"type": "cosine_top", "k": int(fixed[1]), "fp32_gate": True},
        "num_experts": int(fixed[2] or experts),
    }
