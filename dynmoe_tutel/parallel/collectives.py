"""Collectives of one layer between the ranks that hold its experts, and checks that those ranks build the same layer.

Every rank of the group must make the same calls in the same order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger("dynmoe_tutel")

_TOGETHER = (
    "a layer whose experts are divided over ranks needs all ranks of its group in every forward, in evaluation too. "
    "Evaluate on all of them; or save with checkpoint.distributed on all of them, and load that into a layer without a "
    "group in one process"
)
_WORDS = ("evaluate", "evaluate with gradients", "compute in training mode without gradients", "train")  # by mode
_SLOW_SECONDS = 30.0  # after which a rank that evaluates says for whom it waits
_ANSWER_SECONDS = 10.0  # after a failed collective: how long to wait for signs of life from the other ranks
_SAME_TOKENS = (
    "a bounded capacity (a factor, or 'full') needs the same number on each: give padding and a token_mask, or "
    "capacity = 'exact'"
)


@dataclass
class Traffic:
    """What this rank has sent to the other ranks of its group for their computation."""

    forward_bytes: int = 0
    backward_bytes: int = 0
    rows: int = 0  # token rows of forwards, without partial sums
    messages: int = 0  # collectives times other ranks, empty messages included


class Pending:
    """A collective that may still be running; `out` holds the result after `wait`."""

    def __init__(self, wire: Wire, work: Any, sent: Tensor, out: Tensor) -> None:
        self._wire, self._work, self._sent, self.out = wire, work, sent, out

    def wait(self) -> Tensor:
        """Wait and return the result."""
        self._wire.guarded(lambda: self._wire.finish(self._work))
        return self.out


class Wire:
    """One layer's collectives over its group: counts traffic and, after a failure, names the missing ranks."""

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Traffic()
        self.mode = 3  # of this forward, 0 to 3: 2 in training mode, plus 1 with gradients

    def set_mode(self, training: bool) -> None:
        """Say what this rank does in the forward that comes."""
        self.mode = 2 * training + torch.is_grad_enabled()

    def check_modes(self, modes: Sequence[int]) -> None:
        """Raise ValueError, on every rank, if one trains while another evaluates; `modes` by rank."""
        if len(set(modes)) > 1:
            found = [
                f"rank(s) {[rank for rank, each in enumerate(modes) if each == mode]} {_WORDS[mode]}"
                for mode in sorted(set(modes))
            ]
            raise ValueError(f"in one forward, of the ranks of group {' and '.join(found)}: {_TOGETHER}")

    def finish(self, work: Any) -> None:
        """Wait for a collective; in evaluation, warn when that takes long (on Gloo, where a wait can be resumed)."""
        if self.mode != 3 and dist.get_backend(self.group) == "gloo":
            try:
                work.wait(timedelta(seconds=_SLOW_SECONDS))
                return
            except RuntimeError:
                if work.is_completed():
                    raise
            logger.warning(
                "rank %d has waited for the other ranks of group for %g s in a forward without training: %s",
                dist.get_rank(),
                _SLOW_SECONDS,
                _TOGETHER,
            )
        work.wait()

    def start(self, x: Tensor, sent: list[int], received: list[int], *, backward: bool = False) -> Pending:
        """Start an all-to-all: send x [sum(sent), ...] to the ranks in order, receive [sum(received), ...]."""
        x = x.contiguous()
        out = x.new_empty((sum(received), *x.shape[1:]))
        work = self.guarded(lambda: dist.all_to_all_single(out, x, received, sent, group=self.group, async_op=True))
        size = (sum(sent) - sent[self.rank]) * x.element_size() * x.shape[1:].numel()
        if backward:
            self.traffic.backward_bytes += size
        else:
            self.traffic.forward_bytes += size
        self.traffic.messages += self.size - 1
        return Pending(self, work, x, out)

    def check_tokens(self, tokens: int, device: torch.device) -> None:
        """Raise ValueError on every rank if modes or numbers of tokens differ, before any message depends on them.

        On a GPU a device-side assertion instead, so that the host does not wait.
        """
        own = torch.full((self.size,), 4 * tokens + self.mode, device=device)
        theirs = self.start(own, [1] * self.size, [1] * self.size).wait()
        if device.type != "cpu":
            said = (
                f"{_SAME_TOKENS}; this rank has {tokens}. Or ranks do not {_WORDS[self.mode]} as this one: {_TOGETHER}"
            )
            torch._assert_async((theirs == own).all(), said)
            return
        self.check_modes((theirs % 4).tolist())
        if (found := (theirs // 4).tolist()) != [tokens] * self.size:
            raise ValueError(f"input has {found} tokens on the ranks of group: {_SAME_TOKENS}")

    def guarded(self, call: Callable[[], Any]) -> Any:
        """The result of `call`; if it fails, RuntimeError that names the ranks that are gone."""
        try:
            return call()
        except RuntimeError as error:
            missing = _silent_ranks(self.group)
            who = f"rank(s) {missing} did not answer" if missing else "all ranks still answer"
            why = "the log of the rank that is gone says why"
            if self.mode != 3:
                why = f"{why}. If none is gone, this one alone went to {_WORDS[self.mode]}: {_TOGETHER}"
            raise RuntimeError(
                f"rank {dist.get_rank()}: the exchange of expert rows failed, and {who} within {_ANSWER_SECONDS:g} s: "
                f"{why} ({error})"
            ) from error


def _silent_ranks(group: Any) -> list[int]:
    """The global ranks of `group` that do not answer in the job's store in time; if the store fails, its host."""
    ranks = dist.get_process_group_ranks(group)
    try:
        store = dist.distributed_c10d._get_default_store()
        keys = {
            rank: f"dynmoe_tutel/lives/{dist.distributed_c10d._get_process_group_name(group)}/{rank}" for rank in ranks
        }
        store.set(keys[dist.get_rank()], "1")
        end = time.monotonic() + _ANSWER_SECONDS
        silent = ranks
        while silent and time.monotonic() < end:
            silent = [rank for rank in silent if not store.check([keys[rank]])]
            time.sleep(0.05)
    except RuntimeError:  # the store died with its process, rank 0 unless a launcher keeps it
        return [0]
    return silent


def world_size(group: Any = None) -> int:
    """The number of ranks of `group` (None: all); 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def values_of_ranks(value: Any, group: Any) -> list[Any]:
    """A plain value of every rank of `group`, in rank order."""
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, value, group=group)
    return of_ranks


def check_alike(what: str, own: dict[str, Any], group: Any, remedy: str = "give all ranks the same") -> None:
    """Raise ValueError on every rank of `group` if one of `own` (plain values by name) differs between ranks."""
    of_ranks = values_of_ranks(own, group)
    for rank, other in enumerate(of_ranks):
        for name, value in other.items():
            if value != of_ranks[0].get(name):
                raise ValueError(
                    f"{what}: {name} = {value!r} on rank {rank} of group and {of_ranks[0].get(name)!r} on rank 0: "
                    f"{remedy}"
                )


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """Concatenate the equally shaped tensors of all ranks of `group` along dimension 0, without gradient.

    Without a group, returns the tensor.
    """
    if group is None:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.cat(parts)


def sum_over_ranks(tensors: Sequence[Tensor], group: Any) -> None:
    """Sum each tensor over the ranks of `group` (None: all), in place and in one collective; all have one dtype."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def shared_seed(group: Any) -> int:
    """A seed for all ranks of `group`, drawn from the global random state of its rank 0."""
    seed = torch.randint(2**62, (1,), device="cpu").to(wire_device(group))
    dist.broadcast(seed, src=dist.get_global_rank(group, 0), group=group)
    return int(seed)


@torch.no_grad()
def copy_from_first(module: nn.Module, group: Any) -> None:
    """Overwrite parameters and buffers of `module` with those of rank 0 of `group`."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if not tensor.is_meta:
            value = tensor.detach().to(wire_device(group), copy=True)
            dist.broadcast(value, src=dist.get_global_rank(group, 0), group=group)
            tensor.copy_(value)


def wire_device(group: Any) -> torch.device:
    """The device for tensors in collectives of `group` (None: all ranks): NCCL does not take CPU tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )
