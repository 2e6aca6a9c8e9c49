"""The variants of the questions differ from DynMoE in what they say, and in nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe_tutel import MoELayer
from dynmoe_tutel.experiments.questions.catalogue import QUESTIONS
from dynmoe_tutel.experiments.questions.plain import PlainTopK
from dynmoe_tutel.experiments.questions.task import QuestionsConfig, QuestionsTask
from dynmoe_tutel.experiments.questions.timing import RAGGED_K, assignments, uneven_assignments
from dynmoe_tutel.experiments.questions.variants import PLAIN, VARIANTS, K, OneSided
from dynmoe_tutel.experiments.report.reporters import Several
from dynmoe_tutel.experiments.run_folder import NoFolder
from dynmoe_tutel.experiments.runner import Run
from dynmoe_tutel.experiments.task import RunKey
from dynmoe_tutel.experiments.vision import digits
from dynmoe_tutel.metrics import moe_layers

CONFIG = QuestionsConfig(steps=2, update_every=1, log_every=1, eval_every=2)


@pytest.fixture(scope="module")
def task() -> QuestionsTask:
    return QuestionsTask(CONFIG)


def test_every_variant_is_asked_for_by_a_question() -> None:
    asked = {name for question in QUESTIONS for name in question.variants}
    assert asked == VARIANTS.keys() - {PLAIN}
    assert [question.number for question in QUESTIONS] == list(range(1, 12))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains(task: QuestionsTask, name: str) -> None:
    run = Run(task, RunKey(name, 0), NoFolder(), Several())
    before = [parameter.clone() for parameter in run.model.parameters()]
    for _ in range(2):
        run.train_step()
        run.adapt()
    changed = [not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
    assert (run.controller is not None) == name.startswith("dynmoe")


def test_variants_share_what_they_have_in_common(task: QuestionsTask) -> None:
    """Attention, embedding and head, and DynMoE's experts and routers."""
    states = {
        name: task.build(RunKey(name, 3)).state_dict() for name in ("dense", "dynmoe", "dynmoe-no-aux", "relu-k2")
    }
    shared = [name for name in states["dense"] if ".mlp" not in name or name.startswith(("blocks.0", "blocks.2"))]
    assert len(shared) > 20
    for state in states.values():
        assert all(torch.equal(state[name], states["dense"][name]) for name in shared)
    assert all(torch.equal(states["dynmoe"][name], value) for name, value in states["dynmoe-no-aux"].items())


def test_tuned_variants_start_as_the_trained_dense_model(task: QuestionsTask) -> None:
    """Whose images are the training images alone, at angles of no domain."""
    image = digits.load_domains()[75].image[:20]
    models = {name: task.build(RunKey(name, 0)).eval() for name in ("dense-tuned", "dynmoe-tuned", "dense")}
    with torch.no_grad():
        logits = {name: model(image) for name, model in models.items()}
    assert torch.allclose(logits["dynmoe-tuned"], logits["dense-tuned"], atol=1e-5)
    assert not torch.allclose(logits["dense"], logits["dense-tuned"], atol=1e-2)
    again = task.build(RunKey("dense-tuned", 0)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in models["dense-tuned"].state_dict().items())


def test_auxiliary_terms_and_checks_are_those_of_the_name(task: QuestionsTask) -> None:
    def layer(name: str) -> MoELayer:
        return next(iter(moe_layers(task.build(RunKey(name, 0))).values()))

    assert set(layer("dynmoe").gates[0].aux_names) == {"diversity", "simplicity"}
    assert set(layer("dynmoe-load_balance").gates[0].aux_names) == {"load_balance"}
    assert set(layer("dynmoe-no-aux").gates[0].aux_names) == set()
    assert layer("dynmoe-normalized").combine_gradients == ["normalized"]
    assert layer("dynmoe").combine_gradients == ["mean"]
    long = QuestionsTask(QuestionsConfig(steps=200))
    for name, first, last in (("dynmoe", 25, 175), ("dynmoe-every-10", 10, 170), ("dynmoe-every-100", 100, 100)):
        run = Run(long, RunKey(name, 0), NoFolder(), Several())
        assert run.controller is not None
        updates = [step for step in range(1, 201) if run.controller.schedule.updates_at(step)]
        assert (updates[0], updates[-1]) == (first, last)
        assert run.controller.init == "nearest"
    fresh = Run(long, RunKey("dynmoe-init-fresh", 0), NoFolder(), Several())
    assert fresh.controller is not None
    assert fresh.controller.init == "fresh"


@dataclass
class Record:
    """The fields of a RoutingRecord that DynMoE's policy reads: slot 1 is silent, and tokens are unrouted."""

    counts: Tensor = field(default_factory=lambda: torch.tensor([5, 0, 0, 0]))
    tokens: Tensor = field(default_factory=lambda: torch.tensor(8))
    unrouted_sum: Tensor = field(default_factory=lambda: torch.ones(4))
    unrouted_norm: Tensor = field(default_factory=lambda: torch.tensor(3.0))
    unrouted_tokens: Tensor = field(default_factory=lambda: torch.tensor(3))
    keep_tokens: int = 0


@pytest.mark.parametrize(("growth", "pruning"), [(True, True), (True, False), (False, True), (False, False)])
def test_one_side_of_the_policy(growth: bool, pruning: bool) -> None:
    record: Any = Record()
    active = torch.tensor([True, True, False, False])
    decision = OneSided(growth, pruning)(record, active, 2, [0, 1, 0, 0])
    assert [slot for slot, _ in decision.prune] == [1] * pruning
    assert len(decision.grow) == growth


@pytest.mark.parametrize(("pruning", "grown"), [(True, 1), (False, 0)])
def test_growth_alone_has_no_slot_that_pruning_would_free(pruning: bool, grown: int) -> None:
    record: Any = Record()
    decision = OneSided(True, pruning)(record, torch.ones(4, dtype=torch.bool), 0, [0, 1, 0, 0])
    assert len(decision.grow) == grown


@pytest.mark.parametrize("training", [True, False])
def test_experts_count_by_their_scores(task: QuestionsTask, training: bool) -> None:
    """Against plain loops; in eval a token without a threshold passed gets its best expert whole."""
    model = task.build(RunKey("dynmoe-score-weighted", 0)).train(training)
    layer = next(iter(moe_layers(model).values()))
    with torch.no_grad():
        layer.gates[0].gates.fill_(0.1)
    x_TD = torch.randn(60, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y_TD = layer(x_TD)
    gate, w = layer.gates[0], {name: value.detach().double() for name, value in layer.experts.named_parameters()}
    cosine_TE = nn.functional.normalize(x_TD.detach().double(), dim=1) @ nn.functional.normalize(
        gate.sim_matrix.detach().double(), dim=0
    )
    unrouted = 0
    for t in range(60):
        passed = [e for e in range(4) if cosine_TE[t, e] > gate.gates[e].double()]
        expected = torch.zeros(64, dtype=torch.double)
        if not passed:
            unrouted += 1
            passed = [] if training else [int(cosine_TE[t, :4].argmax())]
        score = torch.sigmoid(cosine_TE[t, passed])
        for e, weight in zip(passed, score / score.sum(), strict=True):
            hidden = w["batched_fc1_w"][e] @ x_TD[t].detach().double() + w["batched_fc1_bias"][e]
            expected += weight * (nn.functional.gelu(hidden) @ w["batched_fc2_w"][e] + w["batched_fc2_bias"][e])
        assert torch.allclose(y_TD[t].double(), expected, atol=1e-5)
    assert 0 < unrouted < 60
    if training:
        y_TD.square().sum().backward()
        assert gate.sim_matrix.grad is not None
        assert gate.sim_matrix.grad[:, :4].abs().sum() > 0
        assert gate.gates.grad is not None
        assert gate.gates.grad[:4].abs().sum() > 0


def test_the_plain_top_k_is_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    module = PlainTopK(8, 16, 4, 2)
    x = torch.randn(3, 5, 8)
    y = module(x)
    for token, result in zip(x.view(-1, 8), y.view(-1, 8), strict=True):
        score, chosen = module.router(token).softmax(0).topk(2)
        expected = sum(s / score.sum() * module.experts[e](token) for s, e in zip(score, chosen.tolist(), strict=True))
        assert torch.allclose(result, expected, atol=1e-6)


def test_ragged_routings_have_equally_many_assignments() -> None:
    variances = []
    for shares in RAGGED_K.values():
        assigned_TE = assignments(shares, 720, seed=1)
        k_T, load_E = assigned_TE.sum(1), assigned_TE.sum(0)
        assert int(load_E.sum()) == K * 720
        assert load_E.max() - load_E.min() <= 1
        assert {int(k): float((k_T == k).float().mean()) for k in k_T.unique()} == pytest.approx(shares)
        variances.append(float(k_T.float().var(correction=0)))
    assert variances == pytest.approx([0, 1, 4, 12])
    uneven_TE = uneven_assignments(720, seed=1)
    assert (uneven_TE.sum(1) == K).all()
    assert uneven_TE.sum(0).tolist() == [450, 450, 90, 90, 90, 90, 90, 90]
