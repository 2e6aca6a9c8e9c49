"""The picture of `Routing` in docs/how_it_works.md: `python tests/routing_picture.py` prints it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dynmoe_tutel import Routing

# 3 tokens and 4 experts: token 2 has three experts, and no token has expert 3.
ASSIGNED = [[1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 0]]
LABEL, GAP = 20, "  "


def picture(assigned_TE: Tensor) -> str:
    """The assignment, its bits, and the index in both directions, from the fields of its `Routing`."""
    routing = Routing.from_assignments(assigned_TE)
    T, E = assigned_TE.shape
    lines = [" " * LABEL + GAP.join(f"e{e}" for e in range(E)) + "      bits  k"]
    for t, word in enumerate(routing.bits[:, 0].tolist()):
        marks = GAP.join(f"{'x' if word >> e & 1 else '.':>2}" for e in range(E))
        lines.append(f"{f'token {t}':<{LABEL}}{marks}      {word:0{E}b}  {int(routing.k_per_token[t])}")
    A = len(routing.token_of_row)
    experts, tokens = [f"e{e}" for e in range(E)], [f"t{t}" for t in range(T)]
    by_expert = [("row", torch.arange(A)), ("token_of_row", routing.token_of_row)]
    by_token = [("assignment", torch.arange(A)), ("row_of_assignment", routing.row_of_assignment)]
    lines += ["", *_direction("by expert", experts, by_expert, "expert_offsets", routing.expert_offsets)]
    lines += ["", *_direction("by token", tokens, by_token, "token_offsets", routing.token_offsets)]
    return "\n".join(lines)


def _direction(title: str, heads: list[str], rows: list[tuple[str, Tensor]], name: str, offsets: Tensor) -> list[str]:
    """One direction of the index: a cell for each expert or token, the offsets where the cells begin and end."""
    bounds = offsets.tolist()
    parts = [(label, [values[a:b].tolist() for a, b in pairwise(bounds)]) for label, values in rows]
    cells = [(title, heads), *((label, [GAP.join(map(str, part)) for part in split]) for label, split in parts)]
    cells.append((name, [str(offset) for offset in bounds[:-1]]))
    widths = [max(len(cell[i]) for _, cell in cells) for i in range(len(heads))]
    lines = []
    for label, row in cells:
        columns = " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append(f"{label:<{LABEL}}{columns} |{f' {bounds[-1]}' if label == name else ''}")
    return lines


if __name__ == "__main__":
    print(picture(torch.tensor(ASSIGNED, dtype=torch.bool)))  # noqa: T201
