"""Drawing weights: from private generators, never from the global random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .validation import warn_once


def generators_of(seeds: tuple[int | None, ...] | None, num_gates: int) -> list[torch.Generator | None]:
    """A private generator for each gate, then one for the experts; None without a seed."""
    if seeds is not None and not (
        isinstance(seeds, tuple | list) and all(s is None or (type(s) is int and abs(s) < 2**63) for s in seeds)
    ):
        raise ValueError(f"seeds = {seeds!r}: give (gates, experts), each an integer below 2**63 or None")
    given = tuple(seeds or ())
    if len(given) > 2 and given[2] is not None:
        warn_once("seeds[2] is ignored: seeding the global random state is left to the caller")
    gate_seed, expert_seed = (*given, None, None)[:2]
    values = [None if gate_seed is None else gate_seed + i for i in range(num_gates)] + [expert_seed]
    return [None if value is None else torch.Generator().manual_seed(value) for value in values]


@torch.no_grad()
def fill_uniform(p: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill `p` from U(-bound, bound), on the CPU if a private generator is given."""
    if p.is_meta:
        return
    if generator is None:
        p.uniform_(-bound, bound)
    else:
        p.copy_(torch.empty(p.shape, device="cpu").uniform_(-bound, bound, generator=generator))


@contextmanager
def drawn_from(generator: torch.Generator | None) -> Iterator[None]:
    """Seed the global random state from `generator` inside the block and restore it after; None: do nothing."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device="cpu")))
        yield
