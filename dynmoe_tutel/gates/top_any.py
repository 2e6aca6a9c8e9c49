"""The top-any gate of DynMoE: a token activates every expert whose cosine score passes that expert's threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..forwards import without_autocast
from ..initialization import seed_of, seeded
from ..kernels import gate_dtype, threshold_gate, vector_losses
from ..kernels.norms import unit
from ..parts import writable
from ..routing import Capacity, Router, Routing, is_active
from ..validation import number, warn_once
from .base import Gate, gate_type
from .budget import Budget
from .samples import sampled_rows

MAX_LOG_SCALE = math.log(100.0)
SAMPLE = 256  # tokens kept of a forward to hold a budget
PATIENCE = 1000  # training forwards without a step of `adaptive.budget`, after which a gate warns

_OF_VECTORS = {"diversity", "simplicity"}  # losses of the routing vectors alone
_UPSTREAM = {"max_expert_num": 64, "upstream_init": True}


@gate_type("gated_multi_gate_t", ("max_expert_num", "init_t", "budget"), {**_UPSTREAM, "init_t": 0.1}, "normalized")
@gate_type("gated_multi_gate", ("max_expert_num", "budget"), _UPSTREAM, "normalized")
@gate_type("top_any", ("max_expert_num", "init_t", "budget"))
class TopAnyGate(Gate):
    """s[t,e] = sigmoid(tau cos(x_t, w_e)); token t activates an active expert e if s[t,e] > sigmoid(tau G_e).

    Tensors have upstream's names: `sim_matrix` [D, E], its columns are w_e; `gates` [E], G; `experts_mask` [E] float
    buffer, 1 where the slot is active; `temperature` [1], only with `init_t`: tau = exp(min(temperature, log 100)),
    initially 1 / init_t, else tau = 1. Source: arXiv 2405.14297, section 3.1.

    In training a token that passes no threshold is unrouted; in eval it takes its best active expert.

    `budget` (see `Budget`) raises all G_e by a shift and limits k. With a target, the buffer `budget_shift` [1] fp32
    holds the shift in cosine units, which `adaptive.budget` moves; without, there is no such buffer.
    """

    adaptive: ClassVar[bool] = True
    takes_max_k = True
    exact_buffers = ("budget_shift",)
    slot_axes: ClassVar[dict[str, int]] = {"sim_matrix": 1, "gates": 0, "experts_mask": 0}
    default_aux: ClassVar[dict[str, float]] = {"diversity": 1.0, "simplicity": 1.0}
    without_gshard = default_aux
    aux_choices: ClassVar[tuple[str, ...]] = (
        "diversity",
        "simplicity",
        "load_balance",
        "efficiency",
        "gshard",
    )

    sim_matrix: nn.Parameter
    gates: nn.Parameter
    experts_mask: Tensor
    budget_shift: Tensor | None

    def __init__(
        self,
        *,
        model_dim: int,
        num_experts: int,
        slots: int,
        init_t: float | None = None,
        upstream_init: bool = False,
        budget: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        **common: Any,
    ) -> None:
        super().__init__(model_dim=model_dim, num_experts=num_experts, slots=slots, **common)
        if self.gate_noise:
            warn_once(f"gate_type['gate_noise'] = {self.gate_noise} is ignored: a threshold takes no noise")
        if not self.normalize_gate:
            warn_once("normalize_gate = False is ignored: a token's output is the mean of its experts")
        if upstream_init:
            if common.get("capacity_factor"):
                warn_once("gate_type['capacity_factor'] is ignored by upstream's gates: give it to the forward")
            self.capacity_factor = 0.0  # as upstream
            # upstream's seed and bits, without touching the global random state
            generator = torch.Generator().manual_seed(1)
        self.seed = seed_of(generator)
        self.active_at_start = [slot < num_experts for slot in range(slots)]
        self.sim_matrix = nn.Parameter(torch.empty(model_dim, slots))
        self.gates = nn.Parameter(torch.empty(slots))
        self.register_buffer("experts_mask", torch.empty(slots, dtype=torch.float32))
        self.temperature: nn.Parameter | None = None
        if init_t is not None:
            self.init_t = number("gate_type['init_t']", init_t, 0, open_low=True)
            self.temperature = nn.Parameter(torch.empty(1))
        # No buffers, which DistributedDataParallel would overwrite with another rank's; see `keep_sample`.
        self._sample: Tensor | None = None  # [S, D] fp32: tokens of the last training forward, for `adaptive.budget`
        self._sampled: Tensor | None = None  # [S] bool: which rows of it are tokens that no step has used
        self._unused_samples = 0  # forwards since the last step
        self.register_buffer("budget_shift", None)
        self.budget: Budget | None = None
        if budget is not None:
            self.hold_budget(Budget.of(budget, num_experts))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Routing vectors, thresholds, temperature and mask as at construction."""
        sim_matrix, gates = self.written()
        if not sim_matrix.is_meta:  # in fp32 on the CPU: qr has no half kernel, and the generator is a CPU one
            w_ED = torch.empty(self.slots, self.model_dim, dtype=torch.float32, device="cpu")
            sim_matrix.copy_(nn.init.orthogonal_(w_ED, generator=seeded(self.seed)).t())
        gates.zero_()
        self.reset_mask()
        if self.temperature is not None:
            self.temperature.fill_(math.log(1 / self.init_t))
        if self.budget_shift is not None:
            self.budget_shift.zero_()
            self.forget_sample()

    def hold_budget(self, budget: Budget, shift: float | None = None) -> None:
        """Take over a budget, and a shift if it has a target; without `shift`, the shift stays as it is, or 0."""
        self.budget = budget
        if budget.target_k is None:
            self.budget_shift = None
        elif self.budget_shift is None:
            with torch.inference_mode(False):  # a tensor of this mode could not be moved in training
                self.budget_shift = torch.zeros(1, device=self.experts_mask.device)
                self._sample_on(self.experts_mask.device)
        if shift is not None and self.budget_shift is not None:
            self.budget_shift.fill_(shift)

    @torch.no_grad()
    def keep_sample(self, x_TD: Tensor, routing: Routing) -> None:
        """Keep SAMPLE tokens of a training forward, spread over it, where the gate has a target."""
        if self.budget_shift is None:
            return
        self._warn_without_steps()
        self._sample_on(x_TD.device)
        assert self._sample is not None
        assert self._sampled is not None
        chosen = sampled_rows(x_TD.shape[0], SAMPLE, x_TD.device)
        taken = chosen.shape[0]
        self._sample[:taken] = unit(x_TD[chosen].to(gate_dtype(x_TD)), 1)  # their lengths may not fit fp32
        self._sampled.zero_()
        self._sampled[:taken] |= True if routing.token_mask is None else routing.token_mask[chosen]

    def _sample_on(self, device: torch.device) -> None:
        """Have room for a sample on `device`: made anew, without a token, where it is elsewhere."""
        if self._sample is None or self._sample.device != device:
            self._sample = torch.zeros((SAMPLE, self.model_dim), device=device)
            self._sampled = torch.zeros(SAMPLE, dtype=torch.bool, device=device)

    def _warn_without_steps(self) -> None:
        if torch.compiler.is_compiling():  # a count would be compiled anew for each value
            return
        self._unused_samples += 1
        if self._unused_samples == PATIENCE:
            warn_once(
                f"a layer whose gate_type['budget'] has a target_k ran {PATIENCE} forwards in training, and nothing "
                "has moved its shift: call step() of an ExpertController, or of dynmoe_tutel.adaptive.Budgets, after "
                "each optimizer step. If the shift is to stay as it is, all is well"
            )

    def forget_sample(self) -> None:
        """The sample was used: without a forward in between, the next step finds no token."""
        self._unused_samples = 0
        if self._sampled is not None:
            self._sampled.zero_()

    def sample_margins(self) -> Tensor:
        """The margins of the kept tokens under the weights as they are, [SAMPLE, E]; -inf in rows without a token."""
        self._sample_on(self.experts_mask.device)
        assert self._sample is not None
        return self.margins(self._sample, self._sampled)

    @torch.no_grad()
    def margins(self, x_TD: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """cos(x_t, w_e) - G_e without a shift, [T, E] fp32, never NaN.

        It is -inf for inactive slots, for padding and for a token that is not finite; inf for an active expert whose
        vector or threshold is not finite, which every token activates.
        """
        dtype = gate_dtype(x_TD)
        with without_autocast(x_TD):
            cos_TE = unit(x_TD.to(dtype), 1) @ unit(self.sim_matrix.to(dtype), 0)
        margin_TE = (cos_TE - self.gates.to(dtype)).float().nan_to_num_(torch.inf, torch.inf, -torch.inf)
        margin_TE.masked_fill_(~self.active(), -torch.inf)
        margin_TE.masked_fill_(~x_TD.isfinite().all(dim=1, keepdim=True), -torch.inf)
        return margin_TE if token_mask is None else margin_TE.masked_fill_(~token_mask.unsqueeze(1), -torch.inf)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As any module's; a gate that was pickled before there were budgets has none."""
        super().__setstate__({"budget": None, "_sample": None, "_sampled": None, "_unused_samples": 0, **state})
        self._buffers.setdefault("budget_shift", None)

    def _apply(self, *args: Any, **options: Any) -> Any:
        """As any gate's, and the sample has room on the same device."""
        super()._apply(*args, **options)
        if self.budget_shift is not None:
            self._sample_on(self.experts_mask.device)
        return self

    def held_values(self) -> dict[str, float]:
        """Of a budget with a target: `target_k`, and `shift` in cosine units."""
        if self.budget_shift is None or self.target_k is None:
            return {}
        return {"target_k": self.target_k, "shift": float(self.budget_shift)}

    def start_with(self, active: Sequence[bool]) -> None:
        """Make these the active slots at start; `reset_mask` activates them."""
        self.active_at_start = list(active)

    def reset_mask(self) -> None:
        """Activate the slots that are active at start, and no other."""
        self.experts_mask.copy_(torch.tensor(self.active_at_start))

    def scale(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """tau, [] in `dtype`."""
        tau = self._learned_scale(dtype)
        return torch.ones((), dtype=dtype, device=self.experts_mask.device) if tau is None else tau

    def _learned_scale(self, dtype: torch.dtype) -> Tensor | None:
        """tau where it is learned, else None, for 1."""
        temperature = self.temperature
        return None if temperature is None else temperature.to(dtype).clamp(max=MAX_LOG_SCALE).exp().squeeze(0)

    def written(self) -> tuple[Tensor, Tensor]:
        """`sim_matrix` and `gates`, to write; ValueError by name if a write would be lost."""
        return writable("the gate", self, "sim_matrix"), writable("the gate", self, "gates")

    def active(self) -> Tensor:
        """[E] bool: the slots that hold an expert."""
        return is_active(self.experts_mask)

    def forward(
        self,
        x_TD: Tensor,
        capacity: Capacity = "exact",
        top_k: int | None = None,
        token_mask: Tensor | None = None,
        max_k: int | None = None,
    ) -> Routing:
        """Route the tokens [T, D] where `token_mask` [T] is not False; `top_k` is ignored.

        `max_k` limits the experts of a token in this call, beside the budget's.
        """
        if top_k is not None:
            warn_once("top_k is ignored by a top-any gate: every token chooses its own number of experts")
        dtype = gate_dtype(x_TD)
        # each is read once: a parametrisation is computed anew at each reading, and may change its state
        sim_matrix, gates = self.sim_matrix, self.gates
        tau = self._learned_scale(dtype)
        most = self.limit_of_call(max_k)
        score_TE, bits_TW, unrouted_T, inv_norm_T, block_counts = threshold_gate(
            x_TD, sim_matrix, gates.detach(), self.experts_mask, tau, not self.training, token_mask, self.budget_shift,
            min(most or 0, self.slots),
        )  # fmt: skip
        raised = gates if self.budget_shift is None else gates.to(dtype) + self.budget_shift.to(dtype)
        # before the index, which may wait for the device
        of_vectors: dict[str, Tensor] = {}
        unit: tuple[Tensor, ...] = ()
        if _OF_VECTORS & set(self.aux_names):
            diversity, simplicity, *unit, _, _ = vector_losses(sim_matrix, self.experts_mask)
            of_vectors = {"diversity": diversity, "simplicity": simplicity}
        router = Router.of(sim_matrix, raised, tau, inv_norm_T, unit)
        thresholds = None
        if set(self.aux_names) - _OF_VECTORS:  # a loss on assignments has gradients for thresholds that may be NaN
            thresholds = router.theta(raised.masked_fill(~self.active(), 0))
        routing = Routing.from_bits(
            bits_TW,
            score_TE,
            unrouted=unrouted_T,
            thresholds=thresholds,
            shift=self.budget_shift,
            token_mask=token_mask,
            capacity=capacity,
            block_counts=block_counts,
            max_k=most,
            router=router,
        )
        routing.aux = {n: of_vectors[n] if n in of_vectors else self.aux_term(n, routing) for n in self.aux_names}
        return routing

    @property
    def max_k(self) -> int | None:  # type: ignore[override]
        """The budget's."""
        return None if self.budget is None else self.budget.max_k

    @property
    def target_k(self) -> float | None:  # type: ignore[override]
        """The budget's."""
        return None if self.budget is None else self.budget.target_k

    @property
    def scope(self) -> str:  # type: ignore[override]
        """The budget's."""
        return "layer" if self.budget is None else self.budget.scope

    def aux_term(self, name: str, routing: Routing) -> Tensor:
        """One unweighted auxiliary loss of the assignment; see `losses`."""
        assigned_TE = routing.straight_through()
        if name == "load_balance":
            return losses.load_balance_loss(assigned_TE)
        if name == "efficiency":
            return losses.efficiency_loss(assigned_TE, routing.real_tokens)
        # gshard: the first pick is the expert of highest score among those that passed; an unrouted token has none
        chosen_TE = assigned_TE.detach() > 0
        first_T = routing.scores.detach().masked_fill(~chosen_TE, -1).argmax(dim=1)
        first_TE = F.one_hot(first_T, self.slots) * chosen_TE
        return losses.gshard_loss(assigned_TE, first_TE, self.active().sum(), routing.real_tokens)

    @torch.no_grad()
    def activate(self, slot: int, w_D: Tensor) -> None:
        """Grow: the slot routes by direction `w_D` [D] with G = 0."""
        sim_matrix, gates = self.written()
        sim_matrix[:, slot] = w_D.to(sim_matrix)
        gates[slot] = 0
        self.experts_mask[slot] = 1

    @torch.no_grad()
    def deactivate(self, slot: int) -> None:
        """Prune: no token reaches the slot."""
        self.experts_mask[slot] = 0

    @torch.no_grad()
    def permute_slots(self, order: list[int]) -> None:
        """Move the gate's entries of slot order[i] to slot i."""
        order_E = torch.tensor(order, device=self.experts_mask.device)
        sim_matrix, gates = self.written()
        for tensor, axis in ((sim_matrix, 1), (gates, 0), (self.experts_mask, 0)):
            tensor.copy_(tensor.index_select(axis, order_E))

    def extra_repr(self) -> str:
        temperature = "" if self.temperature is None else ", temperature"
        return f"model_dim={self.model_dim}, slots={self.slots}{temperature}"
