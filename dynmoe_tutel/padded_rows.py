"""Expert rows as Tutel has them: padded to [E, C, D], C rows of room for each expert, zeros behind an expert's own.

For what works on such tensors: Tutel's exchange, its expert modules, custom experts. Packed rows, [A, D], need neither
the room nor the copy. Depends on routing only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Routing, describe


class PaddedRows:
    """Where the rows of `routing` stand in [E, C, ...]; C is `capacity`, by default the largest load (at least 1).

    Waits for the device. ValueError where an expert has more rows than `capacity`.
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
        """[rows, D] to [E, C, D]; what lies behind the A-th row is left out."""
        padded = rows.new_zeros((self.num_experts * self.capacity, rows.shape[1]))
        padded = padded.index_copy(0, self.place_A, rows[: self.num_rows])
        return padded.view(self.num_experts, self.capacity, rows.shape[1])

    def unpad(self, padded: Tensor) -> Tensor:
        """[E, C, D] to [rows, D], zeros behind the A-th row where a capacity makes room for more."""
        if padded.dim() != 3 or padded.shape[:2] != (self.num_experts, self.capacity):
            raise ValueError(f"padded rows must be [{self.num_experts}, {self.capacity}, D], got {describe(padded)}")
        rows = padded.flatten(0, 1).index_select(0, self.place_A)
        return rows if self.behind == 0 else torch.cat([rows, rows.new_zeros((self.behind, rows.shape[1]))])
