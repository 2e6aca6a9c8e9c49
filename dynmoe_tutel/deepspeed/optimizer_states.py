"""An expert's entries in DeepSpeed's optimizers, which train fp32 copies: flattened, and a piece of them on each rank.

A change of an expert that reached the model's parameter alone would be gone after the next step, when the copy
overwrites it. So the copy takes the new value, and the moments of that slot start anew; no collective is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import DummyOptim
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from ..adaptive.optimizer_state import Index, OptimizerRows, optimizer_list
from ..experts.base import SlotTensor


@dataclass(frozen=True)
class Piece:
    """This rank's entries [first, first + numel) of a flattened parameter, in a flat fp32 copy that is trained.

    `copy` [numel] and `states` are views of what the optimizer holds; `group` is the copy's parameter group.
    """

    first: int
    copy: Tensor
    states: Mapping[str, Tensor]
    group: Mapping[str, Any]


def optimizer_rows_of(optimizer: Any) -> OptimizerRows:
    """The rows of experts in `optimizer`, as `deepspeed.initialize` returned it.

    Raises ValueError for optimizers whose copies are laid out in other ways.
    """
    if optimizer is None or isinstance(optimizer, DummyOptim):
        return OptimizerRows([])
    if type(optimizer) is DeepSpeedZeroOptimizer:  # ZenFlow's subclass steps with copies of its own
        return PartitionedRows(optimizer, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return ShardedRows(optimizer, optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat)
    if isinstance(optimizer, BF16_Optimizer):
        return PartitionedRows(optimizer, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    if isinstance(optimizer, FP16_Optimizer):
        return FlatRows(optimizer, optimizer.fp16_groups, optimizer.fp32_groups_flat)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return CopiedRows(optimizer, optimizer.fp16_groups, optimizer.fp32_groups)
    if isinstance(optimizer, torch.optim.Optimizer):
        return OptimizerRows(optimizer_list(optimizer))
    raise ValueError(
        f"optimizer: experts cannot grow or be pruned in a {type(optimizer).__name__}, whose copies of the parameters "
        "are not known. Choose ZeRO stage 0, 1 or 2 without ZenFlow"
    )


class CopiedRows(OptimizerRows):
    """Entries of experts in the fp32 copies of a wrapping optimizer, one a parameter (`FP16_UnfusedOptimizer`).

    `groups` are the model's parameters by parameter group, `copies` what is trained in their place.
    """

    def __init__(self, optimizer: Any, groups: Sequence[Sequence[nn.Parameter]], copies: Sequence[Any]) -> None:
        super().__init__([optimizer.optimizer])
        self._groups, self._copies = groups, copies
        self._wrapper = optimizer

    def lack(self, parameters: Iterable[nn.Parameter], model: nn.Module) -> bool:
        own = {id(parameter) for group in self._groups for parameter in group}
        trained = [id(parameter) in own for parameter in parameters if parameter.requires_grad]
        return bool(trained) and not any(trained)

    def of(self, parameter: nn.Parameter, index: Index) -> list[SlotTensor]:
        raise ValueError(
            f"experts cannot move between ranks: a {type(self._wrapper).__name__} keeps their state in pieces. "
            "rebalance() needs fp32 and ZeRO stage 0"
        )

    @torch.no_grad()
    def reset(self, parameter: nn.Parameter, index: Index) -> None:
        """Give the copy the parameter's values at `index`, and its state there what a fresh parameter's holds."""
        self.drop_histories()
        for piece in self._pieces(parameter):
            at = _entries(parameter, index, piece.first, piece.copy.numel())
            values = parameter.detach().reshape(-1)[at.to(parameter.device)]
            own = (at - piece.first).to(piece.copy.device)
            piece.copy[own] = values.to(piece.copy)
            for name, state in piece.states.items():
                state[own] = values.to(state) if self.is_copy(name) else self.fresh(name, piece.group)

    def _pieces(self, parameter: nn.Parameter) -> Iterator[Piece]:
        for number, (group, copies) in enumerate(zip(self._groups, self._copies, strict=True)):
            for each, copy in zip(group, copies, strict=True):
                if each is parameter:
                    yield self._piece(number, 0, copy, 0, copy.numel())

    def _piece(self, number: int, first: int, copy: Tensor, start: int, numel: int) -> Piece:
        """The piece at [start, start + numel) of `copy`, which is of parameter group `number`."""
        optimizer = self.optimizers[0]
        states = {
            str(name): value.view(-1).narrow(0, start, numel)
            for name, value in optimizer.state.get(copy, {}).items()
            if isinstance(value, Tensor) and value.shape == copy.shape
        }
        return Piece(first, copy.detach().view(-1).narrow(0, start, numel), states, optimizer.param_groups[number])


class FlatRows(CopiedRows):
    """Entries of experts in one flat fp32 copy of all parameters of a group (`FP16_Optimizer`)."""

    def _pieces(self, parameter: nn.Parameter) -> Iterator[Piece]:
        for number, (group, copy) in enumerate(zip(self._groups, self._copies, strict=True)):
            start = 0
            for each in group:
                if each is parameter:
                    yield self._piece(number, 0, copy, start, each.numel())
                start += each.numel()


class PartitionedRows(CopiedRows):
    """Entries of experts in this rank's partition of the flat fp32 copies (ZeRO 1 and 2, `BF16_Optimizer`)."""

    def _pieces(self, parameter: nn.Parameter) -> Iterator[Piece]:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # frozen, or wholly on other ranks
            return
        # States are looked up in the optimizer: the mapping's own views of them are lost when a checkpoint is loaded.
        number, of_copy = mapping.param_group_index, mapping.hp_fragment_address
        first = mapping.lp_fragment_address.start
        yield self._piece(number, first, self._copies[number], of_copy.start, of_copy.numel)


class ShardedRows(CopiedRows):
    """Entries of experts in this rank's shard of each parameter (ZeRO 3), while the parameters are gathered."""

    def _pieces(self, parameter: nn.Parameter) -> Iterator[Piece]:
        zero = self._wrapper
        place = zero.grad_position.get(zero.get_param_id(parameter))
        if place is not None:
            part, start, numel = place
            first = numel * zero._get_param_partition_rank(parameter)
            yield self._piece(zero.sub_group_to_group_id[part], first, self._copies[part], start, numel)


def _entries(parameter: Tensor, index: Index, first: int, numel: int) -> Tensor:
    """The positions in the flattened parameter of its entries at `index`: those in [first, first + numel)."""
    if index == (...,):
        return torch.arange(first, first + numel)
    axis, number = len(index) - 1, index[-1]
    run = math.prod(parameter.shape[axis + 1 :])
    starts = torch.arange(math.prod(parameter.shape[:axis])) * (run * parameter.shape[axis]) + number * run
    at = (starts.unsqueeze(1) + torch.arange(run)).flatten()
    return at[(at >= first) & (at < first + numel)]
