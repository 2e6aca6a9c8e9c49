"""`DynMoELayer`: the `deepspeed_moe` of a drop-in `MoE`, a `MoELayer` with DeepSpeed's names and call."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..forwards import in_backward, is_training
from ..layer import MoELayer
from ..layer_config import MoEConfig
from ..parallel.exchange import Exchange
from ..validation import describe
from .exchange import ExpertParallelExchange
from .gate import DynMoEGate, RoutingVectors

LOSSES = dict.fromkeys(("diversity", "simplicity", "load_balance", "efficiency"), 1.0)  # upstream's l_aux in training


class DynMoELayer(MoELayer):
    """Tokens [..., D] to [..., D]; `l_aux` and `exp_counts` [E] int64 are those of the last forward.

    Its parameters are `gate.wg.*` and `experts.deepspeed_experts.{slot}.*`, numbered from 0 on every rank. At start the
    first `num_experts` slots are active, and growth takes the first free slot, whatever `ep_size` is.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int,
        max_expert_num: int,
        ep_size: int,
        group_name: str,
        noisy_gate_policy: str | None = None,
    ) -> None:
        exchange = ExpertParallelExchange(max_expert_num, ep_size, num_experts)
        experts = {"type": "custom", "num_experts_per_device": num_experts, "module": expert, "group_name": group_name}
        super().__init__(
            {"type": "top_any", "max_expert_num": max_expert_num},
            hidden_size,
            experts,
            combine_gradient="mean",
            aux_losses=LOSSES,
            exchange=lambda config: exchange,
        )
        gate, held = self._modules.pop("gates")[0], self._modules.pop("experts")  # type: ignore[index]
        self.gate, self.experts = gate, held
        gate.noisy_gate_policy, gate.record = noisy_gate_policy, self.record
        self._non_persistent_buffers_set |= {"_num_global_experts", "_max_num_global_experts"}
        self.register_load_state_dict_post_hook(_count_loaded)

    @staticmethod
    def _made_gate(
        gate: dict[str, Any],
        config: MoEConfig,
        exchange: Exchange,
        aux_names: tuple[str, ...],
        generator: torch.Generator | None,
    ) -> DynMoEGate:
        slots = exchange.placement.slots
        vectors = RoutingVectors(
            model_dim=config.model_dim, num_experts=exchange.start, slots=slots, aux_names=aux_names
        )
        return DynMoEGate(vectors)

    @property
    def gates(self) -> nn.ModuleList:
        """The one gate, by the name of other layers."""
        gate = self._modules.get("gate")
        return nn.ModuleList([gate]) if gate is not None else self._modules["gates"]  # type: ignore[return-value]

    @property
    def exp_counts(self) -> Tensor:
        """Assignments of each slot in the last forward, [E] int64 on the layer's device."""
        counts: Tensor = self.gate.exp_counts
        return counts.to(self._num_global_experts.device)

    def forward(self, input: Tensor, used_token: Tensor | None = None, **options: Any) -> Any:  # type: ignore[override]
        """y [..., D], which carries `l_aux`. `used_token` [...] or [T] is 0 or False for padding, which gets output 0.

        `options` are those of `MoELayer.forward`.
        """
        if used_token is not None:
            options["token_mask"] = _mask(used_token, input)
        recorded = self.record_routing and (self.record_eval or is_training(self))
        self.gate.is_recorded = recorded and not in_backward()
        try:
            return super().forward(input, **options)
        finally:
            self.gate.end_forward()

    def join(self, group: Any) -> None:
        """Work between the ranks of DeepSpeed's expert-parallel group."""
        exchange: ExpertParallelExchange = self.exchange  # type: ignore[assignment]
        exchange.join(group)

    def bind(self, group: Any) -> None:
        """ValueError: `ep_size` says over how many ranks the experts are divided."""
        raise ValueError("bind: the experts of a DeepSpeed MoE are divided by its ep_size, when the engine is made")

    def _free_slot(self, load_E: Any) -> int | None:
        """The first slot that holds no expert, as upstream's, so that results do not depend on ep_size."""
        free = (~self._used_slots()).nonzero().flatten().tolist()
        return free[0] if free else None

    def _load_from_state_dict(self, state_dict, prefix, *arguments):  # type: ignore[no-untyped-def]
        self._note_marks()
        _keep_own_experts(self, state_dict, f"{prefix}experts.deepspeed_experts.")
        nn.Module._load_from_state_dict(self, state_dict, prefix, *arguments)


def _mask(used_token: Tensor, input: Tensor) -> Tensor:
    """The tokens of `input` that are used, bool in its shape."""
    shape = input.shape[:-1]
    if not isinstance(used_token, Tensor) or used_token.numel() != shape.numel():
        raise ValueError(
            f"used_token must have an entry for each token, {list(shape)} or [{shape.numel()}], 0 for padding, got "
            f"{describe(used_token)}"
        )
    return used_token.reshape(shape).bool()


def _keep_own_experts(layer: DynMoELayer, state_dict: dict[str, Any], stem: str) -> None:
    """Of a state of all slots, keep in place those of this rank, numbered from 0; ValueError before it is known."""
    number = re.compile(re.escape(stem) + r"(\d+)\.")
    found = {key: int(match[1]) for key in state_dict if (match := number.match(key))}
    place = layer.placement
    if place.ranks == 1 or max(found.values(), default=-1) + 1 != place.slots:
        return
    if place.group is None:
        raise ValueError(
            f"{stem}*: the state has the experts of all {place.slots} slots, and a MoE with ep_size = {place.ranks} "
            "knows its own only after deepspeed.initialize(): load it into the module of the engine"
        )
    values = {key: state_dict.pop(key) for key in found}
    for key, slot in found.items():
        if place.first <= slot < place.first + place.local:
            rest = key[len(f"{stem}{slot}.") :]
            state_dict[f"{stem}{slot - place.first}.{rest}"] = values[key]


def _count_loaded(layer: DynMoELayer, incompatible: Any) -> None:
    """After `load_state_dict`: the saved state has no counts."""
    layer._count_experts()
