"""The collectives of one layer over the ranks that divide its experts, and what those ranks agree on when it is made.

Every rank of the group must make the same calls in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ANSWER_SECONDS = 10.0  # how long a rank that lost a collective waits for the others to say that they live
_SAME_TOKENS = (
    "a bounded capacity (a factor, or 'full') needs the same number on each: give padding and a token_mask, or "
    "capacity = 'exact'"
)


@dataclass
class Traffic:
    """What this rank handed to the other ranks of its group for them to compute with, since it was made."""

    forward_bytes: int = 0
    backward_bytes: int = 0
    rows: int = 0  # token rows of forwards, partial sums not among them
    messages: int = 0  # collectives times other ranks, whether or not something was in them


class Pending:
    """A collective that may still run; `out` has its values after `wait`."""

    def __init__(self, wire: Wire, work: Any, sent: Tensor, out: Tensor) -> None:
        self._wire, self._work, self._sent, self.out = wire, work, sent, out

    def wait(self) -> Tensor:
        """What came."""
        self._wire.guarded(self._work.wait)
        return self.out


class Wire:
    """The collectives of one layer over its group, counted, with the name of a missing rank where one fails."""

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Traffic()

    def start(self, x: Tensor, sent: list[int], received: list[int], *, backward: bool = False) -> Pending:
        """x [sum(sent), ...] to the ranks, in order; [sum(received), ...] from them."""
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
        """ValueError on every rank where they bring different numbers of tokens, before any message depends on them.

        On a GPU it is an assertion of the device instead: the host does not wait.
        """
        own = torch.full((self.size,), tokens, device=device)
        theirs = self.start(own, [1] * self.size, [1] * self.size).wait()
        if device.type != "cpu":
            torch._assert_async((theirs == tokens).all(), f"{_SAME_TOKENS}; this rank has {tokens}")
        elif (found := theirs.tolist()) != [tokens] * self.size:
            raise ValueError(f"input has {found} tokens on the ranks of group: {_SAME_TOKENS}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Wire:
        """Another over the same group, which cannot be copied, that counts from the start."""
        return Wire(self.group)

    def guarded(self, call: Callable[[], Any]) -> Any:
        """The result of `call`; RuntimeError that names the ranks that are gone where it fails."""
        try:
            return call()
        except RuntimeError as error:
            missing = _silent_ranks(self.group)
            who = f"rank(s) {missing} did not answer" if missing else "all ranks still answer"
            raise RuntimeError(
                f"rank {dist.get_rank()}: the exchange of expert rows failed, and {who} within {_ANSWER_SECONDS:g} s: "
                f"the log of the rank that is gone says why ({error})"
            ) from error


def _silent_ranks(group: Any) -> list[int]:
    """The global ranks of `group` that do not write to the job's store within some seconds; its host, if that fails."""
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
    except RuntimeError:  # the store is gone, with the process that keeps it: rank 0, unless a launcher does
        return [0]
    return silent


def check_alike(what: str, own: dict[str, Any], group: Any, remedy: str = "give all ranks the same") -> None:
    """ValueError on every rank of `group` where one of `own`, plain values by name, is not the same on all."""
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, own, group=group)
    for rank, other in enumerate(of_ranks):
        for name, value in other.items():
            if value != of_ranks[0].get(name):
                raise ValueError(
                    f"{what}: {name} = {value!r} on rank {rank} of group and {of_ranks[0].get(name)!r} on rank 0: "
                    f"{remedy}"
                )


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """The tensors of all ranks of `group`, of one shape, behind one another in dimension 0; no gradient.

    Without a group, the tensor.
    """
    if group is None:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.cat(parts)


def shared_seed(group: Any) -> int:
    """A seed drawn from the global random state of rank 0 of `group`, on all its ranks."""
    seed = torch.randint(2**62, (1,), device="cpu").to(_wire_device(group))
    dist.broadcast(seed, src=dist.get_global_rank(group, 0), group=group)
    return int(seed)


@torch.no_grad()
def copy_from_first(module: nn.Module, group: Any) -> None:
    """Parameters and buffers of `module` as rank 0 of `group` has them."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if not tensor.is_meta:
            value = tensor.detach().to(_wire_device(group), copy=True)
            dist.broadcast(value, src=dist.get_global_rank(group, 0), group=group)
            tensor.copy_(value)


def _wire_device(group: Any) -> torch.device:
    """Where tensors must be to travel: NCCL carries none of the CPU's."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )
