"""Drawing weights: from private generators, never from the global random state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


def seed_of(generator: torch.Generator | None) -> int | None:
    """The seed from which `generator` started."""
    return None if generator is None else generator.initial_seed()


def seeded(seed: int | None) -> torch.Generator | None:
    """A new private generator; None, for the global random state, without a seed."""
    return None if seed is None else torch.Generator().manual_seed(seed)


def reset_modules(owner: str, modules: Iterable[nn.Module]) -> None:
    """Call `reset_parameters()` of every module that has parameters or buffers of its own.

    Raises ValueError, and resets nothing, if one lacks the method: it would keep what it holds, which may be
    uninitialised memory.
    """
    holding = [m for m in modules if any(True for _ in (*m.parameters(recurse=False), *m.buffers(recurse=False)))]
    for module in holding:
        if not callable(getattr(module, "reset_parameters", None)):
            raise ValueError(f"reset_parameters: {type(module).__name__}, a part of {owner}, has no reset_parameters()")
    for module in holding:
        module.reset_parameters()  # type: ignore[operator]


def linear(inputs: int, outputs: int, bias: bool, generator: torch.Generator | None) -> nn.Linear:
    """A new nn.Linear, drawn from `generator`, or without one from the global random state."""
    with torch.random.fork_rng(devices=[], enabled=generator is not None):
        made = nn.Linear(inputs, outputs, bias)
    if generator is not None:
        fill_linear(made.weight, made.bias, generator)
    return made


@torch.no_grad()
def fill_uniform(p: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill `p` from U(-bound, bound), on the CPU if a private generator is given."""
    if p.is_meta:
        return
    if generator is None:
        p.uniform_(-bound, bound)
    else:
        p.copy_(torch.empty(p.shape, device="cpu").uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def fill_linear(
    weight: Tensor, bias: Tensor | None, generator: torch.Generator | None, *, transposed: bool = False
) -> None:
    """Fill `weight` [out, in] (`transposed`: [in, out]) and `bias` [out] with the bits of a new nn.Linear.

    On the CPU if a private generator is given.
    """
    if weight.is_meta:
        return
    like = weight if generator is None else torch.empty(0, device="cpu")
    drawn = like.new_empty(weight.shape[::-1] if transposed else weight.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    weight.copy_(drawn.t() if transposed else drawn)
    if bias is not None:
        bound = 1 / math.sqrt(drawn.shape[1])
        bias.copy_(nn.init.uniform_(like.new_empty(bias.shape), -bound, bound, generator=generator))


@contextmanager
def drawn_from(generator: torch.Generator | None) -> Iterator[None]:
    """Seed the global random state from `generator` inside the block and restore it after; None: do nothing.

    In the first block that a new generator serves, the state is that of `torch.manual_seed` with its seed, as in
    Tutel's constructor.
    """
    if generator is None:
        yield
        return
    seed = generator.initial_seed()
    is_new = torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state())
    drawn = int(torch.randint(2**62, (1,), generator=generator, device="cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(seed if is_new else drawn)
        yield
