"""`MoE`, the drop-in for `deepspeed.moe.layer.MoE`: with k = -1 DynMoE's, else DeepSpeed's own."""

from __future__ import annotations

from typing import Any

import deepspeed.moe.layer as stock
import torch
import torch.nn.functional as F
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size, bwc_tensor_model_parallel_world_size
from torch import Tensor, nn

from ...adaptive.policy import ExpertChange
from ...forwards import in_backward
from ...validation import positive_int, warn_once
from ..gate import JITTER
from ..moe_layer import DynMoELayer

__all__ = ["MoE"]

DYNMOE = -1  # the value of k
_SLOTS = 4  # upstream's default of max_expert_num
_POLICIES = (None, "None", JITTER, "RSample")


class MoE(stock.MoE):
    """DeepSpeed's layer and its arguments, and `max_expert_num`. With k = -1 every token chooses its experts.

    With k = -1, `max_expert_num` slots hold copies of `expert`, of which the first `num_experts` are active at start;
    ``deepspeed_moe`` is a `dynmoe_tutel.MoELayer`. Upstream's scripts may give `max_expert_num` in the place of the
    15th positional argument, which is DeepSpeed's `top2_2nd_expert_sampling`: there an integer means slots.

    No token is dropped: `capacity_factor`, `eval_capacity_factor`, `min_capacity`, `drop_tokens` and `use_rts` are
    accepted and change nothing. Of `noisy_gate_policy`, "Jitter" does what it does in DeepSpeed.

    Args:
        hidden_size: D of the input and of the output.
        expert: the module that each expert is a copy of, [..., D] to [..., D]; it may return a tuple that begins so.
        num_experts: experts active at start (other k: all experts).
        ep_size: ranks over which the slots are divided; divides `max_expert_num`.
        k: -1 for DynMoE; any other value makes DeepSpeed's own layer.
        use_residual: mix the output with that of `expert` itself, by weights that are learned (Residual MoE).
        max_expert_num: slots; default 4, or `num_experts` if that is more.

    Raises ValueError that names the argument, its value and the allowed values.

    `update_due` says that a record window is to end with an update of the experts. With `updates_itself` the next
    training forward does that, as the layer knows no optimizer; an engine that does it sets this to False.
    """

    update_due, updates_itself = False, False
    test_time_record = False  # upstream's switch: set it, and the next forward in eval opens a window

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool | int = True,
        max_expert_num: int | None = None,
    ) -> None:
        if not isinstance(top2_2nd_expert_sampling, bool):
            if max_expert_num is not None:
                raise ValueError(f"max_expert_num is given twice: {top2_2nd_expert_sampling!r} and {max_expert_num!r}")
            top2_2nd_expert_sampling, max_expert_num = True, top2_2nd_expert_sampling
        if k != DYNMOE:
            super().__init__(
                hidden_size, expert, num_experts, ep_size, k, capacity_factor, eval_capacity_factor, min_capacity,
                use_residual, noisy_gate_policy, drop_tokens, use_rts, use_tutel, enable_expert_tensor_parallelism,
                top2_2nd_expert_sampling,
            )  # fmt: skip
            if max_expert_num not in (None, num_experts):
                warn_once(f"max_expert_num = {max_expert_num} is ignored with k = {k}: it is for k = -1")
            return
        nn.Module.__init__(self)
        if not isinstance(expert, nn.Module):
            raise ValueError(f"expert must be a torch.nn.Module, of which each slot gets a copy, got {expert!r}")
        start = positive_int("num_experts", num_experts)
        slots = max(_SLOTS, start) if max_expert_num is None else positive_int("max_expert_num", max_expert_num)
        _check(start, slots, positive_int("ep_size", ep_size), noisy_gate_policy)
        if drop_tokens and (capacity_factor, eval_capacity_factor, min_capacity) != (1.0, 1.0, 4):
            warn_once(
                "capacity_factor, eval_capacity_factor and min_capacity are ignored with k = -1: nothing is dropped"
            )
        if use_tutel:
            warn_once("use_tutel = True is ignored with k = -1: this package dispatches tokens itself")
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.ep_size, self.expert_group_name = ep_size, f"ep_size_{ep_size}"
        self.num_experts, self.num_local_experts = slots, slots // ep_size
        self.update_due, self.updates_itself = False, True
        self.deepspeed_moe = DynMoELayer(
            hidden_size, expert, start, slots, ep_size, self.expert_group_name, noisy_gate_policy
        )
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    @property
    def is_dynmoe(self) -> bool:
        """Whether the layer was made with k = -1."""
        return isinstance(self.deepspeed_moe, DynMoELayer)

    def forward(
        self,
        hidden_states: Tensor,
        used_token: Tensor | None = None,
        if_begin_record_routing: bool = False,
        if_end_record_routing: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(output [..., D], l_aux [] fp32, exp_counts [E] int64 on the device).

        `used_token` [T] is 0 for padding. With k = -1, `if_begin_record_routing` opens a record window before this
        forward and `if_end_record_routing` closes it after: experts grow and are pruned by it when the optimizer has
        stepped, see `update_due`.
        """
        if not self.is_dynmoe:
            if if_begin_record_routing or if_end_record_routing:
                warn_once("if_begin_record_routing and if_end_record_routing are ignored by a MoE of fixed k")
            output, l_aux, exp_counts = super().forward(hidden_states, used_token)
            return output, l_aux, exp_counts
        recompute = in_backward()
        if not recompute:
            self._start_forward(if_begin_record_routing, if_end_record_routing)
        output = self.deepspeed_moe(hidden_states, used_token)
        # the output carries the loss of this very forward, which in a recompute is not the layer's last
        l_aux = getattr(output, "l_aux", None)
        if l_aux is None:  # SKIP_MOE
            l_aux = output.new_zeros((), dtype=torch.float32)
        if self.use_residual:
            output_mlp = self.mlp(hidden_states)
            if isinstance(output_mlp, tuple):
                output_mlp = output_mlp[0]
            coefficient = F.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * coefficient[..., 0:1] + output_mlp * coefficient[..., 1:]
        if if_end_record_routing and not recompute:
            self.update_due = True
        return output, l_aux, self.deepspeed_moe.exp_counts

    def _start_forward(self, begin: bool, end: bool) -> None:
        """Do the update that is due, if nobody else does; open a record window if asked to."""
        if self.update_due and self.updates_itself and self.training:
            self.adaptive_update_experts()
            self.end_record_routing()
        if self.test_time_record and not self.training:
            self.test_time_record, begin = False, True
        if begin:
            self.begin_record_routing()
        if end and not self.deepspeed_moe.record_routing:
            raise ValueError(
                "if_end_record_routing = True, and no record window is open: give if_begin_record_routing = True in "
                "this or an earlier forward, or call begin_record_routing()"
            )

    def begin_record_routing(self, record_eval: bool | None = None) -> None:
        """Open an empty record window. Training forwards count, and with `record_eval` those in eval too.

        None: those in eval count if the layer is in eval now, as in an analysis of a trained model.
        """
        self._dynmoe().begin_record_routing(not self.training if record_eval is None else record_eval)
        self.update_due = False

    def end_record_routing(self) -> None:
        """Close the window, without an update; its record can still be read."""
        self._dynmoe().end_record_routing()
        self.update_due = False

    def adaptive_update_experts(self) -> list[ExpertChange]:
        """Prune and grow by the window's record, summed over all ranks; see `MoELayer.adaptive_update_experts`.

        An optimizer is not touched, and neither is a copy of the weights that it has: an engine's step would undo it.
        """
        self.update_due = False
        return self._dynmoe().adaptive_update_experts()

    def _dynmoe(self) -> DynMoELayer:
        if not self.is_dynmoe:
            raise ValueError("experts are recorded, grow and are pruned with k = -1: this MoE has DeepSpeed's fixed k")
        layer: DynMoELayer = self.deepspeed_moe
        return layer

    def _create_process_groups(self, use_data_before_expert_parallel_: bool = False) -> None:
        """As DeepSpeed's; with k = -1 ValueError under tensor or pipeline parallelism."""
        if not self.is_dynmoe:
            super()._create_process_groups(use_data_before_expert_parallel_=use_data_before_expert_parallel_)
            return
        sizes = {
            "tensor": bwc_tensor_model_parallel_world_size(groups.mpu),
            "pipeline": bwc_pipeline_parallel_world_size(groups.mpu),
        }
        for kind, size in sizes.items():
            if size > 1:
                raise ValueError(f"a MoE with k = -1 does not support {kind} parallelism, here over {size} ranks")
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.deepspeed_moe.join(groups._get_expert_parallel_group(self.expert_group_name))


def _check(start: int, slots: int, ep_size: int, noisy_gate_policy: str | None) -> None:
    if slots < start:
        raise ValueError(f"max_expert_num = {slots} is less than num_experts = {start}: give at least {start}")
    if slots % ep_size:
        raise ValueError(f"max_expert_num = {slots} cannot be divided over ep_size = {ep_size} ranks: give a multiple")
    if noisy_gate_policy not in _POLICIES:
        raise ValueError(f"noisy_gate_policy = {noisy_gate_policy!r}: allowed are {', '.join(map(repr, _POLICIES))}")
    if noisy_gate_policy == "RSample":
        warn_once("noisy_gate_policy = 'RSample' is ignored with k = -1: a threshold takes no noise")


def __getattr__(name: str) -> Any:
    return getattr(stock, name)
