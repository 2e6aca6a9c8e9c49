"""What the questions train: DynMoE with one thing changed, and the rows that it is compared with.

A `Variant` is a name and what is changed; `layer_options` and `controller` turn it into a MoE layer and what grows its
experts. Questions share variants, so that each is trained once a seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe_tutel.adaptive.controller import ExpertController, Schedule
from dynmoe_tutel.adaptive.policy import Decision, DynMoEPolicy
from dynmoe_tutel.adaptive.records import RoutingRecord
from dynmoe_tutel.experiments.rows import moe_options
from dynmoe_tutel.experiments.task import Settings
from dynmoe_tutel.metrics import moe_layers
from dynmoe_tutel.routing import Routing

K = 2  # experts a token, where k is fixed or held
FIXED = f"top-{K}-of-8"
BUDGET = f"dynmoe-k{K}"
PLAIN = f"plain-top-{K}"  # without this project's layer
ROUTED_EXPERTS = 8  # of routers that do not grow


@dataclass(frozen=True)
class Variant:
    """A row of the questions.

    `row` is the row of the experiments that it is built like; `aux_losses` and `combine_gradient` are the layer's;
    `score_weighted` replaces the mean over a token's experts; `growth` and
    `pruning` say what the controller may do; `every` is the interval of its checks, None that of the settings; `tuned`
    starts from a trained dense model, whose MLPs become experts as copies.
    """

    name: str
    about: str
    row: str = "dynmoe"
    aux_losses: Mapping[str, float] | None = None
    combine_gradient: str = "mean"
    score_weighted: bool = False
    growth: bool = True
    pruning: bool = True
    every: int | None = None
    init: str = "nearest"
    tuned: bool = False

    @property
    def is_dense(self) -> bool:
        return self.row == "dense"

    @property
    def is_adaptive(self) -> bool:
        """Whether its experts may grow."""
        return self.row.startswith("dynmoe")

    def layer_options(self, experts: int, slots: int) -> dict[str, Any]:
        """`gate_type`, `num_experts` and what else its layer takes; `experts` and `slots` are DynMoE's."""
        options: dict[str, Any] = moe_options(self.row, experts if self.is_adaptive else ROUTED_EXPERTS, slots)
        if self.aux_losses is not None:
            options["aux_losses"] = dict(self.aux_losses)
        if self.combine_gradient != "mean":
            options["combine_gradient"] = self.combine_gradient
        return options

    def finish_model(self, model: nn.Module) -> nn.Module:
        """Do to the built model what no option of the layer does."""
        if self.score_weighted:
            for layer in moe_layers(model).values():
                layer.gates[0].register_forward_hook(_weigh_by_score)
        return model

    def controller(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, seed: int
    ) -> ExpertController | None:
        """What changes its experts; None where nothing may."""
        if not self.is_adaptive:
            return None
        every = self.every or settings.update_every
        # As in all experiments no update comes in the last stretch, which is the same for all intervals.
        schedule = Schedule(every=every, stop=max(every, settings.steps - settings.update_every))
        policy = OneSided(self.growth, self.pruning)
        return ExpertController(model, optimizer, schedule, policy, init=self.init, seed=seed)


@dataclass(frozen=True)
class OneSided:
    """DynMoE's policy, of which only growth, only pruning or nothing may happen."""

    growth: bool
    pruning: bool

    def __call__(self, record: RoutingRecord, active: Tensor, free_slots: int, silent_windows: list[int]) -> Decision:
        decision = DynMoEPolicy()(record, active, free_slots, silent_windows)
        prune = decision.prune if self.pruning else []
        has_room = free_slots + len(prune) > 0  # a slot that is not pruned is not free
        return Decision(prune, decision.grow if self.growth and has_room else [])


def _weigh_by_score(_gate: nn.Module, _inputs: Any, routing: Routing) -> Routing:
    """Hook of a top-any gate: experts count in proportion to their scores, and not equally.

    The router's gradient goes through the weights, and through the assignment as the gate's own does.
    """
    chosen_TE = routing.straight_through() * routing.scores
    passed_TE = chosen_TE / chosen_TE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(chosen_TE.dtype).tiny)
    fallback_TE = (routing.assigned & routing.unrouted.unsqueeze(1)).to(passed_TE.dtype)
    return dataclasses.replace(routing, weights=passed_TE + fallback_TE, router=None)


AUX_TERMS = ("diversity", "simplicity", "load_balance", "efficiency")
INTERVALS = (10, 50, 100)
INITS = ("mean", "fresh", "keep")
ROUTERS = tuple(
    Variant(name, about, name)
    for name, about in (
        (f"relu-k{K}", "ReLU router (ReMoE)"),
        (f"top-p-k{K}", "top-p with a controlled p (DTop-p)"),
        (f"expert-threshold-k{K}", "a threshold an expert, from its quantile"),
        (f"null-experts-k{K}", f"the best {2 * K} of 8 experts and 8 null ones (AdaMoE)"),
        (f"quantile-top-{K}-of-8", f"the best {K}, balanced by quantiles"),
    )
)

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("dense", "no experts", "dense"),
        Variant(FIXED, "GMoE's cosine router", FIXED),
        Variant(PLAIN, "a loop over the experts", "plain"),
        Variant("dynmoe", "DynMoE as it is"),
        Variant(BUDGET, f"DynMoE with a budget of {K} experts a token", BUDGET),
        Variant("dense-tuned", "no experts, from a trained dense model", "dense", tuned=True),
        Variant(f"{FIXED}-tuned", "experts are copies of the trained MLPs", FIXED, tuned=True),
        Variant("dynmoe-tuned", "experts are copies of the trained MLPs", tuned=True),
        Variant("dynmoe-score-weighted", "experts count by their scores", score_weighted=True),
        Variant(
            "dynmoe-normalized",
            "equal weights, DynMoE-Tutel's gradient of an assignment",
            combine_gradient="normalized",
        ),
        *[Variant(f"dynmoe-{term}", f"{term} is the only term", aux_losses={term: 1.0}) for term in AUX_TERMS],
        Variant("dynmoe-no-aux", "no auxiliary loss", aux_losses={}),
        Variant("dynmoe-growth", "growth alone", pruning=False),
        Variant("dynmoe-pruning", "pruning alone", growth=False),
        Variant("dynmoe-fixed", "neither growth nor pruning", growth=False, pruning=False),
        *[Variant(f"dynmoe-every-{n}", f"checks every {n} steps", every=n) for n in INTERVALS],
        *[Variant(f"dynmoe-init-{init}", f"a grown expert starts by {init!r}", init=init) for init in INITS],
        *ROUTERS,
    )
}
